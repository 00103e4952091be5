"""Objectives that go by more than a pair's own log-probs: numbers worked by hand, and what ranks do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.losses import aot, aot_unpaired, dpo, reward_aware_rpo, xpo
from tests.losses.problems import POLICY, REFERENCE, pairs_of, ratios_of, sigmoid, slopes, softplus


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


class TestRewardAwareRPO:
    """h = 0.5 * (2 - -3) = 2.5, and g = 0.25 * (3 - 1) = 0.5."""

    REWARDS = torch.tensor([[3.0, 1.0]])

    @pytest.mark.parametrize(
        ("distance", "wanted"),
        [
            ("squared", 2.0**2),
            ("backward_kl", sum(sigmoid(x) * math.log(sigmoid(x) / sigmoid(y)) for x, y in ((0.5, 2.5), (-0.5, -2.5)))),
            ("forward_kl", sum(sigmoid(x) * math.log(sigmoid(x) / sigmoid(y)) for x, y in ((2.5, 0.5), (-2.5, -0.5)))),
        ],
    )  # fmt: skip
    def test_a_pair_worked_by_hand(self, distance: str, wanted: float) -> None:
        output = reward_aware_rpo(POLICY, REFERENCE, self.REWARDS, beta=0.5, scale=0.25, distance=distance)
        assert output.loss.item() == pytest.approx(wanted, rel=1e-12)
        assert output.metrics["reward_gap"].item() == 0.5

    def test_the_slope_of_the_backward_kl_is_the_difference_of_two_chances(self) -> None:
        # d KL(B(g) || B(h)) / dh = sigma(h) - sigma(g), spread as DPO's.
        output = reward_aware_rpo(POLICY, REFERENCE, self.REWARDS, beta=0.5, scale=0.25)
        chosen, rejected = slopes(output, POLICY)
        pull = 0.5 * (sigmoid(2.5) - sigmoid(0.5))
        assert chosen[0, :2].tolist() == pytest.approx([pull, pull], rel=1e-12)
        assert rejected[0, 0].item() == pytest.approx(-pull, rel=1e-12)

    @pytest.mark.parametrize("distance", ["squared", "backward_kl", "forward_kl"])
    @given(st.floats(-20, 20))
    def test_where_the_margin_is_the_given_one_nothing_is_left_to_learn(
        self, distance: str, g: float
    ) -> None:
        policy, reference = ratios_of(g, 0.0)
        gap = torch.tensor([[policy.chosen[0, 0].item() + 40, 0.0]], dtype=torch.float64)
        output = reward_aware_rpo(policy, reference, gap, beta=1.0, distance=distance)
        assert output.loss.item() == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"beta": 0}, "beta.*> 0"),
            ({"scale": 0}, "scale.*> 0"),
            ({"distance": "kl"}, "distance = 'kl' is unknown: give one of backward_kl, forward_kl, squared"),
        ],
    )
    def test_bad_hyperparameters(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(InputError, match=words):
            reward_aware_rpo(POLICY, REFERENCE, self.REWARDS, **options)  # type: ignore[arg-type]


class TestAOT:
    """Three pairs of one token a side: margins -1, 3, 1 against the reference's 5, 0, 2."""

    PAIRS = pairs_of([[-2.0], [-1.0], [-1.0]], [[-1.0], [-4.0], [-2.0]])
    REFERENCE = pairs_of([[-1.0], [-3.0], [-2.0]], [[-6.0], [-3.0], [-4.0]])

    def test_paired_worked_by_hand(self) -> None:
        # By rank: -1 against 0, 1 against 2, 3 against 5.
        loss = aot(self.PAIRS, self.REFERENCE, beta=0.5).loss
        assert loss.tolist() == pytest.approx([softplus(0.5), softplus(1.0), softplus(0.5)], rel=1e-14)

    def test_unpaired_worked_by_hand(self) -> None:
        # Chosen log-ratios -1, 2, 1; rejected ones 5, -1, 2: by rank -1 against -1, 1 against 2, 2 against 5.
        loss = aot_unpaired(self.PAIRS, self.REFERENCE, beta=0.5).loss
        assert loss.tolist() == pytest.approx([softplus(0.0), softplus(1.5), softplus(0.5)], rel=1e-14)

    def test_slopes_go_to_the_answers_that_were_compared(self) -> None:
        chosen, rejected = slopes(aot_unpaired(self.PAIRS, self.REFERENCE, beta=0.5), self.PAIRS)
        assert chosen[:, 0].tolist() == pytest.approx([-0.5 * sigmoid(x) for x in (0, 1.5, 0.5)], rel=1e-14)
        # The rejected answer of the first pair has the highest log-ratio: it met the second pair's chosen one.
        assert rejected[:, 0].tolist() == pytest.approx([0.5 * sigmoid(x) for x in (1.5, 0, 0.5)], rel=1e-14)

    @pytest.mark.parametrize("objective", [aot, aot_unpaired])
    @given(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 0.4))
    def test_of_a_single_pair_it_is_dpo(self, objective, w: float, r: float, e: float) -> None:
        pair = ratios_of(w, r)
        smoothed = dpo(*pair, label_smoothing=e).loss.item()
        assert objective(*pair, label_smoothing=e).loss.item() == pytest.approx(smoothed, rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("objective", [aot, aot_unpaired])
    def test_bad_hyperparameters(self, objective) -> None:
        for options, words in (
            ({"beta": 0}, "beta.*> 0"),
            ({"label_smoothing": 0.5}, "label_smoothing.*< 0.5"),
        ):
            with pytest.raises(InputError, match=words):
                objective(self.PAIRS, self.REFERENCE, **options)
