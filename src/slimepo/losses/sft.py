"""Supervised fine-tuning: the negative log-likelihood of the chosen answer."""

from __future__ import annotations

from typing import Literal

import torch

from slimepo.losses.common import check_choice, mean_logps, pair_metrics, sum_logps
from slimepo.types import LossOutput, PairLogps


def sft(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    average: Literal["sequence", "token"] = "sequence",
) -> LossOutput:
    """Make the chosen answer likelier: L = -bar_l(w).

    Args:
        policy: log-probs of the model in training; only the chosen side is read, `[pairs, tokens]`, in nats.
        reference: not used.
        average: "sequence" averages over each response, then over rows, so that every row counts alike;
            "token" weighs every chosen token of the global batch alike, as most SFT trainers do.

    Returns:
        loss `[pairs]` (all of it in `token_loss` when `average="token"`); metrics as `pair_metrics` has them.
    """
    check_choice("average", average, ("sequence", "token"))
    metrics = pair_metrics(policy)
    if average == "sequence":
        return LossOutput(-mean_logps(policy.chosen, policy.chosen_mask), metrics)
    total = -sum_logps(policy.chosen, policy.chosen_mask)
    return LossOutput(torch.zeros_like(total), metrics, token_loss={"chosen": total})
