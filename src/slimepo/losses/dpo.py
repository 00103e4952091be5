"""Objectives on the margin of two log-ratios to a reference model: DPO and its kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from slimepo.errors import InputError
from slimepo.losses.common import (
    check_choice,
    check_number,
    chosen_nll,
    log_ratios,
    pair_metrics,
    reward_metrics,
)
from slimepo.losses.shapes import SHAPES, SMOOTHED
from slimepo.types import LossOutput, PairLogps


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
