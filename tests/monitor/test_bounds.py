"""How much of SLIME's two bounds is used: worked by hand on two pairs, and what is said of it."""

import numpy as np
import pytest

from slimepo.losses import hyperparameters, slime
from slimepo.monitor.bounds import bound_figures, bounded, bounds_fact
from slimepo.monitor.displacement import SideScores
from tests.losses.problems import sigmoid, softplus

OPTIONS = hyperparameters(slime)


def side(*answers: list[float]) -> SideScores:
    arrays = [np.array(answer) for answer in answers]
    return SideScores(arrays, arrays, arrays)


def test_what_is_allowed_is_the_floor_and_the_separation_of_the_start_over_the_anchor() -> None:
    start = bound_figures(OPTIONS, side([-1.0, -1.0]), side([-1.0]), None)
    separation, floor = 1.5 * sigmoid(2.5), 0.1 * softplus(1.0 - 1.25) ** 2.5
    assert start["fall_allowed"] == pytest.approx((separation + floor) / 0.1, abs=1e-4)
    assert (start["fell"], start["fall_used"], start["loss_rose"]) == (0.0, 0.0, 0.0)
    loss = 0.1 + separation + floor
    assert start["deep_allowed"] == pytest.approx(loss / (0.1 * softplus(10 - 1.25) ** 2.5), abs=1e-5)

    now = bound_figures(OPTIONS, side([-2.0, -2.0]), side([-4.0, -12.0]), start)
    assert now["fell"] == pytest.approx(1.0)
    assert now["fall_used"] == pytest.approx(1 / start["fall_allowed"], abs=1e-5)
    assert now["deep"] == 0.5
    # That floor alone costs more than the whole loss of the start, so that the bound may be broken.
    assert now["loss_rose"] == 1.0
    assert now["deep_used"] > 1
    assert bounds_fact(now, 1) == (
        "SLIME's loss on 1 training pairs is above that of the start, and so promises nothing."
    )


def test_a_bound_whose_weight_is_nought_is_left_out() -> None:
    found = bound_figures({**OPTIONS, "chosen_weight": 0.0}, side([-1.0]), side([-2.0]), None)
    assert "fell" not in found
    assert "deep" in found
    assert "chosen answers" not in str(bounds_fact(found, 1))


def test_a_floor_whose_slope_is_bounded_allows_more() -> None:
    steep, flat = ({**OPTIONS, "max_slope": slope} for slope in (None, 0.05))
    found = [bound_figures(each, side([-1.0]), side([-2.0]), None)["deep_allowed"] for each in (steep, flat)]
    assert found[0] < found[1] < 1


@pytest.mark.parametrize(
    "other", [{"hard_gate": "linear"}, {"rejected_mean": "token"}, {"length_normalized": False}]
)
def test_readings_for_which_nothing_is_proved_have_no_figures(other: dict[str, object]) -> None:
    assert bounded(OPTIONS)
    assert not bounded({**OPTIONS, **other})


def test_the_words() -> None:
    figures = {"loss_rose": 0.0, "fell": 0.12, "fall_allowed": 13.9, "fall_used": 0.0086, "deep": 0.003,
               "deep_allowed": 0.066, "deep_used": 0.045}  # fmt: skip
    assert bounds_fact(figures, 64) == (
        "SLIME's loss on 64 training pairs rules out that their chosen answers fall by more than 13.9 nats per token "
        "(they fell by 0.12, 0.9% of that), and that more than 6.6% of their rejected tokens are below -10 nats "
        "(0.3% are)."
    )
    assert "(they rose by 0.05), and" in str(bounds_fact({**figures, "fell": -0.05, "fall_used": 0.0}, 64))
    assert "(they rose by 0), and" in str(bounds_fact({**figures, "fell": 0.0, "fall_used": 0.0}, 64))
    # A share of all tokens rules out nothing.
    assert "rejected" not in str(bounds_fact({**figures, "deep_allowed": 1.0}, 64))
    assert bounds_fact({"loss_rose": 0.0}, 64) is None
