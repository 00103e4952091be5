"""Means over seeds, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
# fmt: off
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
      2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
# fmt: on


class Mean(NamedTuple):
    """A mean over seeds, and half of its 95 % interval (Student's t); NaN with one seed."""

    value: float
    half: float
    n: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of one figure a seed.

    >>> mean_of([1.0, 2.0, 3.0])
    Mean(value=2.0, half=2.484..., n=3)
    """
    n = len(values)
    if n < 2:
        return Mean(values[0] if n else math.nan, math.nan, n)
    # Beyond the table, the normal distribution's and the first term of the expansion in 1 / degrees: within 0.001.
    quantile = _T[n - 2] if n - 2 < len(_T) else 1.960 + 2.4 / (n - 1)
    return Mean(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n), n)
