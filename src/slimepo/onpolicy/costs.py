"""A cost of answers beside their reward, held under a limit by a fixed penalty: Certifiable Safe-RLHF.

The policy wanted has the highest J_R - weight * relu(J_C - limit), with the means of reward and cost over its answers
(arXiv 2510.03520); from a certain weight on it keeps J_C <= limit. The gradient is that of the rewards
r - weight * 1[J_C > limit] c, which is the batch gate. The answer gate, r - weight * relu(c - limit), is stricter: the
mean of relu(c - limit) is never less than relu(J_C - limit).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimepo.onpolicy.advantages import Array
from slimepo.onpolicy.rollouts import Rollout, by_rollout
from slimepo.onpolicy.settings import Cost


def shaped(rewards: Array, costs: Array, mean: float, cost: Cost) -> Array:
    """Rewards less the penalty, of the same shape; NaN where an answer has no reward or no cost.

    mean: J_C, the mean cost that the batch gate goes by; the answer gate does not read it.

    Example:
        >>> import numpy as np
        >>> from slimepo.onpolicy.costs import shaped
        >>> from slimepo.onpolicy.settings import Cost
        >>> rewards, costs = np.array([1.0, 0.5]), np.array([1.0, 0.0])
        >>> shaped(rewards, costs, 0.5, Cost(limit=0.25, weight=2.0, gate="answer")).tolist()
        [-0.5, 0.5]
        >>> shaped(rewards, costs, 0.5, Cost(limit=0.25, weight=2.0, gate="batch")).tolist()
        [-1.0, 0.5]
    """
    above = np.maximum(costs - cost.limit, 0.0) if cost.gate == "answer" else (mean > cost.limit) * costs
    return rewards - cost.weight * above


def penalised(rollout: Rollout, mean: float, cost: Cost) -> Rollout:
    """A rollout with shaped rewards, an opponent's answers by the same gate; its parts stay what they were."""
    assert rollout.costs is not None
    return replace(
        rollout,
        rewards=shaped(rollout.rewards, rollout.costs, mean, cost),
        against=rollout.against and penalised(rollout.against, mean, cost),
    )


def mean_cost(rollouts: Sequence[Sequence[float]]) -> float:
    """The mean over all answers of several rollouts, the same in whatever order they stand; NaN of none."""
    costs = [*itertools.chain(*rollouts)]
    return math.fsum(costs) / len(costs) if costs else math.nan


def costs_of(lines: Sequence[Mapping[str, Any]], steps: int) -> list[list[float]]:
    """The costs of each rollout of a file's lines, in their order; each is learnt from in so many steps."""
    return [
        [value for line in of_rollout for value in line.get("costs", []) if value is not None]
        for of_rollout in by_rollout(lines, steps)
    ]
