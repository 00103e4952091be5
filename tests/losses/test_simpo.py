"""Objectives without a reference model: numbers worked by hand and limits."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.losses import alpha_po, bind, bopo, count, cpo, orpo, simper, simpo, step_loss, tpo
from slimepo.types import LossOutput, PairLogps
from tests.losses.problems import pairs_of, samples_of, sigmoid, softplus

log_probs = st.floats(-30, -0.01)
responses = st.lists(log_probs, min_size=1, max_size=7)

# Chosen: -1 in sum, -0.5 a token. Rejected: -2 in sum and a token.
POLICY = pairs_of([[-0.25, -0.75]], [[-2.0]])
NLL_BATCH = pairs_of([[-1.0], [-2.0, -3.0, -3.0]], [[-1.0], [-1.0]])


def alone(output: LossOutput, policy: PairLogps) -> torch.Tensor:
    return step_loss(output, count(policy))


class TestSimPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # 2 (-0.5 + 2) - 0.5 = 2.5.
        output = simpo(POLICY)
        assert output.loss.item() == pytest.approx(math.log(1 + math.exp(-2.5)), rel=1e-14)
        assert output.metrics["rewards/chosen"].item() == pytest.approx(-1)
        assert output.metrics["rewards/rejected"].item() == pytest.approx(-4)
        assert output.token_loss == {}

    def test_gradient_worked_by_hand(self) -> None:
        # -sigma(-2.5) for the argument, times beta / |y| a token.
        loss = simpo(POLICY).loss.sum()
        chosen, rejected = torch.autograd.grad(loss, [POLICY.chosen, POLICY.rejected])
        assert chosen[0, :2].tolist() == pytest.approx([-sigmoid(-2.5)] * 2, rel=1e-13)
        assert rejected[0, :1].tolist() == pytest.approx([2 * sigmoid(-2.5)], rel=1e-13)

    @given(log_probs, st.floats(0.1, 10), st.floats(-3, 3))
    def test_at_the_target_margin_it_is_log_2(self, rejected: float, beta: float, gamma: float) -> None:
        policy = pairs_of([[rejected + gamma / beta]], [[rejected]])
        assert simpo(policy, beta=beta, gamma=gamma).loss.item() == pytest.approx(math.log(2), rel=1e-12)

    @given(responses, responses, st.floats(-10, 10))
    def test_what_every_token_gains_alike_does_not_count(
        self, chosen: list[float], rejected: list[float], shift: float
    ) -> None:
        before = simpo(pairs_of([chosen], [rejected])).loss.item()
        after = simpo(pairs_of([[t + shift for t in chosen]], [[t + shift for t in rejected]])).loss.item()
        assert after == pytest.approx(before, rel=1e-9, abs=1e-12)

    @given(responses, responses)
    def test_repeating_an_answers_tokens_does_not_count(
        self, chosen: list[float], rejected: list[float]
    ) -> None:
        before = simpo(pairs_of([chosen], [rejected])).loss.item()
        assert simpo(pairs_of([chosen * 3], [rejected])).loss.item() == pytest.approx(before, rel=1e-9)

    def test_the_likelihood_is_averaged_over_all_chosen_tokens(self) -> None:
        # Four chosen tokens with 9 nats in all.
        extra = alone(simpo(NLL_BATCH, nll_weight=0.5), NLL_BATCH) - alone(simpo(NLL_BATCH), NLL_BATCH)
        assert extra.item() == pytest.approx(0.5 * 9 / 4, rel=1e-13)


class TestCPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # Sums: 0.1 (-1 + 2) = 0.1; the likelihood costs half a nat a token.
        output = cpo(POLICY)
        assert output.loss.item() == pytest.approx(softplus(-0.1), rel=1e-14)
        assert alone(output, POLICY).item() == pytest.approx(softplus(-0.1) + 0.5, rel=1e-14)
        assert output.metrics["rewards/rejected"].item() == pytest.approx(-0.2)

    def test_the_likelihood_is_averaged_over_all_chosen_tokens(self) -> None:
        extra = alone(cpo(NLL_BATCH), NLL_BATCH) - alone(cpo(NLL_BATCH, nll_weight=0), NLL_BATCH)
        assert extra.item() == pytest.approx(9 / 4, rel=1e-13)

    @given(responses, responses, st.floats(0.1, 5))
    def test_on_answers_of_one_token_it_is_simpo_without_a_margin(
        self, chosen: list[float], rejected: list[float], beta: float
    ) -> None:
        policy = pairs_of([chosen[:1]], [rejected[:1]])
        same = simpo(policy, beta=beta, gamma=0).loss.item()
        assert cpo(policy, beta=beta).loss.item() == same


class TestORPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # Probabilities a token of 1/2 and 1/4: odds 1 and 1/3, so that sigma(log 3) = 3/4.
        policy = pairs_of([[math.log(0.5)] * 3], [[math.log(0.125), math.log(0.5)]])
        output = orpo(policy)
        assert output.metrics["log_odds_ratio"].item() == pytest.approx(math.log(3), rel=1e-14)
        assert output.loss.item() == pytest.approx(-0.1 * math.log(0.75), rel=1e-14)
        assert alone(output, policy).item() == pytest.approx(math.log(2) - 0.1 * math.log(0.75), rel=1e-14)

    @given(log_probs)
    def test_at_equal_odds_it_is_beta_log_2(self, logp: float) -> None:
        output = orpo(pairs_of([[logp, logp]], [[logp]]))
        assert output.loss.item() == pytest.approx(0.1 * math.log(2), rel=1e-12)

    def test_gradient_in_closed_form(self) -> None:
        # d log odds / d log p = 1 / (1 - p).
        policy = pairs_of([[math.log(0.5)]], [[math.log(0.25)]])
        loss = orpo(policy, beta=1.0, nll_weight=0).loss.sum()
        chosen, rejected = torch.autograd.grad(loss, [policy.chosen, policy.rejected])
        assert chosen[0, 0].item() == pytest.approx(-0.25 / 0.5, rel=1e-13)
        assert rejected[0, 0].item() == pytest.approx(0.25 / 0.75, rel=1e-13)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_certain_answers_have_finite_odds_and_no_pull(self, dtype: torch.dtype) -> None:
        # p = 1 counts as the largest p below 1, 1 - eps: the odds are 1 / eps.
        policy = pairs_of([[0.0, 0.0]], [[math.log(0.5)]], dtype)
        output = orpo(policy, nll_weight=0)
        odds = -math.log(torch.finfo(dtype).eps)
        assert output.metrics["log_odds_ratio"].item() == pytest.approx(odds, rel=1e-6)
        output.loss.sum().backward()
        assert policy.chosen.grad[0, :2].tolist() == [0, 0]
        assert math.isfinite(policy.rejected.grad[0, 0].item())

    def test_a_certain_rejected_answer_costs_its_log_odds(self) -> None:
        policy = pairs_of([[math.log(0.5)]], [[0.0]])
        odds = -math.log(torch.finfo(torch.float64).eps)
        assert orpo(policy, beta=1.0).loss.item() == pytest.approx(odds, rel=1e-12)

    def test_nearly_certain_answers_keep_their_digits(self) -> None:
        # 1 - exp(-1e-12) is 1e-12 to 12 digits, which a plain subtraction would not give.
        policy = pairs_of([[-1e-12]], [[math.log(0.5)]])
        assert orpo(policy).metrics["log_odds_ratio"].item() == pytest.approx(-math.log(1e-12), rel=1e-12)


class TestAlphaPO:
    @pytest.mark.parametrize("alpha", [0.25, -0.5])
    def test_a_pair_worked_by_hand(self, alpha: float) -> None:
        # Means -0.5 and -2.
        chosen, rejected = ((1 - math.exp(-alpha * mean)) / alpha for mean in (-0.5, -2.0))
        output = alpha_po(POLICY, alpha=alpha)
        assert output.loss.item() == pytest.approx(softplus(-(2 * (chosen - rejected) - 0.5)), rel=1e-13)
        assert output.metrics["rewards/chosen"].item() == pytest.approx(2 * chosen, rel=1e-13)

    @given(responses, responses)
    def test_with_a_small_alpha_it_is_simpo(self, chosen: list[float], rejected: list[float]) -> None:
        policy = pairs_of([chosen], [rejected])
        assert alpha_po(policy, alpha=1e-9).loss.item() == pytest.approx(simpo(policy).loss.item(), abs=1e-4)

    def test_beyond_e_to_the_20_the_reward_is_a_line(self) -> None:
        # alpha * 100 = 25, of which 20 are in the exponent: e^20 (1 + 5).
        output = alpha_po(pairs_of([[-100.0]], [[-1.0]]), beta=1.0)
        wanted = (1 - math.exp(20) * 6) / 0.25
        assert output.metrics["rewards/chosen"].item() == pytest.approx(wanted, rel=1e-13)


class TestSimPER:
    def test_a_pair_worked_by_hand(self) -> None:
        output = simper(POLICY)
        assert output.loss.item() == pytest.approx(math.exp(-2) - math.exp(-0.5), rel=1e-14)
        chosen, rejected = torch.autograd.grad(output.loss.sum(), [POLICY.chosen, POLICY.rejected])
        assert chosen[0, :2].tolist() == pytest.approx([-math.exp(-0.5) / 2] * 2, rel=1e-14)
        assert rejected[0, 0].item() == pytest.approx(math.exp(-2), rel=1e-14)


class TestBOPO:
    def test_a_pair_worked_by_hand(self) -> None:
        # Costs 10 and 12, means -0.5 and -0.8: the logit is 1.2 * 0.3 = 0.36.
        policy = pairs_of([[-0.25, -0.75]], [[-0.8]])
        output = bopo(policy, torch.tensor([12 / 10], dtype=torch.float64))
        assert output.loss.item() == pytest.approx(softplus(-0.36), rel=1e-13)
        assert output.loss.item() == pytest.approx(0.52926, abs=5e-6)

    @given(responses, responses)
    def test_equal_costs_are_simpo_without_a_target(self, chosen: list[float], rejected: list[float]) -> None:
        policy = pairs_of([chosen], [rejected])
        assert bopo(policy, torch.ones(1)).loss.item() == simpo(policy, beta=1.0, gamma=0.0).loss.item()


class TestTPO:
    GOLD = samples_of([[-0.5, -1.0]])

    def test_a_pair_and_a_gold_answer_worked_by_hand(self) -> None:
        # Sums -1 and -2: 0.5 (-1 + 2) = 0.5, and twice the NLL of the gold answer, over its two tokens in the end.
        output = tpo(POLICY, self.GOLD, beta=0.5, nll_weight=2.0)
        assert output.loss.item() == pytest.approx(softplus(-0.5), rel=1e-14)
        assert output.token_loss["gold"].item() == 3.0
        assert output.metrics["logps/gold"].item() == -0.75
        counts = count(POLICY)
        counts.tokens["gold"] = 2.0  # type: ignore[index]
        assert step_loss(output, counts).item() == pytest.approx(softplus(-0.5) + 1.5, rel=1e-14)

    def test_its_form_with_means_has_a_target_margin(self) -> None:
        # Means -0.5 and -2: 2 * 1.5 - 0.5.
        assert bind("tpo/l", {"beta": 2})(POLICY, self.GOLD).loss.item() == pytest.approx(
            softplus(-2.5), rel=1e-14
        )

    def test_label_smoothing(self) -> None:
        loss = tpo(POLICY, self.GOLD, beta=0.5, label_smoothing=0.25).loss.item()
        assert loss == pytest.approx(0.75 * softplus(-0.5) + 0.25 * softplus(0.5), rel=1e-14)


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        (alpha_po, {"alpha": 0}, "alpha = 0 is simpo"),
        (alpha_po, {"alpha": math.nan}, "alpha"),
        (alpha_po, {"beta": 0}, "beta.*> 0"),
        (alpha_po, {"gamma": math.inf}, "gamma"),
        (alpha_po, {"nll_weight": -1}, "nll_weight.*>= 0"),
        (lambda policy, **options: tpo(policy, TestTPO.GOLD, **options), {"beta": 0}, "beta.*> 0"),
        (lambda policy, **options: tpo(policy, TestTPO.GOLD, **options), {"label_smoothing": 1}, "< 0.5"),
        (
            lambda policy, **options: tpo(policy, TestTPO.GOLD, **options),
            {"nll_weight": -1},
            "nll_weight.*>= 0",
        ),
        (simpo, {"beta": 0}, "beta.*> 0"),
        (simpo, {"gamma": math.inf}, "gamma"),
        (simpo, {"nll_weight": -1}, "nll_weight.*>= 0"),
        (cpo, {"beta": -1}, "beta.*> 0"),
        (cpo, {"nll_weight": math.nan}, "nll_weight.*>= 0"),
        (orpo, {"beta": 0}, "beta.*> 0"),
        (orpo, {"nll_weight": -0.1}, "nll_weight.*>= 0"),
    ],
)
def test_bad_hyperparameters_are_named_with_their_range(
    objective: Callable[..., LossOutput], options: dict[str, float], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        objective(POLICY, **options)
