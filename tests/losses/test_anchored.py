"""Objectives that hold the chosen answer up: numbers worked by hand, limits, and what ties them to others."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses import cal_dpo, dpo, dpo_shift, dpop, ipo, lpo, rpo
from slimepo.types import LossOutput, PairLogps
from tests.losses.problems import POLICY, REFERENCE, ratios_of, slopes, softplus

log_ratios = st.floats(-30, 30)
betas = st.floats(0.01, 5)


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


class TestDPOP:
    @given(log_ratios, log_ratios, st.floats(0, 60))
    def test_nats_that_the_chosen_answer_lost_cost_margin(self, w: float, r: float, penalty: float) -> None:
        policy, reference = ratios_of(w, r)
        # As the log-ratios are after rounding.
        w, r = policy.chosen[0, 0].item() + 40, policy.rejected[0, 0].item() + 40
        output = dpop(policy, reference, beta=0.3, penalty=penalty)
        margin = 0.3 * (w - r - penalty * max(0.0, -w))
        assert output.loss.item() == pytest.approx(softplus(-margin), rel=1e-12, abs=1e-12)
        assert output.metrics["penalized"].item() == float(w < 0)

    def test_its_gradient_worked_by_hand(self) -> None:
        # Chosen lost 2 nats: h = 0.3 * (-2 + 1 - 50 * 2) = -30.3, and every lost nat pulls 51 times.
        policy, reference = ratios_of(-2.0, -1.0)
        chosen, rejected = slopes(dpop(policy, reference), policy)
        assert chosen[0, 0].item() == pytest.approx(-0.3 * 51 * (1 - math.exp(-30.3)), rel=1e-12)
        assert rejected[0, 0].item() == pytest.approx(0.3 * (1 - math.exp(-30.3)), rel=1e-12)


class TestCalDPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # r = 2 and -3, to be 5 and -5: softplus(-5) + 0.5 * (9 + 4).
        output = cal_dpo(POLICY, REFERENCE)
        assert output.loss.item() == pytest.approx(softplus(-5) + 6.5, rel=1e-14)
        assert output.metrics["loss/calibration"].item() == pytest.approx(6.5, rel=1e-14)

    @given(st.floats(0.02, 2))
    def test_at_its_aim_the_margin_alone_is_left(self, beta: float) -> None:
        # A margin of 1 / beta, beyond which the calibration pulls back.
        loss = cal_dpo(*ratios_of(1 / (2 * beta), -1 / (2 * beta)), beta=beta).loss.item()
        assert loss == pytest.approx(softplus(-1 / beta), rel=1e-9, abs=1e-12)


class TestDPOShift:
    def test_a_pair_worked_by_hand(self) -> None:
        # 0.1 * (2 + 0.75 * 3) = 0.425; the rejected side has 0.75 of the slope.
        output = dpo_shift(POLICY, REFERENCE)
        assert output.loss.item() == pytest.approx(softplus(-0.425), rel=1e-14)
        chosen, rejected = slopes(output, POLICY)
        assert rejected[0, 0].item() == pytest.approx(-0.75 * chosen[0, 0].item(), rel=1e-14)

    @given(log_ratios, log_ratios)
    def test_with_a_share_of_1_it_is_dpo(self, w: float, r: float) -> None:
        pair = ratios_of(w, r)
        assert dpo_shift(*pair, rejected_share=1).loss.item() == dpo(*pair).loss.item()


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
        (rpo, {"eta": -1}, "eta.*>= 0"),
        (rpo, {"beta": math.nan}, "beta"),
        (dpop, {"penalty": -1}, "penalty.*>= 0"),
        (dpop, {"beta": 0}, "beta.*> 0"),
        (cal_dpo, {"beta": 0}, "beta.*> 0"),
        (cal_dpo, {"calibration_weight": -1}, "calibration_weight.*>= 0"),
        (dpo_shift, {"beta": 0}, "beta.*> 0"),
        (dpo_shift, {"rejected_share": 0}, "rejected_share.*> 0 and <= 1"),
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
