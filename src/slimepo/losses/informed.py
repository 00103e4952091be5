"""Objectives that are told more of a pair than its log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from slimepo.losses.common import check_number, sum_logps
from slimepo.losses.dpo import dpo
from slimepo.types import LossOutput, PairLogps


def xpo(
    policy: PairLogps,
    reference: PairLogps,
    opponent: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
) -> LossOutput:
    """Exploratory preference optimisation (arXiv 2405.21046, Algorithm 1): DPO, and away from what is known already.

    Of each pair one answer is the policy's own and one, y', of an opponent, which is the reference as published. With
    log pi(y') summed over its tokens::

        L = -log sigma(beta (r_w - r_l)) + alpha * log pi(y')

    Args:
        opponent: `[pairs, 2]`, 1 where the chosen, or the rejected, response is the opponent's, else 0.
        beta: > 0, strength of the tie to the reference.
        alpha: >= 0, weight of the exploration.

    Returns:
        loss `[pairs]`; metrics: both terms, and those of `dpo`.

    Example:
        >>> import torch
        >>> from slimepo.losses import xpo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> before = PairLogps(
        ...     torch.tensor([[-2.0, -3.0]]), pairs.chosen_mask, torch.tensor([[-3.0, 0.0]]), pairs.rejected_mask
        ... )
        >>> lost = torch.tensor([[0.0, 1.0]])
        >>> xpo(pairs, before, lost, beta=0.5, alpha=0.01).loss  # 0.3133 of dpo, and 0.01 * -4
        tensor([0.2733])
    """
    check_number("alpha", alpha, at_least=0)
    output = dpo(policy, reference, beta=beta)
    sums = [sum_logps(policy.chosen, policy.chosen_mask), sum_logps(policy.rejected, policy.rejected_mask)]
    logps_B2 = torch.stack(sums, dim=-1)
    exploration = alpha * (opponent.to(logps_B2) * logps_B2).sum(dim=-1)
    terms = {"loss/preference": output.loss.detach(), "loss/exploration": exploration.detach()}
    return LossOutput(output.loss + exploration, {**output.metrics, **terms})
