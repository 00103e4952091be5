"""Bootstraps, intervals and Bradley-Terry strengths: what more than one benchmark needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slimepo.errors import InputError

Floats = npt.NDArray[np.float64]


def bootstrap_mean(
    groups: Sequence[Sequence[float]], *, low: float, high: float, seed: int, rounds: int = 1000
) -> tuple[float, float]:
    """Percentiles `low` and `high` (0 to 100) of the mean over all values when whole groups are drawn again.

    Values of one group (the turns of one question) stand or fall together. With one group both ends are the mean.
    """
    sums = np.array([sum(g) for g in groups], dtype=np.float64)
    sizes = np.array([len(g) for g in groups], dtype=np.float64)
    drawn = np.random.RandomState(seed).randint(0, len(groups), size=(rounds, len(groups)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    lower, upper = np.percentile(means, [low, high])
    return float(lower), float(upper)


def standard_error(values: Sequence[float] | Floats) -> float:
    """Standard error of the mean with n - 1 in the denominator; NaN for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.std(ddof=1) / np.sqrt(array.size)) if array.size > 1 else float("nan")


def bradley_terry(wins: Floats) -> Floats:
    """Strengths [n] on the Elo scale (400 points are odds of 10), from `wins` [n, n], by maximum likelihood.

    `wins[i, j]` is how often i won over j, with a tie as half a win for both. No penalty, no home advantage; only
    differences of strengths mean anything. A logistic regression with the settings that Arena-Hard uses (lbfgs, log 10
    as regressors, tolerance 1e-8), on counted instead of repeated rows: the likelihood is the same. Where a player
    never won or never lost there is no maximum, and its strength is where the fit stopped, far out.
    """
    linear_model = sklearn_module("linear_model")
    n = len(wins)
    winners, losers = np.nonzero(wins * (1 - np.eye(n)))
    rows = np.arange(len(winners))
    features = np.zeros((len(winners), n))
    features[rows, winners], features[rows, losers] = np.log(10), -np.log(10)
    # Each win is told from both sides, so that there are two classes even where one player always wins.
    weights = wins[winners, losers]
    fit = linear_model.LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-8)
    fit.fit(
        np.concatenate([features, -features]),
        np.repeat([1.0, 0.0], len(rows)),
        sample_weight=np.concatenate([weights, weights]),
    )
    strengths: Floats = 400 * fit.coef_[0]
    return strengths


def win_rate(strength: float, other: float) -> float:
    """How often (0 to 1) a player of this strength beats the other, on the Elo scale."""
    return float(1 / (1 + 10 ** ((other - strength) / 400)))


def logistic_newton(
    features: Floats, outcomes: Floats, *, tolerance: float = 1e-10, steps: int = 100
) -> Floats:
    """Coefficients [k] of a logistic regression of outcomes [n] in 0..1 on features [n, k], no penalty, to convergence.

    Raises:
        InputError: no maximum was found, as when a model never won.
    """
    weights = np.zeros(features.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(features @ weights, -500, 500)))
        gradient = features.T @ (outcomes - p)
        hessian = (features * (p * (1 - p))[:, None]).T @ features
        change = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        # Newton overshoots far from the maximum; a step of 5 in log-odds is as far as it may go.
        change *= min(1.0, 5.0 / max(float(np.abs(change).max(initial=0.0)), 1e-300))
        weights = weights + change
        if float(np.abs(weights).max(initial=0.0)) > 30:
            break
        if float(np.abs(change).max(initial=0.0)) < tolerance:
            return weights
    raise InputError("the fit has no maximum: a model won or lost every game; leave it out")


def sklearn_module(name: str) -> Any:
    """A module of scikit-learn, imported when it is first needed.

    Raises:
        InputError: scikit-learn is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise InputError("scores of this benchmark need scikit-learn: pip install 'slimepo[eval]'") from error
