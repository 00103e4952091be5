"""Objectives on log-ratios: numbers worked by hand, limits, and what ties them to each other."""

import math
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.losses import LOSSES, chi_po, discopop, dpo, exo_pair, hinge, ipo, robust
from slimepo.types import LossOutput
from tests.losses.problems import POLICY, REFERENCE, pairs_of, ratios_of, sigmoid, slopes, softplus

log_ratios = st.floats(-30, 30)
betas = st.floats(0.01, 5)


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


class TestKin:
    """Other losses of the same margin: with beta = 0.5, h = 0.5 * (2 - -3) = 2.5."""

    H, E = 2.5, 0.25

    def test_robust_worked_by_hand(self) -> None:
        loss = robust(POLICY, REFERENCE, beta=0.5, label_smoothing=self.E).loss.item()
        assert loss == pytest.approx((0.75 * softplus(-self.H) - 0.25 * softplus(self.H)) / 0.5, rel=1e-13)

    @given(log_ratios, log_ratios, st.floats(0, 0.49))
    def test_robust_is_dpo_on_average_over_flips(self, w: float, r: float, e: float) -> None:
        # What it is for (arXiv 2403.00409): (1 - e) L(h) + e L(-h) = -log sigma(h).
        right, flipped = (
            robust(*ratios_of(*sides), label_smoothing=e).loss.item() for sides in ((w, r), (r, w))
        )
        assert (1 - e) * right + e * flipped == pytest.approx(dpo(*ratios_of(w, r)).loss.item(), abs=1e-10)

    def test_exo_worked_by_hand(self) -> None:
        right, wrong = sigmoid(self.H), sigmoid(-self.H)
        kl = right * math.log(right / 0.75) + wrong * math.log(wrong / 0.25)
        loss = exo_pair(POLICY, REFERENCE, beta=0.5, label_smoothing=self.E).loss.item()
        assert loss == pytest.approx(kl, rel=1e-13)

    @given(st.floats(0.001, 0.49))
    def test_exo_is_0_at_its_best_margin(self, e: float) -> None:
        pair = ratios_of(math.log((1 - e) / e), 0.0)
        assert exo_pair(*pair, beta=1.0, label_smoothing=e).loss.item() == pytest.approx(0, abs=1e-12)

    def test_hinge_worked_by_hand(self) -> None:
        # 0.1 * 5 is inside the margin of 1, 0.5 * 5 past it, where no slope is left.
        assert hinge(POLICY, REFERENCE).loss.item() == pytest.approx(0.5, rel=1e-13)
        output = hinge(POLICY, REFERENCE, beta=0.5)
        assert output.loss.item() == 0
        assert not any(slope.any() for slope in slopes(output, POLICY))

    def test_discopop_worked_by_hand(self) -> None:
        # h = 0.1 * 5 = 0.5 and a blend as wide as that: s = sigma(1).
        s = sigmoid(1.0)
        loss = discopop(POLICY, REFERENCE, temperature=0.5).loss.item()
        assert loss == pytest.approx((1 - s) * softplus(-0.5) + s * math.exp(-0.5), rel=1e-13)

    def test_sigmoid_norm_is_dpo_on_means(self) -> None:
        # 2 / 2 and -3: h = 0.1 * (1 + 3).
        loss = LOSSES["sigmoid_norm"].function(POLICY, REFERENCE, **LOSSES["sigmoid_norm"].preset).loss
        assert loss.item() == pytest.approx(softplus(-0.4), rel=1e-13)


MARGINS = pytest.mark.parametrize(
    "objective", [dpo, robust, exo_pair, hinge, discopop, ipo], ids=lambda objective: objective.__name__
)


class TestWhatIsCompared:
    # f'(u) of the divergences of arXiv 2309.16240, at u = exp(2) and exp(-3).
    F_PRIME: ClassVar = {
        "reverse_kl": lambda u: math.log(u),
        "forward_kl": lambda u: 1 - 1 / u,
        "js_divergence": lambda u: math.log(2 * u / (1 + u)),
        "alpha_divergence": lambda u: (u**-0.7 - 1) / -0.7,
    }

    @pytest.mark.parametrize("name", F_PRIME)
    def test_an_f_divergence_worked_by_hand(self, name: str) -> None:
        f_prime = self.F_PRIME[name]
        options = {"f_divergence": name} | ({"f_alpha": 0.3} if name == "alpha_divergence" else {})
        output = dpo(POLICY, REFERENCE, **options)
        chosen, rejected = 0.1 * f_prime(math.exp(2)), 0.1 * f_prime(math.exp(-3))
        assert output.loss.item() == pytest.approx(softplus(-(chosen - rejected)), rel=1e-12)
        assert output.metrics["rewards/rejected"].item() == pytest.approx(rejected, rel=1e-12)

    @MARGINS
    def test_alpha_1_is_reverse_kl_and_alpha_0_forward_kl(self, objective: Callable[..., LossOutput]) -> None:
        by_alpha = {
            a: objective(POLICY, REFERENCE, f_divergence="alpha_divergence", f_alpha=a).loss for a in (0, 1)
        }
        assert by_alpha[1].item() == objective(POLICY, REFERENCE).loss.item()
        forward = objective(POLICY, REFERENCE, f_divergence="forward_kl").loss.item()
        assert by_alpha[0].item() == pytest.approx(forward, rel=1e-13)

    def test_light_tails_worked_by_hand(self) -> None:
        # The second chosen token stands behind the end of the rejected answer: r(w) = 1 + 0.3 * 1, r(l) = -3.
        assert dpo(POLICY, REFERENCE, ld_alpha=0.3).loss.item() == pytest.approx(softplus(-0.43), rel=1e-13)
        chosen, rejected = slopes(dpo(POLICY, REFERENCE, ld_alpha=0.3), POLICY)
        pull = 0.1 * sigmoid(-0.43)
        assert chosen[0, :2].tolist() == pytest.approx([-pull, -0.3 * pull], rel=1e-13)
        assert rejected[0, :1].tolist() == pytest.approx([pull], rel=1e-13)

    @MARGINS
    def test_answers_of_one_length_have_no_tails(self, objective: Callable[..., LossOutput]) -> None:
        pair = pairs_of([[-1.0, -2.0]], [[-4.0, -1.0]]), pairs_of([[-2.0, -3.0]], [[-1.0, -2.0]])
        assert objective(*pair, ld_alpha=0.0).loss.item() == objective(*pair).loss.item()


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


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        (dpo, {"beta": 0}, "beta.*> 0"),
        (dpo, {"label_smoothing": -0.1}, "label_smoothing.*>= 0"),
        (dpo, {"label_smoothing": 0.5}, "label_smoothing.*>= 0 and < 0.5"),
        (dpo, {"f_divergence": "kl"}, "f_divergence = 'kl' is unknown: give one of reverse_kl, forward_kl"),
        (dpo, {"f_divergence": "alpha_divergence"}, "f_alpha goes with f_divergence: alpha_divergence"),
        (hinge, {"f_alpha": 0.5}, "f_alpha goes with f_divergence: alpha_divergence"),
        (ipo, {"ld_alpha": 1.5}, "ld_alpha.*>= 0 and <= 1"),
        (robust, {"label_smoothing": 0.5}, "label_smoothing.*< 0.5"),
        (exo_pair, {"label_smoothing": 0}, "label_smoothing.*> 0 and < 0.5"),
        (hinge, {"beta": 0}, "beta.*> 0"),
        (discopop, {"temperature": 0}, "temperature.*> 0"),
        (chi_po, {"beta": -1}, "beta.*> 0"),
        (chi_po, {"clip_low": 30}, "clip_high.*> 30"),
        (chi_po, {"clip_high": 90}, "clip_high.*80"),
        (chi_po, {"clip_low": -math.inf}, "clip_low"),
        (ipo, {"tau": 0}, "tau.*> 0"),
    ],
)
def test_bad_hyperparameters_are_named_with_their_range(
    objective: Callable[..., LossOutput], options: dict[str, float], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        objective(POLICY, REFERENCE, **options)
