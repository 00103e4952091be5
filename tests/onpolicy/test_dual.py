"""The multipliers of constrained alignment: worked numbers, and what the dual promises."""

import math

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.onpolicy.dual import preferred, solve_dual

ONE = [np.array([1.0, 0.0])], [np.array([[-1.0, 1.0]])]


@pytest.mark.parametrize(
    # Of two answers with r = (1, 0) and g = (-1, 1) the odds are exp(1 - 2 lambda): 1 - 2 p = b gives them.
    ("bound", "multiplier", "second"),
    [(0.5, (1 + math.log(3)) / 2, 0.75), (0.0, 0.5, 0.5), (-0.9, 0.0, 1 / (1 + math.e))],
)
def test_worked_numbers(bound: float, multiplier: float, second: float) -> None:
    dual = solve_dual(*ONE, [bound], beta=1.0)
    np.testing.assert_allclose(dual.multipliers, [multiplier], atol=1e-6)
    np.testing.assert_allclose(dual.constraints, [2 * second - 1], atol=1e-6)
    np.testing.assert_allclose(dual.reward, 1 - second, atol=1e-6)
    entropy = -(second * math.log(second) + (1 - second) * math.log(1 - second))
    assert dual.kl == pytest.approx(math.log(2) - entropy, abs=1e-6)


def test_a_bound_that_binds_is_met_and_one_that_does_not_costs_nothing() -> None:
    random = np.random.default_rng(0)
    rewards = [random.normal(size=64) for _ in range(30)]
    constraints = [random.normal(size=(2, 64)) for _ in range(30)]
    dual = solve_dual(rewards, constraints, [0.4, -1.0], beta=0.5)
    assert dual.multipliers[0] > 0
    assert dual.multipliers[1] == 0
    assert dual.constraints[0] == pytest.approx(0.4, abs=1e-6)
    assert dual.constraints[1] > -1.0
    # Whoever adds a number to a prompt's rewards, or to all of g and its bound, asks for the same.
    moved = [r + i for i, r in enumerate(rewards)]
    same = solve_dual(moved, [g + 3 for g in constraints], [3.4, 2.0], beta=0.5)
    np.testing.assert_allclose(same.multipliers, dual.multipliers, atol=1e-5)


def test_two_bounds_are_met_together() -> None:
    random = np.random.default_rng(1)
    rewards, constraints = [random.normal(size=50)] * 3, [random.normal(size=(2, 50))] * 3
    dual = solve_dual(rewards, constraints, [0.5, 0.5], beta=0.2)
    np.testing.assert_allclose(dual.constraints, [0.5, 0.5], atol=1e-5)


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_a_bound_out_of_reach_is_named(bound: float) -> None:
    with pytest.raises(
        InputError, match=rf"the bound {bound:g} of 'short' is out of reach.*gives 1 on the mean"
    ):
        solve_dual(*ONE, [bound], beta=1.0, names=["short"])


def test_bounds_that_exclude_each_other_are_refused() -> None:
    both = [np.array([[-1.0, 1.0], [1.0, -1.0]])]
    with pytest.raises(InputError, match=r"all of the bounds 0.5, 0.5 together"):
        solve_dual([np.array([1.0, 0.0])], both, [0.5, 0.5], beta=1.0)


def test_a_price_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"beta = 0.*> 0"):
        solve_dual(*ONE, [0.5], beta=0.0)


def test_without_scipy_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimepo.onpolicy.dual.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"slimepo\[relabel\]"):
        solve_dual(*ONE, [0.5], beta=1.0)


def test_labels_are_those_of_bradley_and_terry() -> None:
    np.testing.assert_allclose(preferred(np.array([[0.0, math.log(3)], [5.0, 5.0]])), [0.75, 0.5])
