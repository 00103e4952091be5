"""The bounds of docs/guarantees.md, for any log-probs and any hyperparameters, and what they are worth in numbers."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimepo.losses import slime
from slimepo.types import PairLogps
from tests.losses.problems import random_pairs, sigmoid, softplus

weights = st.floats(0.01, 3)
seeds = st.integers(0, 10_000)
TERMS = ("loss/chosen", "loss/rejected", "loss/distance")


def terms(policy: PairLogps, **options: float) -> tuple[float, float, float, float]:
    """The loss and its three terms, means over the pairs."""
    output = slime(policy, **options)  # type: ignore[arg-type]
    return output.loss.mean().item(), *(output.metrics[term].mean().item() for term in TERMS)  # type: ignore[return-value]


@settings(max_examples=50)
@given(seeds, seeds, st.floats(0.5, 8), weights, weights, weights)
def test_chosen_answers_fall_by_no_more_than_the_floor_and_the_separation_of_the_start(
    before: int, after: int, scale: float, w: float, floor: float, distance: float
) -> None:
    options = {"chosen_weight": w, "rejected_weight": floor, "distance_weight": distance}
    start, end = random_pairs(4, before), random_pairs(4, after, scale)
    (loss_0, _, floor_0, distance_0), (loss, *_) = terms(start, **options), terms(end, **options)
    assume(loss <= loss_0)
    fell = (slime(start).metrics["logps/chosen"] - slime(end).metrics["logps/chosen"]).mean().item()
    assert fell <= (floor_0 + distance_0) / w + 1e-12


@settings(max_examples=50)
@given(seeds, seeds, st.floats(0.5, 60), st.floats(1.3, 40), weights, st.floats(1, 3))
def test_no_more_rejected_tokens_fall_through_the_floor_than_the_loss_of_the_start_allows(
    before: int, after: int, scale: float, c: float, floor: float, exponent: float
) -> None:
    options = {"rejected_weight": floor, "exponent": exponent}
    end = random_pairs(4, after, scale)
    (loss, *_), (loss_0, *_) = terms(end, **options), terms(random_pairs(4, before, 30.0), **options)
    assume(loss <= loss_0)
    below = (end.rejected < -c) & end.rejected_mask
    share = (below.sum(-1) / end.rejected_mask.sum(-1)).mean().item()
    assert share <= loss_0 / (floor * softplus(c - 1.25) ** exponent) + 1e-12


@settings(max_examples=50)
@given(seeds, st.floats(-3, 3), weights, weights)
def test_a_step_raises_the_chosen_answer_exactly_below_the_bound(
    seed: int, margin: float, w: float, distance: float
) -> None:
    """Log-probs are linear in the parameters here, so that their gradients are any two vectors."""
    generator = torch.Generator().manual_seed(seed)
    g_w, g_l = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    chosen, rejected = (-5.0 + g_w @ theta).view(1, 1), (-5.0 - margin + g_l @ theta).view(1, 1)
    policy = PairLogps(chosen, mask, rejected, mask)
    loss = slime(policy, chosen_weight=w, distance_weight=distance, rejected_weight=0.0).loss.sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    rises = -(gradient @ g_w).item()
    pull = distance * separation(margin)
    ratio = (g_w @ g_l / g_w.square().sum()).item()
    assume(pull == 0 or abs(ratio - 1 - w / pull) > 1e-9)
    assert (rises > 0) == (pull == 0 or ratio < 1 + w / pull)


def separation(margin: float) -> float:
    """-dL_dist / dDelta at a margin (Appendix A of arXiv 2602.02383), for a weight of 1."""
    room, gate = 1.5 - margin, sigmoid(-2.5 * (margin - 1))
    return gate + 2.5 * room * gate * (1 - gate) if room > 0 else 0.0


def test_what_the_bounds_are_worth() -> None:
    start = 1.5 * sigmoid(2.5)
    assert start == pytest.approx(1.386, abs=5e-4)
    assert start / 0.1 == pytest.approx(13.9, abs=0.05)
    assert start / 0.5 == pytest.approx(2.8, abs=0.05)
    shares = [(0.1 + start) / (0.1 * softplus(c - 1.25) ** 2.5) for c in (5, 10, 20, 30)]
    assert shares == pytest.approx([0.54, 0.066, 0.0098, 0.0034], rel=0.02)
    margins = np.linspace(-3, 1.5, 45_001)
    pulls = np.array([separation(margin) for margin in margins])
    assert (pulls.max(), margins[pulls.argmax()]) == pytest.approx((1.2309, 0.331), abs=1e-3)
    assert 0.1 / pulls.max() == pytest.approx(0.081, abs=5e-4)
    slack = 0.1 / pulls[:-1]
    for margin, wanted in ((1.0, 0.12), (1.4, 0.31), (1.499, 0.45)):
        assert slack[np.abs(margins[:-1] - margin).argmin()] == pytest.approx(wanted, abs=0.01)
