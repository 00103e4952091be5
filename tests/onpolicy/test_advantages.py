"""Advantages: numbers worked by hand, from the definitions."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import numpy as np
import pytest

from slimepo.onpolicy.advantages import Array, gae, group_advantages, returns, whitened
from slimepo.onpolicy.settings import Estimator

ONE_OF_FOUR = np.array([[1.0, 0.0, 0.0, 0.0]])


def test_a_group_is_divided_by_the_samples_standard_deviation() -> None:
    # Mean 1/4; squares 9/16 + 3/16 = 3/4, over n - 1 = 3: std 1/2. The population's would be sqrt(3/16): 1.7317.
    found = group_advantages(ONE_OF_FOUR, "group")[0]
    assert found.tolist() == pytest.approx([0.75 / (0.5 + 1e-4), *[-0.25 / (0.5 + 1e-4)] * 3])
    assert found.round(4).tolist() == [1.4997, -0.4999, -0.4999, -0.4999]


def test_centered_is_not_divided() -> None:
    assert group_advantages(ONE_OF_FOUR, "centered").tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_leaving_one_out_is_the_group_mean_times_g_over_g_minus_1() -> None:
    # The others of the first have the mean 0, those of the rest 1/3.
    assert group_advantages(ONE_OF_FOUR, "leave-one-out")[0].tolist() == pytest.approx([1, *[-1 / 3] * 3])
    rewards = np.random.default_rng(0).normal(size=(5, 6))
    by_hand = [[row[i] - np.delete(row, i).mean() for i in range(6)] for row in rewards]
    np.testing.assert_allclose(group_advantages(rewards, "leave-one-out"), by_hand, rtol=1e-12)
    np.testing.assert_allclose(
        group_advantages(rewards, "leave-one-out"), 6 / 5 * group_advantages(rewards, "centered"), rtol=1e-12
    )


@pytest.mark.parametrize("estimator", ["group", "centered", "leave-one-out", "baseline-returns"])
def test_what_does_not_count_changes_nothing_for_the_others(estimator: Estimator) -> None:
    with_gaps = np.array([[1.0, math.nan, 0.0, 0.5], [math.nan, math.nan, math.nan, 2.0], [math.nan] * 4])
    found = group_advantages(with_gaps, estimator)
    assert (np.isnan(found) == np.isnan(with_gaps)).all()
    alone = group_advantages(np.array([[1.0, 0.0, 0.5]]), estimator)[0]
    assert found[0, [0, 2, 3]].tolist() == pytest.approx(alone.tolist())
    assert found[1, 3] == 0, "there is nothing to compare it with"


@pytest.mark.parametrize("estimator", ["group", "centered", "leave-one-out", "baseline-returns"])
def test_equal_rewards_say_nothing(estimator: Estimator) -> None:
    assert group_advantages(np.full((2, 3), 0.5), estimator).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_returns_are_the_rewards_themselves() -> None:
    assert group_advantages(ONE_OF_FOUR, "returns").tolist() == ONE_OF_FOUR.tolist()


def test_a_token_gets_what_is_still_to_come() -> None:
    # Penalties of a token each and the reward with the last one: 2 - 1 - .5 - .25, 2 - .5 - .25, 2 - .25.
    long, short, nothing = returns(
        [2.0, -1.0, 5.0], [np.array([-1.0, -0.5, -0.25]), np.zeros(1, dtype=np.float32), np.zeros(0)]
    )
    assert long.tolist() == [0.25, 1.25, 1.75]
    assert short.tolist() == [-1.0]
    assert short.dtype == np.float64
    assert nothing.tolist() == []


class TestWhitening:
    # Groups [1, 0] and [1, 1] without their means: .5, -.5, 0, 0, for answers of 2, 1, 1 and 4 tokens.
    VALUES = tuple(np.full(n, v) for n, v in ((2, 0.5), (1, -0.5), (1, 0.0), (4, 0.0)))

    def test_over_all_tokens_with_the_populations_variance(self) -> None:
        # Mean (2 * .5 - .5) / 8 = .0625; variance (3 * .25) / 8 - .0625^2 = .08984, std .29974.
        std = math.sqrt(0.75 / 8 - 0.0625**2)
        assert std == pytest.approx(0.29974, abs=1e-5)
        found = whitened(self.VALUES)
        assert [len(v) for v in found] == [2, 1, 1, 4]
        by_hand = [(v - 0.0625) / std for v in (0.5, -0.5, 0.0, 0.0)]
        assert [v[0] for v in found] == pytest.approx(by_hand)
        assert np.round(by_hand, 4).tolist() == [1.4596, -1.8766, -0.2085, -0.2085]

    def test_a_group_that_is_all_right_is_pushed_down(self) -> None:
        """A property of the method: the mean over tokens is not that over answers."""
        assert max(whitened(self.VALUES)[3]) < 0

    def test_over_ranks_it_is_what_one_rank_would_find(self) -> None:
        # Two ranks with 3 and 5 tokens: what each adds up is the sum of both.
        parts = [self.VALUES[:2], self.VALUES[2:]]
        with ThreadPoolExecutor(2) as ranks:
            together, sums = Barrier(2), [np.zeros(0), np.zeros(0)]

            def add_up(rank: int, mine: Array) -> Array:
                sums[rank] = mine
                together.wait()
                total = sums[0] + sums[1]
                together.wait()
                return total

            found = ranks.map(lambda rank: whitened(parts[rank], partial(add_up, rank)), (0, 1))
            ours = np.concatenate([*itertools.chain(*found)])
        np.testing.assert_allclose(ours, np.concatenate(whitened(self.VALUES)), rtol=1e-12)

    def test_a_rank_without_tokens_takes_part(self) -> None:
        calls: list[Array] = []

        def add_up(sums: Array) -> Array:
            calls.append(sums)
            return sums

        assert whitened([], add_up) == []
        assert len(calls) == 2

    def test_equal_values_are_no_nan(self) -> None:
        # The least variance is 1e-8.
        assert [v.tolist() for v in whitened([np.full(2, 3.0), np.full(1, 3.0)])] == [[0, 0], [0]]

    def test_large_values_keep_their_digits(self) -> None:
        found = np.concatenate(whitened([1e8 + v for v in self.VALUES]))
        np.testing.assert_allclose(found, np.concatenate(whitened(self.VALUES)), rtol=1e-6)


class TestGAE:
    def test_three_tokens_worked_by_hand(self) -> None:
        # Surprises .6 - .5, .7 - .6, 1 - .7; from the back .3, .1 + .95 * .3, .1 + .95 * .385.
        found = gae(np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.6, 0.7]))
        assert found.tolist() == pytest.approx([0.46575, 0.385, 0.3], rel=1e-12)

    def test_decay_1_is_the_return_minus_the_value_and_0_the_surprise(self) -> None:
        rewards, values = np.random.default_rng(0).normal(size=(2, 6))
        whole = rewards[::-1].cumsum()[::-1] - values
        np.testing.assert_allclose(gae(rewards, values, decay=1.0), whole, rtol=1e-10)
        np.testing.assert_allclose(
            gae(rewards, values, decay=0.0), rewards + np.append(values[1:], 0) - values, rtol=1e-12
        )

    def test_a_discount_shrinks_what_comes_later(self) -> None:
        # .5 * .7 - .5; 1 - .7; .5 * .95 * .3 more for the first.
        found = gae(np.array([0.0, 1.0]), np.array([0.5, 0.7]), discount=0.5)
        assert found.tolist() == pytest.approx([-0.15 + 0.475 * 0.3, 0.3])
