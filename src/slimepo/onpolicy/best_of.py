"""The best of N samples: when enough are drawn, and which of them are set against the best."""

from __future__ import annotations

import math
from collections.abc import Sequence


def settled(rewards: Sequence[float]) -> bool:
    """Whether two samples, of one text or of two, share the best reward: more samples then seldom find a better one.

    A rule of ours: where the best was found once, as in Good and Turing's estimate, much may be unseen yet. It is for
    rewards that tell many answers apart; of right and wrong alone, two wrong answers would share the best. NaN is no
    sample.

    Example:
        >>> settled([-12.0, -10.0]), settled([-10.0, -12.0, -10.0])
        (False, True)
    """
    known = [each for each in rewards if not math.isnan(each)]
    return len(known) > 1 and sum(math.isclose(each, max(known)) for each in known) > 1


def evenly(count: int, keep: int) -> list[int]:
    """`keep` places of `count`, the first and the last among them, as even as they divide; all where there are fewer.

    Example:
        >>> evenly(9, 4), evenly(2, 4)
        ([0, 3, 5, 8], [0, 1])
    """
    if count <= keep:
        return list(range(count))
    return [round(place * (count - 1) / (keep - 1)) for place in range(keep)]
