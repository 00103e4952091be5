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
        average: "sequence" averages over each response, then over rows, so that every row counts alike;
            "token" weighs every chosen token of the global batch alike, as most SFT trainers do.

    Returns:
        loss `[pairs]` (all of it in `token_loss` when `average="token"`); metrics as `pair_metrics` has them.

    Example:
        >>> import torch
        >>> from slimepo.losses import sft
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> sft(pairs).loss  # (1 + 3) / 2
        tensor([2.])
        >>> sft(pairs, average="token").token_loss  # a sum, to be divided by the tokens of the whole step
        {'chosen': tensor([4.])}
    """
    check_choice("average", average, ("sequence", "token"))
    metrics = pair_metrics(policy)
    if average == "sequence":
        return LossOutput(-mean_logps(policy.chosen, policy.chosen_mask), metrics)
    total = -sum_logps(policy.chosen, policy.chosen_mask)
    return LossOutput(torch.zeros_like(total), metrics, token_loss={"chosen": total})
