"""KTO: learning from judged answers that come without a partner."""

from __future__ import annotations

import torch
from torch import Tensor

from slimepo.losses.common import check_number, log_ratios, pair_metrics
from slimepo.types import LossOutput, PairLogps


def kto(
    policy: PairLogps,
    reference: PairLogps,
    divergence: Tensor | None = None,
    *,
    beta: float = 0.1,
    reference_point: bool = True,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Kahneman-Tversky optimisation of answers judged one by one (arXiv 2402.01306, Eq. 7 and 8).

    A row has one answer: a desirable one stands on its chosen side, an undesirable one on its rejected side. With
    r the answer's log-ratio to the reference, summed over tokens, and z0 = max(0, divergence)::

        L = desirable_weight   * (1 - sigma(beta (r - z0)))      for a desirable answer
        L = undesirable_weight * (1 - sigma(beta (z0 - r)))      for an undesirable one

    Args:
        divergence: the mean of r over answers put behind prompts they do not belong to, over the whole step, a
            scalar in nats; no gradient flows through it. Asked for with `reference_point`.
        beta: > 0, strength of the tie to the reference.
        reference_point: False takes z0 = 0, APO-zero (arXiv 2408.06266, Eq. 7) of answers without a partner.
        desirable_weight, undesirable_weight: lambda_D and lambda_U >= 0.

    Returns:
        loss `[rows]` (a row with both answers has the mean of their losses, one with none 0); metrics: log-probs per
        token and rewards beta * r, NaN for the answer a row does not have; and z0, where it is not simply 0.

    Example:
        >>> import torch
        >>> from slimepo.losses import kto
        >>> from slimepo.types import PairLogps
        >>> rows = PairLogps(  # a desirable answer, and an undesirable one
        ...     chosen=torch.tensor([[-4.0], [0.0]]), chosen_mask=torch.tensor([[True], [False]]),
        ...     rejected=torch.tensor([[0.0], [-4.0]]), rejected_mask=torch.tensor([[False], [True]]),
        ... )
        >>> before = PairLogps(
        ...     torch.tensor([[-5.0], [0.0]]), rows.chosen_mask, torch.tensor([[0.0], [-3.0]]), rows.rejected_mask
        ... )
        >>> kto(rows, before, torch.tensor(0.5), beta=1.0).loss  # sigma(-(1 - 0.5)) and sigma(-(0.5 + 1))
        tensor([0.3775, 0.1824])
    """
    check_number("beta", beta, above=0)
    check_number("desirable_weight", desirable_weight, at_least=0)
    check_number("undesirable_weight", undesirable_weight, at_least=0)
    ratios = log_ratios(policy, reference)
    zero = torch.zeros((), dtype=ratios.chosen.dtype, device=ratios.chosen.device)
    z0 = zero if divergence is None else divergence.detach().to(zero).clamp(min=0)
    # 1 - sigma(x) is sigma(-x), which keeps its digits where sigma(x) is close to 1.
    desirable = desirable_weight * torch.sigmoid(-beta * (ratios.chosen - z0))
    undesirable = undesirable_weight * torch.sigmoid(-beta * (z0 - ratios.rejected))
    has_chosen, has_rejected = policy.chosen_mask.any(dim=-1), policy.rejected_mask.any(dim=-1)
    answers = (has_chosen.to(zero.dtype) + has_rejected.to(zero.dtype)).clamp(min=1)
    loss = (torch.where(has_chosen, desirable, zero) + torch.where(has_rejected, undesirable, zero)) / answers
    rewards = {
        "rewards/chosen": torch.where(has_chosen, beta * ratios.chosen.detach(), torch.nan),
        "rewards/rejected": torch.where(has_rejected, beta * ratios.rejected.detach(), torch.nan),
    }
    point = {} if divergence is None else {"z0": z0.expand_as(loss)}
    return LossOutput(loss, pair_metrics(policy) | rewards | point)
