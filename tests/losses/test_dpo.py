"""Objectives on log-ratios: numbers worked by hand, limits, and what ties them to each other."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses import chi_po, dpo, ipo, lpo, rpo, xpo
from slimepo.types import LossOutput, PairLogps
from tests.losses.problems import pairs_of, ratios_of, sigmoid, softplus

log_ratios = st.floats(-30, 30)
betas = st.floats(0.01, 5)

# r(w) = (-1 - 2) - (-2 - 3) = 2 over two tokens, r(l) = -4 - (-1) = -3 over one.
POLICY = pairs_of([[-1.0, -2.0]], [[-4.0]])
REFERENCE = pairs_of([[-2.0, -3.0]], [[-1.0]])


def slopes(output: LossOutput, policy: PairLogps) -> tuple[Tensor, Tensor]:
    chosen, rejected = torch.autograd.grad(output.loss.sum(), [policy.chosen, policy.rejected])
    return chosen, rejected


class TestDPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # h = 0.1 * (2 - -3) = 0.5.
        output = dpo(POLICY, REFERENCE)
        assert output.loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-14)
        assert output.metrics["rewards/chosen"].item() == pytest.approx(0.2)
        assert output.metrics["rewards/rejected"].item() == pytest.approx(-0.3)
        assert output.metrics["rewards/margins"].item() == pytest.approx(0.5)
        assert output.metrics["rewards/accuracies"].item() == 1

    def test_its_gradient_worked_by_hand(self) -> None:
        # dL/dr(w) = -beta sigma(-h), the same for every token because r is their sum; the other way for r(l).
        chosen, rejected = slopes(dpo(POLICY, REFERENCE), POLICY)
        pull = 0.1 * sigmoid(-0.5)
        assert chosen[0, :2].tolist() == pytest.approx([-pull, -pull], rel=1e-14)
        assert rejected[0, :1].tolist() == pytest.approx([pull], rel=1e-14)

    @given(betas, st.floats(0, 0.49))
    def test_at_the_reference_it_is_log_2(self, beta: float, smoothing: float) -> None:
        loss = dpo(POLICY, POLICY, beta=beta, label_smoothing=smoothing).loss
        assert loss.item() == pytest.approx(math.log(2), rel=1e-14)

    def test_label_smoothing_worked_by_hand(self) -> None:
        # h = 0.5 and a quarter of the labels wrong: 0.75 softplus(-0.5) + 0.25 softplus(0.5).
        loss = dpo(POLICY, REFERENCE, label_smoothing=0.25).loss
        assert loss.item() == pytest.approx(0.75 * softplus(-0.5) + 0.25 * softplus(0.5), rel=1e-14)

    @given(st.floats(0.01, 0.49))
    def test_with_smoothing_the_best_margin_is_finite(self, smoothing: float) -> None:
        # (1 - e) sigma(-h) = e sigma(h) at h = log((1 - e) / e).
        best = math.log((1 - smoothing) / smoothing)
        policy, reference = ratios_of(best, 0.0)
        chosen, _ = slopes(dpo(policy, reference, beta=1.0, label_smoothing=smoothing), policy)
        assert chosen[0, 0].item() == pytest.approx(0, abs=1e-13)

    @given(log_ratios, log_ratios)
    def test_exchanging_the_answers_costs_the_margin(self, w: float, r: float) -> None:
        # -log sigma(-h) - (-log sigma(h)) = h.
        straight, swapped = (dpo(*ratios_of(*sides)).loss.item() for sides in ((w, r), (r, w)))
        assert swapped - straight == pytest.approx(0.1 * (w - r), abs=1e-12)

    @given(log_ratios, log_ratios, log_ratios)
    def test_what_both_answers_gain_alike_does_not_count(self, w: float, r: float, shift: float) -> None:
        assert dpo(*ratios_of(w + shift, r + shift)).loss.item() == pytest.approx(
            dpo(*ratios_of(w, r)).loss.item(), rel=1e-12, abs=1e-12
        )


class TestRPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # DPO's loss at h = 0.5, and eta times the mean of 1 and 2.
        output = rpo(POLICY, REFERENCE)
        assert output.loss.item() == pytest.approx(softplus(-0.5) + 0.2 * 1.5, rel=1e-14)
        assert output.metrics["loss/preference"].item() == pytest.approx(softplus(-0.5), rel=1e-14)
        assert output.metrics["loss/nll"].item() == pytest.approx(0.3, rel=1e-14)

    @given(log_ratios, log_ratios, betas)
    def test_without_the_anchor_it_is_dpo(self, w: float, r: float, beta: float) -> None:
        pair = ratios_of(w, r)
        assert rpo(*pair, beta=beta, eta=0).loss.item() == dpo(*pair, beta=beta).loss.item()

    def test_the_anchor_pulls_every_chosen_token_alike(self) -> None:
        with_anchor, without = (slopes(rpo(POLICY, REFERENCE, eta=eta), POLICY)[0] for eta in (0.2, 0))
        assert (with_anchor - without)[0, :2].tolist() == pytest.approx([-0.1, -0.1], rel=1e-13)


class TestXPO:
    @pytest.mark.parametrize(("opponent", "logp", "slope"), [((0, 1), -4.0, (0, 1)), ((1, 0), -3.0, (1, 0))])
    def test_dpo_and_the_log_prob_of_the_opponents_answer(
        self, opponent: tuple[int, int], logp: float, slope: tuple[int, int]
    ) -> None:
        """h = .5 (2 - -3): -log sigma(2.5) whichever of the two the opponent wrote, and .01 times its log pi."""
        output = xpo(POLICY, REFERENCE, torch.tensor([opponent]), beta=0.5, alpha=0.01)
        assert output.loss.item() == pytest.approx(softplus(-2.5) + 0.01 * logp)
        assert output.metrics["loss/exploration"].item() == pytest.approx(0.01 * logp)
        # Both tokens of the chosen response, and the one of the rejected response.
        pull = 0.5 * sigmoid(-2.5)
        chosen, rejected = slopes(output, POLICY)
        assert chosen[0, :2].tolist() == pytest.approx([-pull + 0.01 * slope[0]] * 2)
        assert rejected[0, :1].tolist() == pytest.approx([pull + 0.01 * slope[1]])


class TestChiPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # phi(2) = e^2 + 2 and phi(-3) = e^-3 - 3.
        margin = 0.1 * (math.exp(2) + 2 - math.exp(-3) + 3)
        output = chi_po(POLICY, REFERENCE)
        assert output.loss.item() == pytest.approx(softplus(-margin), rel=1e-14)
        assert output.metrics["rewards/rejected"].item() == pytest.approx(0.1 * (math.exp(-3) - 3), rel=1e-14)

    def test_above_the_clip_the_exponential_stands_still(self) -> None:
        # Both answers above the clip: the exponentials cancel, and what is left is DPO's margin.
        pair = ratios_of(2.0, 1.5)
        assert chi_po(*pair, clip_high=1.0).loss.item() == pytest.approx(dpo(*pair).loss.item(), rel=1e-14)

    def test_below_the_clip_too(self) -> None:
        pair = ratios_of(-2.0, -2.5)
        loss = chi_po(*pair, clip_low=-1.0).loss.item()
        assert loss == pytest.approx(dpo(*pair).loss.item(), rel=1e-14)
        assert chi_po(*pair).loss.item() < loss

    def test_the_default_clip_is_20_nats(self) -> None:
        # Above it the slope of phi is 1 again, as in DPO; below it e^r + 1.
        policy, reference = ratios_of(20.01, 20.01)
        assert slopes(chi_po(policy, reference), policy)[0][0, 0].item() == pytest.approx(-0.05, rel=1e-12)
        policy, reference = ratios_of(19.99, 19.99)
        slope = slopes(chi_po(policy, reference), policy)[0][0, 0].item()
        assert slope == pytest.approx(-0.05 * (math.exp(19.99) + 1), rel=1e-12)

    @given(st.floats(-30, -12), st.floats(-30, -12))
    def test_where_both_answers_have_become_unlikely_it_is_dpo(self, w: float, r: float) -> None:
        pair = ratios_of(w, r)
        assert chi_po(*pair).loss.item() == pytest.approx(dpo(*pair).loss.item(), abs=1e-6)


class TestIPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # Means per token: 2 / 2 = 1 and -3, the margin 4 against 1 / (2 * 0.1) = 5.
        output = ipo(POLICY, REFERENCE)
        assert output.loss.item() == pytest.approx((4 - 5) ** 2, rel=1e-14)
        assert output.metrics["rewards/chosen"].item() == pytest.approx(0.1)

    def test_sums_on_request(self) -> None:
        # The margin of sums is 2 + 3 = 5: the minimum.
        assert ipo(POLICY, REFERENCE, length_normalized=False).loss.item() == pytest.approx(0, abs=1e-24)

    @given(log_ratios, st.floats(0.02, 2))
    def test_the_minimum_is_at_half_of_one_over_tau(self, rejected: float, tau: float) -> None:
        policy, reference = ratios_of(rejected + 1 / (2 * tau), rejected)
        output = ipo(policy, reference, tau=tau)
        assert output.loss.item() == pytest.approx(0, abs=1e-20)
        assert slopes(output, policy)[0][0, 0].item() == pytest.approx(0, abs=1e-10)
        for nudge in (-0.01, 0.01):
            beside = ratios_of(rejected + 1 / (2 * tau) + nudge, rejected)
            assert ipo(*beside, tau=tau).loss.item() == pytest.approx(1e-4, rel=1e-8)

    def test_gradient_worked_by_hand(self) -> None:
        # 2 (4 - 5) = -2 for the margin, spread over two chosen tokens and one rejected one.
        chosen, rejected = slopes(ipo(POLICY, REFERENCE), POLICY)
        assert chosen[0, :2].tolist() == pytest.approx([-1, -1], rel=1e-13)
        assert rejected[0, :1].tolist() == pytest.approx([2], rel=1e-13)


class TestLPO:
    """Its gradient is not the slope of its loss, so it is proved side by side with the other side held constant."""

    def test_a_pair_worked_by_hand(self) -> None:
        # x1 = 1, x2 = -3, o = 1 / 0.4 = 2.5: both distances are |1 + 3 - 2.5| = 1.5; 4 * 0.2 / 1.8 * (1 + 0.8) = 0.8.
        output = lpo(POLICY, REFERENCE)
        assert output.loss.item() == pytest.approx(0.8 * 1.5, rel=1e-14)
        assert output.metrics["loss/hinge"].item() == 0

    def test_the_hinge_worked_by_hand(self) -> None:
        # x1 = -0.5 and x2 = 0: distance |-0.5 - 2.5| = 3, and 5 * 0.5 for having become less likely.
        output = lpo(*ratios_of(-0.5, 0.0))
        assert output.metrics["loss/preference"].item() == pytest.approx(0.8 * 3, rel=1e-13)
        assert output.metrics["loss/hinge"].item() == pytest.approx(2.5, rel=1e-13)

    @given(log_ratios, log_ratios, st.floats(0.05, 2), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 9))
    def test_gradient_in_closed_form(
        self, x1: float, x2: float, beta: float, r1: float, r2: float, g: float
    ) -> None:
        policy, reference = ratios_of(x1, x2)
        # As the log-ratios are after rounding, so that no kink is crossed.
        x1, x2 = policy.chosen[0, 0].item() + 40, policy.rejected[0, 0].item() + 40
        output = lpo(policy, reference, beta=beta, chosen_rate=r1, rejected_rate=r2, hinge_weight=g)
        chosen, rejected = slopes(output, policy)
        distance = x1 - x2 - 1 / (2 * beta)
        side = math.copysign(1, distance) if abs(distance) > 1e-9 else 0
        if side == 0 or x1 == 0:
            return
        factor = 4 * beta / (r1 + r2)
        assert chosen[0, 0].item() == pytest.approx(factor * r1 * side - g * (x1 < 0), rel=1e-12, abs=1e-12)
        assert rejected[0, 0].item() == pytest.approx(-factor * r2 * side, rel=1e-12)

    @settings(max_examples=20)
    @given(st.integers(0, 10_000))
    def test_each_side_has_the_slope_of_its_own_term(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Three chosen and two rejected tokens a pair: policy chosen, rejected, reference chosen, rejected.
        shapes = [(4, 3), (4, 2), (4, 3), (4, 2)]
        w, r, ref_w, ref_r = (
            -4 * torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )
        ones_w, ones_r = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)
        w.requires_grad_(), r.requires_grad_()

        def apart(w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            """The loss as a function of the chosen side alone, and of the rejected side alone: no stopped gradient."""
            x1, x2 = (w - ref_w).mean(-1), (r - ref_r).mean(-1)
            still_1, still_2 = (w0 - ref_w).mean(-1), (r0 - ref_r).mean(-1)
            factor = 2 * 0.2 * 2 / (1.0 + 0.8)
            moves_chosen = factor * (x1 - still_2 - 2.5).abs() + 5 * (-x1).clamp(min=0)
            moves_rejected = factor * 0.8 * (still_1 - x2 - 2.5).abs()
            return moves_chosen.sum(), moves_rejected.sum()

        w0, r0 = w.detach().clone(), r.detach().clone()
        # Both terms are functions whose slope autograd knows, by finite differences...
        assert torch.autograd.gradcheck(lambda x: apart(x, r0)[0], (w,), eps=1e-7)
        assert torch.autograd.gradcheck(lambda x: apart(w0, x)[1], (r,), eps=1e-7)
        # ... and their values and slopes are the objective's.
        output = lpo(PairLogps(w, ones_w, r, ones_r), PairLogps(ref_w, ones_w, ref_r, ones_r))
        terms = apart(w, r)
        torch.testing.assert_close(output.loss.sum(), sum(terms), rtol=1e-13, atol=0)
        for side, term in ((w, terms[0]), (r, terms[1])):
            (actual,) = torch.autograd.grad(output.loss.sum(), side, retain_graph=True)
            (expected,) = torch.autograd.grad(term, side, retain_graph=True)
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)

    def test_equal_rates_without_hinge_share_the_offset(self) -> None:
        # Then the loss is 2 beta * 2 |x1 - x2 - o|, and its minimum the margin IPO aims at with tau = beta.
        policy, reference = ratios_of(3.0, 3.0 - 2.5)
        assert lpo(policy, reference, rejected_rate=1.0, hinge_weight=0).loss.item() == pytest.approx(
            0, abs=1e-13
        )
        assert ipo(policy, reference, tau=0.2).loss.item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        (dpo, {"beta": 0}, "beta.*> 0"),
        (dpo, {"label_smoothing": -0.1}, "label_smoothing.*>= 0"),
        (dpo, {"label_smoothing": 0.5}, "label_smoothing.*below 0.5"),
        (rpo, {"eta": -1}, "eta.*>= 0"),
        (rpo, {"beta": math.nan}, "beta"),
        (chi_po, {"beta": -1}, "beta.*> 0"),
        (chi_po, {"clip_low": 30}, "clip_high.*> 30"),
        (chi_po, {"clip_high": 90}, "clip_high.*80"),
        (chi_po, {"clip_low": -math.inf}, "clip_low"),
        (ipo, {"tau": 0}, "tau.*> 0"),
        (lpo, {"beta": 0}, "beta.*> 0"),
        (lpo, {"chosen_rate": 0}, "chosen_rate.*> 0"),
        (lpo, {"rejected_rate": -1}, "rejected_rate.*> 0"),
        (lpo, {"hinge_weight": -1}, "hinge_weight.*>= 0"),
    ],
)
def test_bad_hyperparameters_are_named_with_their_range(
    objective: Callable[..., LossOutput], options: dict[str, float], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        objective(POLICY, REFERENCE, **options)
