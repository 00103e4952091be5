"""Bradley-Terry, intervals and the logistic fit, by hand."""

import math
import sys

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks.bootstrap import (
    bootstrap_mean,
    bradley_terry,
    logistic_newton,
    standard_error,
    win_rate,
)


def test_two_players_odds_are_their_wins() -> None:
    strengths = bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]]))
    # Three wins to one are odds of 3: 400 log10(3) points, and a win rate of 3/4.
    assert strengths[0] - strengths[1] == pytest.approx(400 * math.log10(3), abs=1e-4)
    assert win_rate(strengths[0], strengths[1]) == pytest.approx(0.75, abs=1e-7)


def test_three_players_that_agree() -> None:
    # Odds 2, 2 and 4 fit strengths 4 : 2 : 1 without any remainder.
    wins = np.array([[0.0, 2.0, 4.0], [1.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    strengths = bradley_terry(wins)
    assert strengths - strengths[2] == pytest.approx([400 * math.log10(4), 400 * math.log10(2), 0], abs=1e-3)


def test_games_of_a_player_with_itself_change_nothing() -> None:
    wins = np.array([[7.0, 3.0], [1.0, 9.0]])
    strengths = bradley_terry(wins)
    assert strengths[0] - strengths[1] == pytest.approx(400 * math.log10(3), abs=1e-4)


def test_a_player_that_always_won_is_far_ahead() -> None:
    strengths = bradley_terry(np.array([[0.0, 5.0], [0.0, 0.0]]))
    assert win_rate(strengths[0], strengths[1]) > 0.9999


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


def test_without_scikit_learn_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install 'slimepo\[eval\]'"):
        bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]]))


def test_newton_finds_the_log_odds() -> None:
    # Three of four: log-odds log 3.
    weights = logistic_newton(np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 0.0]))
    assert weights == pytest.approx([math.log(3)], abs=1e-12)


def test_newton_says_when_there_is_no_maximum() -> None:
    with pytest.raises(InputError, match="won or lost every game"):
        logistic_newton(np.ones((4, 1)), np.ones(4))
