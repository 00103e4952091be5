"""Which pairs are worth the next round: a reconstruction of SAGE (arXiv 2602.01207) from its abstract alone.

Pools of like difficulty under the model as it is now, and in each pool the pairs with the best ratio of signal to
curvature. With z = beta (r_w - r_l), r the log-ratio of an answer to the reference, DPO's gradient in z is sigmoid(-z)
and its second derivative sigmoid(z) sigmoid(-z); the score is the square of the one over the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slimepo.errors import InputError
from slimepo.losses.common import check_number

FloatArray = NDArray[np.float64]
R = TypeVar("R")


def signal_to_curvature(z: FloatArray, eps: float = 0.05) -> FloatArray:
    """g^2 / (h + eps) at logits z `[pairs]`, g = sigmoid(-z) and h = sigmoid(z) sigmoid(-z); eps > 0 keeps it finite.

    Example:
        >>> import numpy as np
        >>> from slimepo.plan.select import signal_to_curvature
        >>> signal_to_curvature(np.array([-3.0, 0.0, 3.0])).round(4)
        array([9.5338, 0.8333, 0.0236])
    """
    check_number("eps", eps, above=0)
    # Odd as it is written, nothing overflows: sigmoid(x) = exp(-softplus(-x)).
    wrong, right = np.exp(-np.logaddexp(0, z)), np.exp(-np.logaddexp(0, -z))
    score: FloatArray = wrong**2 / (wrong * right + eps)
    return score


def select(rows: Sequence[R], scores: FloatArray, keep: float, bins: int) -> list[R]:
    """The share `keep` of the rows, those with the best scores of each of `bins` pools of equal size; in their order.

    Pools are of neighbours by score. Confident errors score best, and mislabelled pairs are such: one pool takes the
    hardest pairs of all, more pools take as many of the easy ones. Of equal scores the earlier row is taken.

    Args:
        scores: one a row, finite.
        keep: above 0, at most 1; the number of rows kept is that share of all, rounded, and at least 1.
        bins: at least 1, at most one a row.

    Raises:
        InputError: no rows, or an argument out of its range.
    """
    check_number("keep", keep, above=0, at_most=1)
    if not len(rows):
        raise InputError("select: there are no rows")
    if not 1 <= bins <= len(rows):
        raise InputError(
            f"bins = {bins!r} is out of range: give a number from 1 to {len(rows)}, one pool a row"
        )
    if not np.isfinite(scores).all():
        raise InputError("select: a score is not finite")
    order = np.argsort(-scores, kind="stable")
    edges = np.linspace(0, len(rows), bins + 1).round().astype(int)
    # Rounded over all pools before it, so that the shares of pools add up to that of the whole.
    whole = max(1, round(keep * len(rows)))
    ends = np.floor(edges * whole / len(rows) + 0.5).astype(int)
    kept = [order[start : start + taken] for start, taken in zip(edges[:-1], np.diff(ends), strict=True)]
    return [rows[i] for i in np.sort(np.concatenate(kept))]
