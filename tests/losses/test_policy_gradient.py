"""Policy gradients on a policy's own samples: numbers worked by hand, and loops written from the definitions."""

import math

import pytest
import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses import bind, count, grpo, nash_md, ppo, reinforce_pp, rloo, step_loss
from slimepo.types import LossOutput, SampleLogps
from tests.losses.problems import random_samples, rows, samples_of, with_logps


def moved(log_ratios: list[list[float]]) -> tuple[SampleLogps, SampleLogps]:
    """Policy and behaviour whose log-ratios are the given ones."""
    policy = samples_of([[-1.0 + ratio for ratio in of_one] for of_one in log_ratios])
    return policy, samples_of([[-1.0] * len(of_one) for of_one in log_ratios])


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slopes(output: LossOutput, policy: SampleLogps) -> Tensor:
    """The gradient of the step, 0 where there is no token."""
    (slope,) = torch.autograd.grad(step_loss(output, count(policy)), policy.logps)
    return slope


class TestGRPO:
    def test_two_tokens_worked_by_hand(self) -> None:
        # e^.3 = 1.35 is held at 1.2; e^-.1 counts as it is, because with A > 0 the smaller one counts.
        policy, behaviour = moved([[0.3, -0.1]])
        output = grpo(policy, behaviour, numbers(1.0))
        assert output.loss.item() == pytest.approx(-(1.2 + math.exp(-0.1)) / 2, rel=1e-14)
        assert output.loss.item() == pytest.approx(-1.05242, abs=1e-5)
        assert slopes(output, policy)[0, :2].tolist() == pytest.approx([0, -math.exp(-0.1) / 2], rel=1e-14)
        assert output.metrics["clipped"].item() == 0.5
        assert output.metrics["ratio"].item() == pytest.approx((math.exp(0.3) + math.exp(-0.1)) / 2)

    def test_a_ratio_is_held_from_the_side_that_its_advantage_pushes_it_to(self) -> None:
        # With A < 0 the larger of -rho A counts: a fall below 1 - clip_low is held, a rise is not.
        for ratio, advantage, held in ((1.5, 1, 1.2), (1.5, -1, 1.5), (0.5, 1, 0.5), (0.5, -1, 0.9)):
            policy, behaviour = moved([[math.log(ratio)]])
            output = grpo(policy, behaviour, numbers(advantage), clip_low=0.1, clip_high=0.2)
            assert output.loss.item() == pytest.approx(-held * advantage, rel=1e-14)
            assert (slopes(output, policy)[0, 0] == 0) == (held != ratio)

    def test_what_has_just_been_sampled_has_the_slope_of_reinforce(self) -> None:
        # rho = 1, so that dL/dl_t = -A / (tokens * responses).
        policy = samples_of([[-1.0, -2.0], [-3.0]])
        output = grpo(policy, with_logps(policy, policy.logps.detach()), numbers(2.0, -1.0))
        assert output.loss.tolist() == pytest.approx([-2.0, 1.0])
        assert slopes(output, policy)[policy.mask].tolist() == pytest.approx([-0.5, -0.5, 0.5])

    @pytest.mark.parametrize(
        ("aggregation", "expected"),
        # Ratios of 1: -A = -1 for 3 tokens and 2 for one. By response (-1 + 2) / 2; by token (3 * -1 + 2) / 4; by a
        # length of 5 (-3 / 5 + 2 / 5) / 2.
        [("response", 0.5), ("token", -0.25), ("constant", -0.1)],
    )
    def test_what_is_averaged(self, aggregation: str, expected: float) -> None:
        policy, behaviour = moved([[0.0, 0.0, 0.0], [0.0]])
        length = {"length": 5} if aggregation == "constant" else {}
        output = bind("grpo", {"aggregation": aggregation, **length})(
            policy, behaviour, advantages=numbers(1.0, -2.0)
        )
        assert step_loss(output, count(policy)).item() == pytest.approx(expected)

    def test_the_penalty_is_k3(self) -> None:
        # d = .5: e^-.5 - 1 + .5 = .10653.
        policy, behaviour = moved([[0.0]])
        reference = samples_of([[-1.5]])
        k3 = math.exp(-0.5) - 0.5
        assert k3 == pytest.approx(0.10653, abs=1e-5)
        output = grpo(policy, behaviour, numbers(1.0), reference, kl=0.4)
        assert output.loss.item() == pytest.approx(-1 + 0.4 * k3)
        assert output.metrics["kl"].item() == pytest.approx(k3)
        assert output.metrics["ratio"].item() == 1

    def test_k3_times_the_ratio_has_the_slope_of_the_reverse_kl(self) -> None:
        """Its own slope is 1 - e^-d; that of the reverse KL, estimated by one sample, is d."""
        for times_ratio, expected in ((False, 1 - math.exp(-0.5)), (True, 0.5)):
            policy, behaviour = moved([[0.0]])
            output = grpo(
                policy, behaviour, numbers(0.0), samples_of([[-1.5]]), kl=1.0, kl_times_ratio=times_ratio
            )
            assert slopes(output, policy)[0, 0].item() == pytest.approx(expected, rel=1e-14)

    def test_a_token_that_is_far_likelier_now_is_finite_and_falls(self) -> None:
        policy, behaviour = moved([[5000.0]])
        output = grpo(policy, behaviour, numbers(-1.0))
        assert 0 < slopes(output, policy)[0, 0].item() < math.inf


class TestGSPO:
    def test_the_ratio_is_of_the_mean_over_tokens(self) -> None:
        # e^((.3 - .1) / 2) = 1.10517.
        policy, behaviour = moved([[0.3, -0.1]])
        output = grpo(policy, behaviour, numbers(1.0), level="sequence")
        assert output.loss.item() == pytest.approx(-math.exp(0.1), rel=1e-14)
        assert slopes(output, policy)[0, :2].tolist() == pytest.approx([-math.exp(0.1) / 2] * 2, rel=1e-14)

    def test_with_its_own_bounds_that_is_clipped(self) -> None:
        policy, behaviour = moved([[0.3, -0.1]])
        output = bind("grpo/gspo", {})(policy, behaviour, advantages=numbers(1.0))
        assert output.loss.item() == pytest.approx(-1.0004, rel=1e-14)
        assert slopes(output, policy)[0, :2].tolist() == [0, 0]
        assert output.metrics["clipped"].item() == 1

    def test_it_does_not_grow_with_length_unless_tokens_are_averaged_over(self) -> None:
        """A ratio of a response that is summed over its tokens counts by length: so `aggregation: token` says."""
        short, long = [0.0] * 2, [0.0] * 6
        policy, behaviour = moved([short, long])
        by_response, by_token = (
            slopes(
                grpo(policy, behaviour, numbers(1.0, 1.0), level="sequence", aggregation=aggregation), policy
            ).nansum(dim=-1)
            for aggregation in ("response", "token")
        )
        assert by_response.tolist() == pytest.approx([-1 / 2, -1 / 2])
        assert by_token.tolist() == pytest.approx([-2 / 8, -6 / 8])


class TestPresets:
    def test_dapo_counts_tokens_of_the_step_and_clips_higher(self) -> None:
        policy, behaviour = moved([[0.3, 0.0, 0.0], [0.0]])
        output = bind("grpo/dapo", {})(policy, behaviour, advantages=numbers(1.0, 1.0))
        assert step_loss(output, count(policy)).item() == pytest.approx(-(1.28 + 3) / 4)

    def test_tokens_are_those_of_the_step_and_not_of_a_micro_batch(self) -> None:
        policy, behaviour = moved([[0.0, 0.0, 0.0], [0.0]])
        whole, advantages = count(policy), numbers(1.0, -2.0)
        parts = [
            step_loss(
                bind("grpo/dapo", {})(rows(policy, cut), rows(behaviour, cut), advantages=advantages[cut]),
                whole,
            )
            for cut in (slice(0, 1), slice(1, 2))
        ]
        assert sum(part.item() for part in parts) == pytest.approx((-3 + 2) / 4)

    def test_dr_divides_by_a_length_that_no_answer_changes(self) -> None:
        policy, behaviour = moved([[0.0, 0.0], [0.0]])
        output = bind("grpo/dr", {"length": 10})(policy, behaviour, advantages=numbers(1.0, 1.0))
        assert output.loss.tolist() == pytest.approx([-0.2, -0.1])


class TestRLOO:
    def test_the_ratio_is_of_the_whole_response(self) -> None:
        # e^(-.2 - .1), and e^.3 held at 1.2.
        policy, behaviour = moved([[-0.2, -0.1], [0.3]])
        output = rloo(policy, behaviour, numbers(2.0, 1.0))
        assert output.loss.tolist() == pytest.approx([-2 * math.exp(-0.3), -1.2], rel=1e-14)
        slope = slopes(output, policy)
        assert slope[0, :2].tolist() == pytest.approx([-math.exp(-0.3)] * 2, rel=1e-14)
        assert slope[1, 0].item() == 0

    def test_advantages_by_token_are_refused(self) -> None:
        policy, behaviour = moved([[0.0, 0.0]])
        with pytest.raises(InputError, match="one advantage a response"):
            rloo(policy, behaviour, torch.ones(1, 2))


class TestReinforce:
    def test_the_mean_is_over_tokens(self) -> None:
        # rho A: e^-.1 and 2 e^-.2 of one response, -1 of another.
        policy, behaviour = moved([[-0.1, -0.2], [0.0]])
        advantages = torch.tensor([[1.0, 2.0, 9.0], [-1.0, 9.0, 9.0]], dtype=torch.float64)
        output = reinforce_pp(policy, behaviour, advantages)
        expected = -(math.exp(-0.1) + 2 * math.exp(-0.2) - 1) / 3
        assert step_loss(output, count(policy)).item() == pytest.approx(expected, rel=1e-14)
        assert output.loss.tolist() == [0, 0]

    def test_the_penalty_is_k2(self) -> None:
        # d = .5: .125, with the slope d.
        policy, behaviour = moved([[0.0]])
        output = reinforce_pp(policy, behaviour, numbers(0.0), samples_of([[-1.5]]), kl=2.0)
        assert step_loss(output, count(policy)).item() == pytest.approx(2 * 0.125)
        assert output.metrics["kl"].item() == pytest.approx(0.125)
        assert slopes(output, policy)[0, 0].item() == pytest.approx(2 * 0.5)


class TestPPO:
    def test_worked_by_hand(self) -> None:
        policy, behaviour = moved([[0.3, -0.1, -0.5]])
        advantages = torch.tensor([[1.0, -2.0, -1.0, 9.0]], dtype=torch.float64)
        # 1.2 held; e^-.1 as it is; e^-.5 = .61 held at .8.
        expected = -(1.2 - 2 * math.exp(-0.1) - 0.8) / 3
        output = ppo(policy, behaviour, advantages)
        assert step_loss(output, count(policy)).item() == pytest.approx(expected, rel=1e-14)

    def test_the_dual_clip_bounds_what_a_bad_token_costs(self) -> None:
        policy, behaviour = moved([[2.0], [2.0], [0.5]])
        output = ppo(policy, behaviour, numbers(-1.0, 1.0, -1.0), dual_clip=3.0)
        # e^2 = 7.4 is held at 3 for the first alone: the second is held at 1.2, and e^.5 = 1.65 is below.
        assert output.token_loss["sampled"].tolist() == pytest.approx([3.0, -1.2, math.exp(0.5)])
        assert slopes(output, policy)[0, 0].item() == 0
        assert ppo(policy, behaviour, numbers(-1.0, 1.0, -1.0)).token_loss["sampled"][
            0
        ].item() == pytest.approx(math.exp(2))


class TestNashMD:
    def test_worked_by_hand(self) -> None:
        # P = .9 and .2; log pi(y) = -3 and -1; d = (-1 + 2) + (-2 + 2.5) = 1.5, and -1.
        policy, reference = samples_of([[-1.0, -2.0], [-1.0]]), samples_of([[-2.0, -2.5], [0.0]])
        output = nash_md(policy, numbers(0.4, -0.3), reference, beta=0.2)
        assert output.loss.tolist() == pytest.approx([0.4 * 3 + 0.1 * 1.5**2, -0.3 + 0.1])
        assert output.metrics["kl"].tolist() == pytest.approx([0.75, -1])
        # -(P - 1/2 - beta d) a token, over two responses: the paper's gradient.
        slope = slopes(output, policy)[policy.mask].tolist()
        assert slope == pytest.approx([-(0.4 - 0.3) / 2] * 2 + [-(-0.3 + 0.2) / 2])

    def test_advantages_by_token_are_refused(self) -> None:
        policy, reference = moved([[0.0, 0.0]])
        with pytest.raises(InputError, match="nash_md takes one advantage a response"):
            nash_md(policy, torch.ones(1, 2), reference)


class TestSpecification:
    """Loops written from the definitions, one token at a time."""

    @staticmethod
    def sampled() -> tuple[SampleLogps, SampleLogps, SampleLogps, Tensor]:
        policy, reference = random_samples(), random_samples(seed=9)
        generator = torch.Generator().manual_seed(3)
        noise = 0.3 * torch.randn(policy.logps.shape, generator=generator, dtype=torch.float64)
        advantages = torch.randn(policy.logps.shape, generator=generator, dtype=torch.float64)
        policy.logps.requires_grad_()
        return policy, with_logps(policy, policy.logps.detach() + noise), reference, advantages

    @staticmethod
    def held(ratio: Tensor, advantage: Tensor) -> Tensor:
        kept = ratio if 0.8 <= ratio <= 1.2 else 0.8 if ratio < 0.8 else 1.2
        return -torch.minimum(ratio * advantage, kept * advantage)

    def compare(self, output: LossOutput, policy: SampleLogps, expected: Tensor) -> None:
        loss = step_loss(output, count(policy))
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        ours, theirs = (torch.autograd.grad(value, policy.logps)[0] for value in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-16)

    def test_reinforce_pp(self) -> None:
        policy, behaviour, reference, advantages = self.sampled()
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for b, t in policy.mask.nonzero().tolist():
            ratio = (policy.logps[b, t] - behaviour.logps[b, t]).exp()
            penalty = 0.5 * (policy.logps[b, t] - reference.logps[b, t]) ** 2
            total = total + self.held(ratio, advantages[b, t]) + 0.3 * penalty
            tokens += 1
        self.compare(reinforce_pp(policy, behaviour, advantages, reference, kl=0.3), policy, total / tokens)

    def test_ppo(self) -> None:
        policy, behaviour, _, advantages = self.sampled()
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for b, t in policy.mask.nonzero().tolist():
            value = self.held((policy.logps[b, t] - behaviour.logps[b, t]).exp(), advantages[b, t])
            if advantages[b, t] < 0:
                value = torch.minimum(value, -1.3 * advantages[b, t])
            total = total + value
            tokens += 1
        self.compare(ppo(policy, behaviour, advantages, dual_clip=1.3), policy, total / tokens)
