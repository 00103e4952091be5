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


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, `hits` of `n`: its ends stay within 0 and 1 (Wilson 1927)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * float(np.sqrt(hits * (n - hits) / n + z * z / 4))
    return max(0.0, centre - half), min(1.0, centre + half)
