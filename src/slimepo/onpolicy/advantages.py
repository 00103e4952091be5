"""Advantages from rewards: pure functions of numbers.

Rewards are `[prompts, samples]`, a group of samples a row; NaN is a sample that does not count, and stays NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from slimepo.onpolicy.settings import Estimator

Array = npt.NDArray[np.float64]

# Added to a group's standard deviation, and the least variance that whitening divides by, as in TRL and OpenRLHF.
_SPREAD = 1e-4
_LEAST_VARIANCE = 1e-8


def group_advantages(rewards: Array, estimator: Estimator) -> Array:
    """One advantage a sample, `[prompts, samples]`.

    group: (r - mean) / (std + 1e-4) with the sample's standard deviation (n - 1), as TRL has it; centered and
    baseline-returns: r - mean; leave-one-out: r minus the mean of the group's others; returns: r. A group of one has
    nothing to be compared with: its advantage is 0 but for returns.

    Example:
        >>> import numpy as np
        >>> from slimepo.onpolicy.advantages import group_advantages
        >>> rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
        >>> group_advantages(rewards, "group").round(4)
        array([[ 1.4997, -0.4999, -0.4999, -0.4999]])
        >>> group_advantages(rewards, "leave-one-out").round(4)
        array([[ 1.    , -0.3333, -0.3333, -0.3333]])
    """
    if estimator in ("returns", "gae"):
        return rewards
    counts = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        # A group without any sample has no mean.
        warnings.simplefilter("ignore", RuntimeWarning)
        centered: Array = rewards - np.nanmean(rewards, axis=1, keepdims=True)
        if estimator == "group":
            spread = np.nanstd(rewards, axis=1, ddof=1, keepdims=True)
            normalized: Array = np.where(counts > 1, centered / (spread + _SPREAD), 0 * centered)
            return normalized
    if estimator == "leave-one-out":
        # r - (n mean - r) / (n - 1) = n / (n - 1) (r - mean)
        others: Array = centered * counts / np.maximum(counts - 1, 1)
        return others
    return centered


def preferences(rewards: Array, opponents: Array | None = None) -> Array:
    """How likely each sample is to be preferred to an opponent's answer, less 1/2: `[prompts, samples]`.

    P(y > y') = sigma(r - r') (Bradley-Terry), averaged over the opponents, whose rewards are `[prompts, opponents]`,
    or over the group's others where there are none. A sample without any opponent has 0.

    Example:
        >>> import numpy as np
        >>> from slimepo.onpolicy.advantages import preferences
        >>> preferences(np.array([[1.0, 0.0]]), np.array([[0.0, 0.0]])).round(4)  # sigma(1) - 1/2, twice
        array([[0.2311, 0.    ]])
        >>> preferences(np.array([[1.0, 0.0, 0.0]])).round(4)
        array([[ 0.2311, -0.1155, -0.1155]])
    """
    others = rewards if opponents is None else opponents
    # sigma(x) - 1/2
    won = np.tanh((rewards[:, :, None] - others[:, None, :]) / 2) / 2
    if opponents is None:
        won[:, np.arange(won.shape[1]), np.arange(won.shape[1])] = np.nan
    compared = ~np.isnan(won)
    means: Array = np.where(compared, won, 0).sum(axis=2) / compared.sum(axis=2).clip(min=1)
    return np.where(np.isnan(rewards), np.nan, means)


def token_rewards(last: Sequence[float], of_tokens: Sequence[Array]) -> list[Array]:
    """The reward at each token of each response, `[tokens]`: its own, and at the last token that of the response."""
    result = []
    for reward, own in zip(last, of_tokens, strict=True):
        rewards = own.astype(np.float64)
        if len(rewards):
            rewards[-1] += reward
        result.append(rewards)
    return result


def returns(last: Sequence[float], of_tokens: Sequence[Array]) -> list[Array]:
    """For each response the sum of the rewards to come at each of its tokens, `[tokens]` (see `token_rewards`)."""
    return [rewards[::-1].cumsum()[::-1] for rewards in token_rewards(last, of_tokens)]


def whitened(values: Sequence[Array], add_up: Callable[[Array], Array] = lambda sums: sums) -> list[Array]:
    """Values of all tokens of a step with mean 0 and variance 1 (the population's, at least 1e-8, as in OpenRLHF).

    values: `[tokens]` a response; add_up: sums over all ranks, where there are several.

    Example:
        >>> import numpy as np
        >>> from slimepo.onpolicy.advantages import whitened
        >>> [v.round(4).tolist() for v in whitened([np.array([0.5, 0.5]), np.array([-0.5]), np.zeros(1), np.zeros(4)])]
        [[1.4596, 1.4596], [-1.8766], [-0.2085], [-0.2085, -0.2085, -0.2085, -0.2085]]
    """
    flat = np.concatenate([*values, np.zeros(0)])
    count, total = add_up(np.array([len(flat), flat.sum()]))
    mean = total / max(count, 1)
    # From the deviations: the difference of two large sums would lose digits.
    (squares,) = add_up(np.array([((flat - mean) ** 2).sum()]))
    scale = max(squares / max(count, 1), _LEAST_VARIANCE) ** -0.5
    return [(each - mean) * scale for each in values]


def gae(rewards: Array, values: Array, *, discount: float = 1.0, decay: float = 0.95) -> Array:
    """Generalised advantage estimates of one response's tokens, `[tokens]` (arXiv 1506.02438, Eq. 16).

    rewards, values: `[tokens]`; behind the last token the value is 0.

    Example:
        >>> import numpy as np
        >>> from slimepo.onpolicy.advantages import gae
        >>> gae(np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.6, 0.7])).round(5).tolist()
        [0.46575, 0.385, 0.3]
    """
    ahead = np.append(values[1:], 0.0)
    surprises = rewards + discount * ahead - values
    result, running = np.zeros_like(surprises), 0.0
    for t in range(len(surprises) - 1, -1, -1):
        running = surprises[t] + discount * decay * running
        result[t] = running
    return result
