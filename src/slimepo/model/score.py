"""Score held-out pairs: how likely a model finds the chosen and the rejected answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from slimepo.data.batch import StepCollator, collate
from slimepo.data.rows import PAIR, REJECTED, Row, length
from slimepo.losses.common import mean_logps
from slimepo.model.logps import install_logps, policy_logps
from slimepo.model.modes import measuring
from slimepo.model.tryout import to_device

FloatArray = NDArray[np.float64]

# Rows that are cut into batches together; packing takes the square of their number.
_CUT_AT_ONCE = 512


@dataclass(frozen=True)
class PairScores:
    """Log-probs per token of each pair's answers, `[pairs]`, and of every rejected token of each pair; in nats.

    NaN stands where a row lacks an answer. Demonstrations have no rejected side: `rejected` and `rejected_tokens`
    are then empty.
    """

    chosen: FloatArray
    rejected: FloatArray
    rejected_tokens: list[FloatArray]


def scoring_batches(rows: Sequence[Row], collator: StepCollator) -> list[list[int]]:
    """Which rows are scored together: those of similar length, no more than the collator's micro-batches hold."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i], collator.positions), reverse=True)
    parts = [order[start : start + _CUT_AT_ONCE] for start in range(0, len(order), _CUT_AT_ONCE)]
    return [[part[i] for i in index] for part in parts for index in collator.cut([rows[i] for i in part])]


def score_pairs(
    model: nn.Module,
    rows: Sequence[Row],
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Score rows in eval mode, in their order; `progress(done, total)` is called after each batch.

    In the precision of `slimepo.model.modes.measuring`, whatever the model trains in.
    """
    install_logps(model)
    device = next(model.parameters()).device
    positions = PAIR if any(len(row.response(REJECTED)) for row in rows) else PAIR[:1]
    order = sorted(range(len(rows)), key=lambda i: length(rows[i], positions), reverse=True)
    chosen = np.zeros(len(rows))
    rejected: list[FloatArray] = [np.zeros(0)] * len(rows)
    with measuring(model) as forward:
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = to_device(collate([rows[i] for i in index], positions), device)
            logps = policy_logps(forward, batch)
            present = logps.chosen_mask.any(dim=-1)
            means = torch.where(present, mean_logps(logps.chosen, logps.chosen_mask), torch.nan)
            chosen[index] = means.double().cpu().numpy()
            if len(positions) == 2:
                values, masks = (t.cpu() for t in (logps.rejected, logps.rejected_mask))
                for place, row in enumerate(index):
                    rejected[row] = values[place][masks[place]].double().numpy()
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    if len(positions) == 1:
        return PairScores(chosen, np.zeros(0), [])
    means_of_rejected = [tokens.mean() if len(tokens) else np.nan for tokens in rejected]
    return PairScores(chosen, np.array(means_of_rejected), rejected)


def summary(scores: PairScores, threshold: float) -> dict[str, float]:
    """Means over pairs; `rejected_below_floor` is the share of a response's rejected tokens under -threshold nats."""
    if not scores.rejected_tokens:
        return {"logps/chosen": float(scores.chosen.mean())}
    margin = scores.chosen - scores.rejected
    below = [(tokens < -threshold).mean() for tokens in scores.rejected_tokens if len(tokens)]
    figures = {
        "logps/chosen": scores.chosen,
        "logps/rejected": scores.rejected,
        "margin": margin,
        "accuracy": np.where(np.isnan(margin), np.nan, margin > 0),
        "rejected_below_floor": np.array(below),
    }
    return {name: float(np.nanmean(v)) for name, v in figures.items() if not np.isnan(v).all()}


def chosen_fell(before: PairScores, after: PairScores) -> float:
    """Share of pairs whose chosen answer became less likely."""
    present = ~np.isnan(before.chosen)
    return float((after.chosen < before.chosen)[present].mean()) if present.any() else 0.0


def distributions(before: PairScores, after: PairScores) -> dict[str, dict[str, list[float]]]:
    """Histograms before and after: margins of pairs and log-probs of rejected tokens; none without rejected answers."""
    if not before.rejected_tokens or not after.rejected_tokens:
        return {}
    margins = [scores.chosen - scores.rejected for scores in (before, after)]
    tokens = [np.concatenate(scores.rejected_tokens) for scores in (before, after)]
    sides = {"margin": margins, "rejected_tokens": tokens}
    return {name: found for name, (was, now) in sides.items() if (found := histogram(was, now))}


def histogram(before: ArrayLike, after: ArrayLike, bins: int = 40) -> dict[str, list[float]]:
    """Counts in the same bins before and after; NaN is left out, and nothing is left if a side has no value.

    The bins span the middle 99 % of both sides together; the first and the last also count what lies beyond.
    """
    sides = [np.asarray(side, dtype=float) for side in (before, after)]
    sides = [side[~np.isnan(side)] for side in sides]
    if not all(len(side) for side in sides):
        return {}
    low, high = np.quantile(np.concatenate(sides), [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    counts = [np.histogram(np.clip(side, edges[0], edges[-1]), edges)[0] for side in sides]
    return {"edges": edges.tolist(), "before": counts[0].tolist(), "after": counts[1].tolist()}
