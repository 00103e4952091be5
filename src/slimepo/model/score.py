"""Scoring without training: per-token numbers of any rows, and what they say of held-out pairs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from slimepo.data.batch import StepCollator, to_device
from slimepo.data.rows import CHOSEN, PAIR, REJECTED, Row, length
from slimepo.model.logps import install_logps, response_logps, token_stats
from slimepo.model.modes import Forward, scoring
from slimepo.terminal import Report

FloatArray = NDArray[np.float64]
Numbers = NDArray[np.float32]

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


def score_rows(
    forward: Forward,
    rows: Sequence[Row],
    collator: StepCollator,
    device: torch.device,
    *,
    stats: bool = False,
    report: Report | None = None,
) -> list[list[Numbers]]:
    """What a model says of each response token of rows, in the collator's batches: the one loop that only scores.

    Args:
        forward: a model's, as `slimepo.model.modes.scoring` yields it.
        rows: in any order; a response that is not there costs nothing.
        collator: its layout, its positions, and the most rows and tokens of a batch.
        device: the model's.
        stats: entropies and top1 beside the log-probs.
        report: is told how many rows are done, and of how many.

    Returns:
        For each row, in the order of `rows`, float32 `[1, tokens]` for each of the collator's positions: log-probs in
        nats. With `stats` `[3, tokens]`: log-probs, entropies in nats, and 1 where the token is the likeliest one.
    """
    nothing = np.zeros((3 if stats else 1, 0), dtype=np.float32)
    found = [[nothing] * len(collator.positions) for _ in rows]
    there = [i for i, row in enumerate(rows) if any(len(row.response(p)) for p in collator.positions)]
    done = len(rows) - len(there)
    for index in scoring_batches([rows[i] for i in there], collator):
        of_batch = [there[i] for i in index]
        batch = to_device(collator.batch([rows[i] for i in of_batch]), device)
        numbers = token_stats(forward, batch)[:3] if stats else [response_logps(forward, batch)]
        table = torch.stack([each.float() for each in numbers]).cpu().numpy()
        lengths = [count for of_position in batch["response_tokens"] for count in of_position]
        pieces = iter(np.split(table, np.cumsum(lengths)[:-1], axis=1))
        for place in range(len(collator.positions)):
            for row in of_batch:
                found[row][place] = next(pieces)
        done += len(of_batch)
        if report is not None:
            report(done, len(rows))
    return found


def score_pairs(
    model: nn.Module,
    rows: Sequence[Row],
    batch_size: int = 8,
    progress: Report | None = None,
    collator: StepCollator | None = None,
) -> PairScores:
    """Score pairs in eval mode, in their order; `progress(done, total)` is called after each batch.

    In the precision of `slimepo.model.modes.scoring`, whatever the model trains in. `collator` lays the rows out, with
    its own limits of rows and tokens; without one they are padded, `batch_size` at a time.
    """
    install_logps(model)
    laid_out = StepCollator(batch_size) if collator is None else replace(collator, positions=PAIR)
    with scoring(model) as forward:
        found = score_rows(forward, rows, laid_out, next(model.parameters()).device, report=progress)
    tokens = [[numbers[0].astype(np.float64) for numbers in of_row] for of_row in found]
    means = np.array([[each.mean() if len(each) else np.nan for each in of_row] for of_row in tokens])
    if not any(len(row.response(REJECTED)) for row in rows):
        return PairScores(means[:, CHOSEN], np.zeros(0), [])
    return PairScores(means[:, CHOSEN], means[:, REJECTED], [of_row[REJECTED] for of_row in tokens])


def add_weights(digest: Any, model: nn.Module, without: Collection[str] = ()) -> None:
    """Take a model's weights up in a digest, those left out whose names hold a part in `without`."""
    for name, tensor in model.state_dict().items():
        if any(part in name for part in without):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def add_rows(digest: Any, rows: Sequence[Row]) -> None:
    """Take the token ids of rows up in a digest."""
    for row in rows:
        digest.update(len(row.responses).to_bytes(4, "little"))
        for part in (row.prompt_ids, *row.responses):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part, dtype="<i4").data)


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
