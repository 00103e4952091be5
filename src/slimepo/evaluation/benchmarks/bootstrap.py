"""Intervals and standard errors: what more than one benchmark needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def bootstrap_mean(
    groups: Sequence[Sequence[float]], *, low: float, high: float, seed: int, rounds: int = 1000
) -> tuple[float, float]:
    """Percentiles `low` and `high` (0 to 100) of the mean over all values when whole groups are drawn again.

    Values of one group (the turns of one question) stand or fall together. With one group both ends are the mean.
    """
    lower, upper = np.percentile(_means(groups, _draws(len(groups), seed, rounds)), [low, high])
    return float(lower), float(upper)


def paired_difference(
    ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]], *, seed: int, rounds: int = 1000
) -> tuple[float, float, float]:
    """Mean over all values of `ones` less that of `others`, and the ends of its 95 % interval.

    Each has a group of values a question, in the same order. Whole questions are drawn again, the same ones for both:
    what makes a question easy or hard for both is in neither end (percentiles 2.5 and 97.5).
    """
    whole, drawn = np.arange(len(ones))[None], _draws(len(ones), seed, rounds)
    (difference,) = _means(ones, whole) - _means(others, whole)
    lower, upper = np.percentile(_means(ones, drawn) - _means(others, drawn), [2.5, 97.5])
    return float(difference), float(lower), float(upper)


def _draws(n: int, seed: int, rounds: int) -> npt.NDArray[np.int64]:
    return np.random.RandomState(seed).randint(0, n, size=(rounds, n))


def _means(groups: Sequence[Sequence[float]], drawn: npt.NDArray[np.int64]) -> Floats:
    """The mean over all values of the groups that a row names, `drawn` [rounds, n] -> [rounds]."""
    sums = np.array([sum(g) for g in groups], dtype=np.float64)
    sizes = np.array([len(g) for g in groups], dtype=np.float64)
    means: Floats = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def standard_error(values: Sequence[float] | Floats) -> float:
    """Standard error of the mean with n - 1 in the denominator; NaN for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.std(ddof=1) / np.sqrt(array.size)) if array.size > 1 else float("nan")


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, `hits` of `n`: its ends stay within 0 and 1 (Wilson 1927)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * float(np.sqrt(hits * (n - hits) / n + z * z / 4))
    return max(0.0, centre - half), min(1.0, centre + half)
