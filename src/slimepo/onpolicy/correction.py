"""Samples that another engine has written: how far it is from the model that trains, and weights for that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimepo.data.rows import Row
from slimepo.onpolicy.advantages import Array
from slimepo.onpolicy.settings import Correction, Rollouts


def importance_weights(
    trainer: Array, sampler: Array, mode: Correction, *, low: float | None = None, high: float | None = None
) -> Array:
    """How much the tokens of one response count that another engine has sampled: `[tokens]`, or `[1]` for all of them.

    w = exp(trainer - sampler), of a token or, in a sequence mode, of the sum over all of them. Where w is out of `low`
    to `high`, a truncate mode gives the bound and a mask mode 0. A token that the sampler gave no log-prob (NaN) has
    w = 1. A response with w = 0 still counts in what a loss divides by: as many were drawn.

    trainer, sampler: log-probs `[tokens]` under the model that trains and under what sampled.

    Example:
        >>> import numpy as np
        >>> from slimepo.onpolicy.correction import importance_weights
        >>> trainer, sampler = np.log([0.5, 0.4]), np.log([0.1, 0.5])
        >>> importance_weights(trainer, sampler, "token_truncate", high=3.0).round(3)
        array([3. , 0.8])
        >>> importance_weights(trainer, sampler, "sequence_mask", high=3.0)  # 5 x .8
        array([0.])
    """
    differences = np.nan_to_num(trainer - sampler, nan=0.0)
    if mode.startswith("sequence"):
        differences = differences.sum(keepdims=True)
    with np.errstate(over="ignore"):
        ratios: Array = np.exp(differences)
    held = ratios.clip(0.0 if low is None else low, math.inf if high is None else high)
    return held if mode.endswith("truncate") else np.where(held == ratios, ratios, 0.0)


def corrected(rows: Sequence[Row], settings: Rollouts) -> tuple[list[Row], dict[str, float]]:
    """Rows whose advantages are multiplied by the weights of what another engine sampled.

    As w >= 0 has no gradient, this multiplies the surrogate: w min(rho A, clip(rho) A) = min(rho w A, clip(rho) w A).

    rows: as `sample_rows` makes them, with `behaviour` and `sampler`; the latter is left out of what is returned.

    Returns:
        The rows, and how far the two engines are apart: mean and largest |trainer - sampler| of a token in nats, the
        mean weight, and the share of weights (of tokens, or of answers) that were out of bounds.
    """
    mode = settings.vllm_importance_sampling_mode
    low, high = settings.vllm_importance_sampling_clip_min, settings.vllm_importance_sampling_clip_max
    result, apart, weights, beyond = [], [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
    for row in rows:
        values: dict[str, Any] = dict(row.values)
        pairs = [
            (trainer.astype(np.float64), sampler.astype(np.float64))
            for trainer, sampler in zip(values["behaviour"], values.pop("sampler"), strict=True)
        ]
        of_row = [importance_weights(*pair, mode, low=low, high=high) for pair in pairs]
        weighed = [a * w for a, w in zip(values["advantages"], of_row, strict=True)]
        if mode.startswith("sequence") and not isinstance(values["advantages"], tuple):
            values["advantages"] = np.concatenate(weighed).astype(np.float32)
        else:
            values["advantages"] = tuple(each.astype(np.float32) for each in weighed)
        result.append(replace(row, values=values))
        there = [place for place, response in enumerate(row.responses) if len(response)]
        apart += [np.abs(pairs[place][0] - pairs[place][1]) for place in there]
        weights += [of_row[place] for place in there]
        beyond += [of_row[place] != importance_weights(*pairs[place], mode) for place in there]
    known = np.concatenate(apart)
    known = known[~np.isnan(known)]
    figures = {
        "sampler/mismatch": known,
        "sampler/mismatch/max": known[known == known.max(initial=0)],
        "sampler/weight": np.concatenate(weights),
        f"sampler/{'masked' if mode.endswith('mask') else 'truncated'}": np.concatenate(beyond),
    }
    return result, {name: float(each.mean()) for name, each in figures.items() if len(each)}
