"""Objectives that are told more of a pair: numbers worked by hand."""

import pytest
import torch

from slimepo.losses import xpo
from tests.losses.problems import POLICY, REFERENCE, sigmoid, slopes, softplus


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
