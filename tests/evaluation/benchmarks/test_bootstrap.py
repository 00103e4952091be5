"""Intervals and standard errors, by hand."""

import math

import pytest

from slimepo.evaluation.benchmarks.bootstrap import bootstrap_mean, paired_difference, standard_error, wilson


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


def test_a_paired_difference_by_hand() -> None:
    easy, hard = [[1, 1]] * 50, [[0, 0]] * 50
    # Half of the questions are easy for both: no draw of questions tells the two apart.
    assert paired_difference(easy + hard, easy + hard, seed=0) == (0.0, 0.0, 0.0)
    # One of two answers is right in every question, and both in the other model: half a point, whatever is drawn.
    assert paired_difference([[1, 1]] * 9, [[1, 0]] * 9, seed=0) == (0.5, 0.5, 0.5)
    # Of 100 questions 20 are won and 10 are lost: variance 0.3 - 0.1², so 0.1 +- 1.96 * sqrt(0.29 / 100).
    won = [[1]] * 20 + [[0]] * 10 + [[1]] * 70
    lost = [[0]] * 20 + [[1]] * 10 + [[1]] * 70
    assert paired_difference(won, lost, seed=0) == pytest.approx((0.1, -0.006, 0.206), abs=0.02)


def test_the_paired_difference_of_one_question_has_no_width() -> None:
    assert paired_difference([[1, 1, 0]], [[0, 1, 0]], seed=0) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_questions_weigh_by_their_values() -> None:
    # One of four against none, not the mean of a third and nothing.
    assert paired_difference([[1, 0, 0], [0]], [[0, 0, 0], [0]], seed=0)[0] == 0.25


def test_wilsons_interval_by_hand() -> None:
    # z = 1.96, z² = 3.84: the centre is (0 + 1.92) / 13.84 and so is half the width; by symmetry at the other end.
    assert wilson(0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((10 / 13.8415, 1.0), abs=1e-4)
    # For many items it is the normal one: 0.5 +- 1.96 * 0.005.
    assert wilson(5000, 10000) == pytest.approx((0.4902, 0.5098), abs=1e-4)
