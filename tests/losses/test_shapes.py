"""The shapes of dpo, worked by hand from their papers' formulas."""

import math

import pytest
import torch

from slimepo.errors import InputError
from slimepo.losses import dpo
from slimepo.losses.shapes import SHAPES
from slimepo.types import PairLogps

BETA, E = 0.5, 0.2
# Log-ratios to the reference: of two tokens each.
R_W, R_L = 1.0, -1.5


def pairs(chosen: float, rejected: float) -> PairLogps:
    """A pair whose answers have these sums of log-probs."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    sides = (torch.tensor([[total, 0.0]], dtype=torch.float64) for total in (chosen, rejected))
    return PairLogps(next(sides).requires_grad_(), mask, next(sides).requires_grad_(), mask)


def loss(r_w: float = R_W, r_l: float = R_L, **options: object) -> float:
    reference = pairs(-3.0, -4.0)
    return dpo(pairs(-3.0 + r_w, -4.0 + r_l), reference, beta=BETA, **options).loss.item()  # type: ignore[arg-type]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigma(x: float) -> float:
    return math.log(sigma(x))


W, L = BETA * R_W, BETA * R_L
H = W - L
BY_HAND = {
    "sigmoid": -log_sigma(H),
    # The margin 1.25 is past 1.
    "hinge": 0.0,
    "robust": (-(1 - E) * log_sigma(H) + E * log_sigma(-H)) / (1 - 2 * E),
    # The divergence of (sigma(h), sigma(-h)) from (1 - e, e).
    "exo_pair": sigma(H) * math.log(sigma(H) / (1 - E)) + sigma(-H) * math.log(sigma(-H) / E),
    "nca_pair": -log_sigma(W) - 0.5 * log_sigma(-W) - 0.5 * log_sigma(-L),
    "bco_pair": -log_sigma(W) - log_sigma(-L),
    "sppo_hard": (R_W - 1 / (2 * BETA)) ** 2 + (R_L + 1 / (2 * BETA)) ** 2,
    "apo_zero": 1 - sigma(W) + sigma(L),
    "apo_down": sigma(W) + 1 - sigma(H),
    "discopop": -log_sigma(H) * (1 - sigma(H / 0.05)) + math.exp(-H) * sigma(H / 0.05),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_of_each_shape(shape: str) -> None:
    smoothing = {"label_smoothing": E} if shape in ("robust", "exo_pair") else {}
    assert loss(shape=shape, **smoothing) == pytest.approx(BY_HAND[shape], rel=1e-12)


def test_a_hinge_inside_its_margin_and_means_over_tokens() -> None:
    assert loss(0.5, 0.0, shape="hinge") == pytest.approx(0.75)
    # Two tokens each: half the rewards.
    assert loss(length_normalized=True) == pytest.approx(-log_sigma(H / 2))


def test_several_with_a_weight_each_and_the_likelihood_of_the_chosen_answer() -> None:
    weights = {"sigmoid": 0.8, "bco_pair": 0.2}
    assert loss(shape=weights) == pytest.approx(0.8 * BY_HAND["sigmoid"] + 0.2 * BY_HAND["bco_pair"])
    output = dpo(pairs(-3.0, -4.0), pairs(-3.0, -4.0), nll_weight=0.5)
    assert output.token_loss["chosen"].tolist() == [1.5]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_value_and_gradient_are_finite_at_the_extremes(shape: str, ratio: float) -> None:
    policy = pairs(-3.0 + ratio, -4.0 - ratio)
    smoothing = 0.1 if shape == "exo_pair" else 0.0
    output = dpo(policy, pairs(-3.0, -4.0), shape=shape, label_smoothing=smoothing)
    output.loss.sum().backward()
    for value in (output.loss, policy.chosen.grad, policy.rejected.grad):
        assert value is not None
        assert torch.isfinite(value).all()


def test_what_a_shape_does_not_know_is_refused() -> None:
    with pytest.raises(
        InputError, match="label_smoothing is of sigmoid, robust, exo_pair, not of shape 'hinge'"
    ):
        loss(shape="hinge", label_smoothing=0.1)
    with pytest.raises(InputError, match="'exo_pair' needs a label_smoothing above 0"):
        loss(shape="exo_pair")
    with pytest.raises(InputError, match="shape = 'hing' is unknown: give one of sigmoid, hinge"):
        loss(shape="hing")
