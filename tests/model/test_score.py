"""Held-out scores as histograms."""

import math

import numpy as np
import pytest

from slimepo.model.score import PairScores, distributions, histogram


def test_both_sides_share_bins_and_every_value_is_counted() -> None:
    made = histogram([0.0, 1.0, 2.0], [1.0, 4.0, math.nan, 10.0], bins=5)
    assert len(made["edges"]) == 6
    assert sum(made["before"]) == sum(made["after"]) == 3
    # 99 % of six values between 0 and 10 is nearly all of the range.
    assert made["edges"][0] == pytest.approx(0.0, abs=0.1)
    assert made["edges"][-1] == pytest.approx(10.0, abs=0.2)
    # Bins of two: 0 and 1 in the first, 2 on its edge or just over it.
    assert made["before"][0] + made["before"][1] == 3
    assert made["after"][-1] == 1


def test_values_far_out_count_in_the_end_bins() -> None:
    values = [*np.linspace(0, 1, 2000), -1e6]
    made = histogram(values, values)
    assert made["edges"][0] == pytest.approx(0, abs=0.01)
    assert sum(made["before"]) == 2001


def test_equal_values_and_no_values() -> None:
    assert sum(histogram([2.0, 2.0], [2.0])["before"]) == 2
    assert histogram([], [1.0]) == {}
    assert histogram([math.nan], [1.0]) == {}


def test_margins_and_rejected_tokens_are_told_and_demonstrations_have_none() -> None:
    tokens = [np.array([-1.0, -3.0]), np.array([-2.0])]
    before = PairScores(np.array([-0.5, -1.0]), np.array([-2.0, -2.0]), tokens)
    after = PairScores(np.array([-0.5, np.nan]), np.array([-2.0, -2.0]), tokens)
    made = distributions(before, after)
    assert (sum(made["margin"]["before"]), sum(made["margin"]["after"])) == (2, 1)
    assert sum(made["rejected_tokens"]["after"]) == 3
    one_sided = PairScores(np.array([-0.5]), np.zeros(0), [])
    assert distributions(one_sided, one_sided) == {}
