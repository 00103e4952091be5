"""Intervals and standard errors, by hand."""

import math

import pytest

from slimepo.evaluation.benchmarks.bootstrap import bootstrap_mean, standard_error


def test_standard_error_by_hand() -> None:
    # Deviations 1, 0, 1: variance 2/2, over sqrt(3).
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([1.0]))


def test_groups_are_drawn_whole() -> None:
    # Values differ inside groups only, so every draw has the same mean.
    assert bootstrap_mean([[1.0, 9.0], [9.0, 1.0]], low=2.5, high=97.5, seed=0) == (5.0, 5.0)
    lower, upper = bootstrap_mean([[0.0], [1.0]] * 50, low=2.5, high=97.5, seed=0)
    # The mean of 100 coin throws: 0.5 +- 1.96 * 0.05.
    assert (lower, upper) == pytest.approx((0.4, 0.6), abs=0.03)
