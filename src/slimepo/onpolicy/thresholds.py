"""From which difference of rewards on a self-made pair is trained on: optimistic feasible search over a grid.

A reconstruction of OFS (arXiv 2512.22313), of which the abstract alone was had: each threshold is an arm with means of
a reward and of a constraint's residual, feasible where the residual is 0 or less. Of the arms that may be feasible the
one is taken whose reward may be highest; where none may be, the one whose residual may be least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimepo.onpolicy.rollouts import by_rollout
from slimepo.onpolicy.settings import Admission

Array = NDArray[np.float64]


class Arms(NamedTuple):
    """What was seen of each arm, `[arms]` each: pulls, and sums of rewards and residuals, old ones discounted."""

    pulls: Array
    rewards: Array
    residuals: Array


def no_pulls(arms: int) -> Arms:
    """So many arms of which nothing is known."""
    return Arms(*(np.zeros(arms) for _ in range(3)))


def ask(arms: Arms, radius: float) -> int:
    """The arm to pull next: each once, then by bounds of radius * sqrt(ln t / n) around its means.

    Example:
        >>> from slimepo.onpolicy.thresholds import ask, no_pulls, tell
        >>> arms = no_pulls(2)
        >>> ask(arms, radius=0.1)
        0
        >>> ask(tell(arms, 0, reward=1.0, residual=-0.5), radius=0.1)
        1
    """
    if (arms.pulls == 0).any():
        return int(np.argmin(arms.pulls))
    beyond = radius * np.sqrt(math.log(max(arms.pulls.sum(), 1.0)) / arms.pulls)
    least = arms.residuals / arms.pulls - beyond
    if (least > 0).all():
        return int(np.argmin(least))
    return int(np.argmax(np.where(least <= 0, arms.rewards / arms.pulls + beyond, -np.inf)))


def tell(arms: Arms, arm: int, reward: float, residual: float, discount: float = 1.0) -> Arms:
    """What is known after a pull; `discount` multiplies all that was seen before, for what learns meanwhile drifts."""
    seen = Arms(*(values * discount for values in arms))
    for values, value in zip(seen, (1.0, reward, residual), strict=True):
        values[arm] += value
    return seen


class Tried(NamedTuple):
    """A rollout: its threshold's place in the grid, the mean reward of its samples, pairs for each of its prompts."""

    arm: int
    reward: float
    pairs: float


def tried(lines: Sequence[Mapping[str, Any]], settings: Admission) -> Tried:
    """What lines of `rollouts.jsonl`, of the steps of one rollout, say of it."""
    rewards = [value for line in lines for value in line["rewards"] if value is not None]
    pairs = {line["step"]: line["pairs"] for line in lines}
    arm = settings.thresholds.index(lines[0]["threshold"])
    return Tried(arm, sum(rewards) / len(rewards) if rewards else math.nan, sum(pairs.values()) / len(lines))


def all_tried(lines: Sequence[Mapping[str, Any]], settings: Admission, steps: int) -> list[Tried]:
    """The rollouts of a file's lines, in their order; each is learnt from in so many steps."""
    return [tried(of_rollout, settings) for of_rollout in by_rollout(lines, steps)]


def next_threshold(history: Sequence[Tried], settings: Admission) -> float:
    """The threshold of the next rollout: an arm's reward is what the samples' mean reward rose by until the next one,
    its residual how far it was below `share` pairs a prompt."""
    arms = no_pulls(len(settings.thresholds))
    for now, after in itertools.pairwise(history):
        gain = after.reward - now.reward
        if math.isfinite(gain):
            arms = tell(arms, now.arm, gain, settings.share - now.pairs, settings.discount)
    return settings.thresholds[ask(arms, settings.radius)]
