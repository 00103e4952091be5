"""Score held-out pairs: how likely a model finds the chosen and the rejected answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimepo.data.batch import collate, length
from slimepo.data.tokenize import TokenizedPair
from slimepo.losses.common import mean_logps
from slimepo.training.logps import install_logps, policy_logps

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PairScores:
    """Log-probs per token of each pair's answers, `[pairs]`, and of every rejected token, `[tokens]`; in nats."""

    chosen: FloatArray
    rejected: FloatArray
    rejected_tokens: FloatArray


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    rows: Sequence[TokenizedPair],
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> PairScores:
    """Score rows in eval mode, in their order; `progress(done, total)` is called after each batch."""
    install_logps(model)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]), reverse=True)
    chosen, rejected = np.zeros(len(rows)), np.zeros(len(rows))
    tokens: dict[int, FloatArray] = {}
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = collate([rows[i] for i in index])
        for key in ("input_ids", "predict_at", "targets", "slots"):
            batch[key] = batch[key].to(device)
        logps = policy_logps(model, batch)
        chosen[index] = mean_logps(logps.chosen, logps.chosen_mask).double().cpu().numpy()
        rejected[index] = mean_logps(logps.rejected, logps.rejected_mask).double().cpu().numpy()
        for place, row in enumerate(index):
            tokens[row] = logps.rejected[place][logps.rejected_mask[place]].double().cpu().numpy()
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    model.train(training)
    return PairScores(chosen, rejected, np.concatenate([tokens[i] for i in range(len(rows))]))


def summary(scores: PairScores, threshold: float) -> dict[str, float]:
    """Means over pairs; `rejected_below_floor` is the share of rejected tokens under -threshold nats."""
    margin = scores.chosen - scores.rejected
    return {
        "logps/chosen": float(scores.chosen.mean()),
        "logps/rejected": float(scores.rejected.mean()),
        "margin": float(margin.mean()),
        "accuracy": float((margin > 0).mean()),
        "rejected_below_floor": float((scores.rejected_tokens < -threshold).mean()),
    }


def chosen_fell(before: PairScores, after: PairScores) -> float:
    """Share of pairs whose chosen answer became less likely."""
    return float((after.chosen < before.chosen).mean())
