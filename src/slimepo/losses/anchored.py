"""Objectives on log-ratios that hold the chosen answer up beside the margin."""

from __future__ import annotations

import torch.nn.functional as F

from slimepo.losses.common import check_number, log_ratios, mean_logps, pair_metrics, reward_metrics
from slimepo.losses.dpo import dpo
from slimepo.types import LossOutput, PairLogps


def rpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, eta: float = 0.2) -> LossOutput:
    """DPO with an anchor on the chosen answer: L = -log sigma(beta (r_w - r_l)) - eta * bar_l(w).

    Regularised preference optimisation (arXiv 2405.16436), with the anchor averaged over the response's tokens.

    Args:
        beta: > 0, strength of the tie to the reference.
        eta: >= 0, weight of the anchor.

    Returns:
        loss `[pairs]`; metrics: both terms, log-probs per token and the implicit rewards beta * r.

    Example:
        >>> import torch
        >>> from slimepo.losses import rpo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> before = PairLogps(
        ...     torch.tensor([[-2.0, -3.0]]), pairs.chosen_mask, torch.tensor([[-3.0, 0.0]]), pairs.rejected_mask
        ... )
        >>> rpo(pairs, before, beta=0.5, eta=0.1).loss  # 0.3133 of dpo and the anchor 0.1 * 2
        tensor([0.5133])
    """
    check_number("eta", eta, at_least=0)
    output = dpo(policy, reference, beta=beta)
    anchor = -eta * mean_logps(policy.chosen, policy.chosen_mask)
    terms = {"loss/preference": output.loss.detach(), "loss/nll": anchor.detach()}
    return LossOutput(output.loss + anchor, {**output.metrics, **terms})


def lpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.2,
    chosen_rate: float = 1.0,
    rejected_rate: float = 0.8,
    hinge_weight: float = 5.0,
) -> LossOutput:
    """Linear preference optimisation, whose two sides learn apart from each other.

    arXiv 2508.14947. With x1, x2 the log-ratios per token of the chosen and the rejected response, sg() a stopped
    gradient, r1 and r2 the two rates and o = 1 / (2 beta)::

        L = 2 beta * 2 / (r1 + r2) * (r1 |x1 - sg(x2) - o| + r2 |sg(x1) - x2 - o|) + hinge_weight * max(0, -x1)

    Args:
        beta: > 0; the offset aimed at is 1 / (2 beta), in nats per token.
        chosen_rate, rejected_rate: r1 and r2 > 0, how fast either side moves; a small r2 rejects gently.
        hinge_weight: >= 0, pull on chosen answers that have become less likely than under the reference.

    Returns:
        loss `[pairs]`; metrics: both terms, log-probs per token and the implicit rewards beta * x.

    Example:
        >>> import torch
        >>> from slimepo.losses import lpo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> before = PairLogps(
        ...     torch.tensor([[-2.0, -3.0]]), pairs.chosen_mask, torch.tensor([[-3.0, 0.0]]), pairs.rejected_mask
        ... )
        >>> lpo(pairs, before, beta=0.5, rejected_rate=1.0).loss  # x1 = 0.5, x2 = -1: |1.5 - 1| twice, no hinge
        tensor([1.])
    """
    check_number("beta", beta, above=0)
    check_number("chosen_rate", chosen_rate, above=0)
    check_number("rejected_rate", rejected_rate, above=0)
    check_number("hinge_weight", hinge_weight, at_least=0)
    x1, x2 = log_ratios(policy, reference, length_normalized=True)
    offset = 1 / (2 * beta)
    chosen = chosen_rate * (x1 - x2.detach() - offset).abs()
    rejected = rejected_rate * (x1.detach() - x2 - offset).abs()
    distance = 4 * beta / (chosen_rate + rejected_rate) * (chosen + rejected)
    hinge = hinge_weight * F.relu(-x1)
    metrics = pair_metrics(policy) | reward_metrics(beta * x1, beta * x2)
    metrics |= {"loss/preference": distance.detach(), "loss/hinge": hinge.detach()}
    return LossOutput(distance + hinge, metrics)
