"""Objectives on log-ratios to a reference model: DPO and its kin."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses.common import (
    check_choice,
    check_number,
    chosen_nll,
    mean_logps,
    pair_metrics,
    sum_logps,
    token_counts,
)
from slimepo.losses.shapes import SHAPES, SMOOTHED
from slimepo.types import LossOutput, PairLogps


class LogRatios(NamedTuple):
    """log pi(y|x) - log pi_ref(y|x) of each response, `[pairs]`, in nats."""

    chosen: Tensor
    rejected: Tensor


def log_ratios(policy: PairLogps, reference: PairLogps, length_normalized: bool = False) -> LogRatios:
    """Log-ratios of both responses, summed over tokens, or averaged with `length_normalized`."""
    chosen = sum_logps(policy.chosen, policy.chosen_mask) - sum_logps(reference.chosen, policy.chosen_mask)
    rejected = sum_logps(policy.rejected, policy.rejected_mask) - sum_logps(
        reference.rejected, policy.rejected_mask
    )
    if length_normalized:
        chosen = chosen / token_counts(policy.chosen_mask, chosen)
        rejected = rejected / token_counts(policy.rejected_mask, rejected)
    return LogRatios(chosen, rejected)


def dpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    shape: str | dict[str, float] = "sigmoid",
    length_normalized: bool = False,
    nll_weight: float = 0.0,
) -> LossOutput:
    """Direct preference optimisation: L = -log sigma(beta (r_w - r_l)).

    With r a response's log-ratio to the reference, summed over its tokens (arXiv 2305.18290, Eq. 7). With
    `label_smoothing` e, the conservative form -(1 - e) log sigma(h) - e log sigma(-h) of h = beta (r_w - r_l).

    Args:
        beta: > 0, strength of the tie to the reference.
        label_smoothing: 0 <= e < 0.5, the share of labels taken to be wrong; of the shapes sigmoid, robust, exo_pair.
        shape: another loss on the same rewards, by its name in `slimepo.losses.shapes.SHAPES` (docs/objectives.md), or
            the weights of several.
        length_normalized: True takes means over tokens.
        nll_weight: >= 0, weight of the likelihood of the chosen answer, over all chosen tokens of the global batch.

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the implicit rewards beta * r.

    Example:
        >>> import torch
        >>> from slimepo.losses import dpo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> before = PairLogps(
        ...     torch.tensor([[-2.0, -3.0]]), pairs.chosen_mask, torch.tensor([[-3.0, 0.0]]), pairs.rejected_mask
        ... )
        >>> dpo(pairs, before, beta=0.5).loss  # log-ratios 1 and -1: softplus(-0.5 * (1 + 1))
        tensor([0.3133])
    """
    check_number("beta", beta, above=0)
    check_number("label_smoothing", label_smoothing, at_least=0)
    if label_smoothing >= 0.5:
        raise InputError(f"label_smoothing = {label_smoothing!r} is out of range: give a number below 0.5")
    check_number("nll_weight", nll_weight, at_least=0)
    weights = {shape: 1.0} if isinstance(shape, str) else shape
    for name in weights:
        check_choice("shape", name, tuple(SHAPES))
    if label_smoothing and not weights.keys() & {*SMOOTHED}:
        raise InputError(f"label_smoothing is of {', '.join(SMOOTHED)}, not of shape {shape!r}: leave it out")
    if "exo_pair" in weights and not label_smoothing:
        raise InputError("shape 'exo_pair' needs a label_smoothing above 0, such as 0.001")
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference, length_normalized))
    parts = [
        weight * SHAPES[name](chosen, rejected, beta, label_smoothing) for name, weight in weights.items()
    ]
    return LossOutput(
        torch.stack(parts).sum(0),
        pair_metrics(policy) | reward_metrics(chosen, rejected),
        chosen_nll(policy, nll_weight),
    )


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


def chi_po(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    clip_low: float = -88.0,
    clip_high: float = 20.0,
) -> LossOutput:
    """Chi-squared preference optimisation: DPO with log z replaced by z + log z, z = pi(y|x) / pi_ref(y|x).

    L = -log sigma(beta (phi(r_w) - phi(r_l))) with phi(r) = exp(clip(r)) + r and r = log z summed over the tokens
    (arXiv 2407.13399, Algorithm 1).

    Args:
        beta: > 0, strength of the tie to the reference.
        clip_low, clip_high: bounds of the exponent in nats, which keep it finite.

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the implicit rewards beta * phi(r).

    Example:
        >>> import torch
        >>> from slimepo.losses import chi_po
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> before = PairLogps(
        ...     torch.tensor([[-2.0, -3.0]]), pairs.chosen_mask, torch.tensor([[-3.0, 0.0]]), pairs.rejected_mask
        ... )
        >>> chi_po(pairs, before, beta=0.5).loss  # log-ratios 1 and -1: softplus(-0.5 * (e + 1 - 1 / e + 1))
        tensor([0.1076])
    """
    check_number("beta", beta, above=0)
    check_number("clip_low", clip_low)
    check_number("clip_high", clip_high, above=clip_low)
    if clip_high > 80:
        raise InputError(f"clip_high = {clip_high!r} is out of range: above 80 nats float32 overflows")
    ratios = log_ratios(policy, reference)
    chosen, rejected = (beta * (torch.exp(r.clamp(clip_low, clip_high)) + r) for r in ratios)
    return LossOutput(
        -F.logsigmoid(chosen - rejected), pair_metrics(policy) | reward_metrics(chosen, rejected)
    )


def ipo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    tau: float = 0.1,
    length_normalized: bool = True,
) -> LossOutput:
    """Identity preference optimisation: L = (d_w - d_l - 1 / (2 tau))^2.

    With d a response's log-ratio to the reference per token (arXiv 2310.12036, Eq. 17, which sums over tokens; the
    mean is what its authors ran, as TRL reports).

    Args:
        tau: > 0; the margin aimed at is 1 / (2 tau), in nats per token.
        length_normalized: False takes sums over tokens.

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the implicit rewards tau * d.

    Example:
        >>> import torch
        >>> from slimepo.losses import ipo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> before = PairLogps(
        ...     torch.tensor([[-2.0, -3.0]]), pairs.chosen_mask, torch.tensor([[-3.0, 0.0]]), pairs.rejected_mask
        ... )
        >>> ipo(pairs, before, tau=0.5).loss  # log-ratios per token 0.5 and -1: (1.5 - 1) ** 2
        tensor([0.2500])
    """
    check_number("tau", tau, above=0)
    ratios = log_ratios(policy, reference, length_normalized)
    return LossOutput(
        (ratios.chosen - ratios.rejected - 1 / (2 * tau)) ** 2,
        pair_metrics(policy) | reward_metrics(tau * ratios.chosen, tau * ratios.rejected),
    )


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


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The implicit rewards of an objective, detached, under the names that TRL gives them."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }
