"""Intervals and standard errors, by hand."""

import math

import pytest

from slimepo.evaluation.benchmarks.bootstrap import bootstrap_mean, standard_error, wilson


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


def test_wilsons_interval_by_hand() -> None:
    # z = 1.96, z² = 3.84: the centre is (0 + 1.92) / 13.84 and so is half the width; by symmetry at the other end.
    assert wilson(0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((10 / 13.8415, 1.0), abs=1e-4)
    # For many items it is the normal one: 0.5 +- 1.96 * 0.005.
    assert wilson(5000, 10000) == pytest.approx((0.4902, 0.5098), abs=1e-4)
