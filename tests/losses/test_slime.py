"""SLIME against the paper's equations: numbers worked by hand, Appendix A's gradients, numerics, limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.losses import count, slime, step_loss
from tests.losses.problems import pairs_of, sigmoid, softplus


def paper_loss(chosen: list[float], rejected: list[float]) -> float:
    """Eq. 5-10 in plain Python with the paper's hyperparameters."""
    mean_w, mean_l = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
    delta = mean_w - mean_l
    anchor = -0.1 * mean_w
    floor = 0.1 * sum(softplus(-t - 1.25) ** 2.5 for t in rejected) / len(rejected)
    return anchor + floor + max(1.5 - delta, 0.0) * sigmoid(-2.5 * (delta - 1.0))


log_probs = st.floats(-30, 0)
responses = st.lists(log_probs, min_size=1, max_size=7)


class TestValue:
    def test_a_pair_worked_by_hand(self) -> None:
        # bar_l(w) = -1, bar_l(l) = -2, Delta = 1: the sigmoid stands at its middle, u = 0.5, L_dist = 0.25.
        # softplus(0.75) = ln(1 + e^0.75), the same for both rejected tokens.
        floor = 0.1 * math.log(1 + math.exp(0.75)) ** 2.5
        output = slime(pairs_of([[-0.5, -1.5]], [[-2.0, -2.0]]))
        assert output.loss.item() == pytest.approx(0.1 + floor + 0.25, rel=1e-12)
        assert output.metrics["loss/chosen"].item() == pytest.approx(0.1)
        assert output.metrics["loss/rejected"].item() == pytest.approx(floor, rel=1e-12)
        assert output.metrics["loss/distance"].item() == pytest.approx(0.25)

    @given(st.lists(st.tuples(responses, responses), min_size=1, max_size=5))
    def test_equals_the_equations(self, rows: list[tuple[list[float], list[float]]]) -> None:
        output = slime(pairs_of([w for w, _ in rows], [r for _, r in rows]))
        expected = torch.tensor([paper_loss(w, r) for w, r in rows], dtype=torch.float64)
        torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-8, atol=1e-12)

    def test_beyond_the_hard_margin_nothing_is_separated(self) -> None:
        output = slime(pairs_of([[-0.1]], [[-5.0]]))
        assert output.metrics["loss/distance"].item() == 0

    def test_sums_when_not_length_normalized(self) -> None:
        # Sums -2 and -3.5: Delta = 1.5, which is exactly the hard margin.
        output = slime(pairs_of([[-0.5, -1.5]], [[-1.5, -2.0]]), length_normalized=False)
        assert output.metrics["loss/chosen"].item() == pytest.approx(0.2)
        assert output.metrics["loss/distance"].item() == 0

    def test_token_mean_weighs_every_rejected_token_alike(self) -> None:
        policy = pairs_of([[-1.0], [-1.0]], [[-3.0], [-1.0, -1.0, -1.0]])
        output = slime(policy, rejected_mean="token", chosen_weight=0, distance_weight=0)
        f = [softplus(1.75) ** 2.5, softplus(-0.25) ** 2.5]
        assert step_loss(output, count(policy)).item() == pytest.approx(
            0.1 * (f[0] + 3 * f[1]) / 4, rel=1e-12
        )

    @pytest.mark.parametrize(
        ("gate", "expected"),
        [("one", 1.0), ("relu", 0.5), ("linear", 0.5), ("softplus", math.log(1 + math.exp(0.5)))],
    )
    def test_readings_of_the_hard_gate(self, gate: str, expected: float) -> None:
        output = slime(pairs_of([[-1.0]], [[-2.0]]), hard_gate=gate, soft_gate="one")  # type: ignore[arg-type]
        assert output.metrics["loss/distance"].item() == pytest.approx(expected, rel=1e-12)


class TestGradient:
    """Appendix A, in closed form."""

    @settings(max_examples=50)
    @given(responses, responses)
    def test_equals_appendix_a(self, chosen: list[float], rejected: list[float]) -> None:
        policy = pairs_of([chosen], [rejected])
        slime(policy).loss.sum().backward()
        delta = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
        u, v = 1.5 - delta, sigmoid(-2.5 * (delta - 1.0))
        separate = -(v + 2.5 * u * v * (1 - v)) if delta < 1.5 else 0.0
        for t in range(len(chosen)):
            expected = (-0.1 + separate) / len(chosen)
            assert policy.chosen.grad[0, t].item() == pytest.approx(expected, rel=1e-8, abs=1e-14)
        for t, logp in enumerate(rejected):
            x = -logp - 1.25
            push_up = -(0.1 / len(rejected)) * 2.5 * softplus(x) ** 1.5 * sigmoid(x)
            expected = push_up - separate / len(rejected)
            assert policy.rejected.grad[0, t].item() == pytest.approx(expected, rel=1e-8, abs=1e-14)

    def test_anchor_pulls_every_chosen_token_alike(self) -> None:
        policy = pairs_of([[-0.3, -4.0, -0.01, -2.0]], [[-9.0]])
        slime(policy).loss.sum().backward()
        assert policy.chosen.grad[0, :4].tolist() == pytest.approx([-0.025] * 4)


class TestSlope:
    """`max_slope`, a cap on the floor's gradient."""

    def test_at_thirty_nats_the_floor_pulls_far_harder_than_the_anchor(self) -> None:
        policy = pairs_of([[-1.0]], [[-30.0]])
        slime(policy, distance_weight=0).loss.sum().backward()
        assert policy.rejected.grad[0, 0].item() == pytest.approx(-0.1 * 2.5 * 28.75**1.5, rel=1e-9)
        assert policy.rejected.grad[0, 0].item() == pytest.approx(-38.5, abs=0.1)

    @settings(max_examples=25)
    @given(responses, st.floats(0.01, 5))
    def test_the_gradient_is_the_smaller_one_and_the_value_its_integral(
        self, rejected: list[float], cap: float
    ) -> None:
        free, held = (pairs_of([[-1.0]], [rejected]) for _ in range(2))
        slime(free, distance_weight=0).loss.sum().backward()
        output = slime(held, distance_weight=0, max_slope=cap)
        output.loss.sum().backward()
        n = len(rejected)
        wanted = free.rejected.grad.clamp(min=-cap / n)
        torch.testing.assert_close(held.rejected.grad, wanted, rtol=1e-9, atol=1e-12)
        # A tangent of a convex function lies below it, and they meet where the slope is the cap.
        assert output.metrics["loss/rejected"] <= slime(free).metrics["loss/rejected"] + 1e-12

    def test_beyond_the_point_it_is_a_line(self) -> None:
        values = [
            slime(pairs_of([[-1.0]], [[logp]]), max_slope=0.5).metrics["loss/rejected"].item()
            for logp in (-10.0, -20.0, -30.0)
        ]
        assert values[1] - values[0] == pytest.approx(5.0)
        assert values[2] - values[1] == pytest.approx(5.0)

    @pytest.mark.parametrize("cap", [0.1, 0.2, 1e30])
    def test_a_slope_that_is_nowhere_changes_nothing(self, cap: float) -> None:
        """With p = 1 the floor's slope stays below lambda_l."""
        pair = pairs_of([[-1.0]], [[-30.0, -2.0]])
        assert slime(pair, exponent=1.0, max_slope=cap).loss.item() == pytest.approx(
            slime(pair, exponent=1.0).loss.item(), rel=1e-12
        )
        assert slime(pair, rejected_weight=0.0, max_slope=cap).loss.equal(
            slime(pair, rejected_weight=0.0).loss
        )

    @pytest.mark.parametrize("cap", [0.0, -1.0, math.nan, True])
    def test_what_is_no_slope_is_refused(self, cap: float) -> None:
        with pytest.raises(InputError, match=r"max_slope = .* out of range"):
            slime(pairs_of([[-1.0]], [[-1.0]]), max_slope=cap)


class TestNumerics:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("exponent", [1.0, 2.5, 4.0])
    @pytest.mark.parametrize("extreme", [0.0, -1e-30, -1e4])
    def test_finite_at_extreme_log_probs(self, dtype: torch.dtype, exponent: float, extreme: float) -> None:
        for chosen, rejected in [(extreme, -1.0), (-1.0, extreme), (extreme, extreme)]:
            policy = pairs_of([[chosen, chosen]], [[rejected]], dtype)
            loss = slime(policy, exponent=exponent).loss
            loss.sum().backward()
            assert torch.isfinite(loss).all()
            assert torch.isfinite(policy.chosen.grad).all()
            assert torch.isfinite(policy.rejected.grad).all()

    def test_half_precision_log_probs_are_computed_in_float32(self) -> None:
        half = slime(pairs_of([[-1.0, -3.0]], [[-7.0]], torch.bfloat16)).loss
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(paper_loss([-1.0, -3.0], [-7.0]), rel=1e-6)

    def test_float64_stays_float64(self) -> None:
        assert slime(pairs_of([[-1.0]], [[-1.0]])).loss.dtype == torch.float64


class TestMetrics:
    def test_what_they_say(self) -> None:
        output = slime(pairs_of([[-0.5], [-3.0]], [[-4.0, -1.0], [-1.0]]))
        assert output.metrics["logps/chosen"].tolist() == [-0.5, -3.0]
        assert output.metrics["logps/rejected"].tolist() == [-2.5, -1.0]
        assert output.metrics["margin"].tolist() == [2.0, -2.0]
        assert output.metrics["accuracy"].tolist() == [1.0, 0.0]
        assert output.metrics["past_hard_margin"].tolist() == [1.0, 0.0]
        assert output.metrics["rejected_below_floor"].tolist() == [0.5, 0.0]

    def test_they_carry_no_gradient(self) -> None:
        assert not any(m.requires_grad for m in slime(pairs_of([[-1.0]], [[-1.0]])).metrics.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chosen_weight": -0.1}, "chosen_weight.*>= 0"),
        ({"rejected_weight": math.nan}, "rejected_weight.*>= 0"),
        ({"distance_weight": math.inf}, "distance_weight"),
        ({"exponent": 0.5}, "exponent.*>= 1"),
        ({"hard_margin": -1}, "hard_margin.*>= 0"),
        ({"threshold": -1}, "threshold.*>= 0"),
        ({"sharpness": 0}, "sharpness.*> 0"),
        ({"soft_margin": math.inf}, "soft_margin"),
        ({"hard_gate": "reul"}, "hard_gate.*relu"),
        ({"soft_gate": "step"}, "soft_gate.*sigmoid"),
        ({"rejected_mean": "batch"}, "rejected_mean.*sequence"),
    ],
)
def test_bad_hyperparameters_are_named_with_their_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        slime(pairs_of([[-1.0]], [[-1.0]]), **options)  # type: ignore[arg-type]
