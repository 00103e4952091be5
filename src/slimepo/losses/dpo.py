"""Objectives on the margin of two log-ratios to a reference model: DPO and its kin.

Write r for a response's log-ratio to the reference, summed over its tokens, and h = beta (r_w - r_l). Three options
change what is compared, in all of them but `chi_po` (`dpo` says how): `f_divergence`, `f_alpha` and `ld_alpha`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses.common import (
    LogRatios,
    check_choice,
    check_number,
    exp_then_line,
    log_ratios,
    masked,
    pair_metrics,
    reward_metrics,
    token_counts,
)
from slimepo.types import LossOutput, PairLogps

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def dpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float | None = None,
    ld_alpha: float = 1.0,
) -> LossOutput:
    """Direct preference optimisation: L = -log sigma(h).

    arXiv 2305.18290, Eq. 7. With `label_smoothing` e the conservative form, -(1 - e) log sigma(h) - e log sigma(-h).

    Args:
        beta: > 0, strength of the tie to the reference.
        label_smoothing: 0 <= e < 0.5, the share of labels taken to be wrong.
        length_normalized: True takes means over tokens ('sigmoid_norm').
        f_divergence: the tie's divergence; f'(pi / pi_ref) stands for r (arXiv 2309.16240):
            reverse_kl r; forward_kl 1 - exp(-r); js_divergence log 2 + log sigma(r); alpha_divergence
            (exp((a - 1) r) - 1) / (a - 1). Beyond e^20 an exponential goes on along its tangent.
        f_alpha: a of alpha_divergence; 1 is reverse_kl.
        ld_alpha: 0 <= a <= 1, how much tokens count, under both models, that stand behind the end of the shorter
            response (LD-DPO, arXiv 2409.06411).

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the implicit rewards, whose difference is h.

    Example:
        >>> from slimepo.losses import dpo
        >>> from slimepo.losses.example import after, before
        >>> dpo(after, before, beta=0.5).loss  # log-ratios 1 and -1: softplus(-0.5 * (1 + 1))
        tensor([0.3133])
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    chosen, rejected = _rewards(policy, reference, beta, f_divergence, f_alpha, ld_alpha, length_normalized)
    loss = smoothed_logistic(chosen - rejected, label_smoothing)
    return LossOutput(loss, pair_metrics(policy) | reward_metrics(chosen, rejected))


def robust(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float | None = None,
    ld_alpha: float = 1.0,
) -> LossOutput:
    """Robust DPO: L = (-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2e).

    An unbiased estimate of what `dpo` would be with the right labels, of which a share e was flipped (arXiv
    2403.00409). It has no lower bound for e > 0.

    Args:
        beta: > 0, strength of the tie to the reference.
        label_smoothing: 0 <= e < 0.5; its authors try 0.1. With 0 it is `dpo`.
        f_divergence, f_alpha, ld_alpha: as of `dpo`.

    Returns:
        as of `dpo`.

    Example:
        >>> from slimepo.losses import robust
        >>> from slimepo.losses.example import after, before
        >>> robust(after, before, beta=0.5, label_smoothing=0.25).loss  # (0.75 * 0.3133 - 0.25 * 1.3133) / 0.5
        tensor([-0.1867])
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    chosen, rejected = _rewards(policy, reference, beta, f_divergence, f_alpha, ld_alpha)
    h, e = chosen - rejected, label_smoothing
    loss = (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)
    return LossOutput(loss, pair_metrics(policy) | reward_metrics(chosen, rejected))


def exo_pair(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float | None = None,
    ld_alpha: float = 1.0,
) -> LossOutput:
    """Efficient exact optimisation of a pair: the KL of (sigma(h), sigma(-h)) from (1 - e, e).

    L = sigma(h) (log sigma(h) - log(1 - e)) + sigma(-h) (log sigma(-h) - log e) (arXiv 2402.00856, Eq. 16).

    Args:
        beta: > 0, strength of the tie to the reference.
        label_smoothing: 0 < e < 0.5; the best margin is h = log((1 - e) / e).
        f_divergence, f_alpha, ld_alpha: as of `dpo`.

    Returns:
        as of `dpo`.

    Example:
        >>> from slimepo.losses import exo_pair
        >>> from slimepo.losses.example import after, before
        >>> exo_pair(after, before, beta=0.5, label_smoothing=0.25).loss  # .731 log(.731 / .75) + .269 log(.269 / .25)
        tensor([0.0009])
    """
    check_number("label_smoothing", label_smoothing, above=0, below=0.5)
    chosen, rejected = _rewards(policy, reference, beta, f_divergence, f_alpha, ld_alpha)
    h, e = chosen - rejected, label_smoothing
    right, wrong = F.logsigmoid(h), F.logsigmoid(-h)
    loss = right.exp() * (right - math.log1p(-e)) + wrong.exp() * (wrong - math.log(e))
    return LossOutput(loss, pair_metrics(policy) | reward_metrics(chosen, rejected))


def hinge(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float | None = None,
    ld_alpha: float = 1.0,
) -> LossOutput:
    """The hinge of SLiC on DPO's margin: L = max(0, 1 - h).

    arXiv 2305.10425, with the log-ratios of arXiv 2309.06657 for its log-probs. Pairs past the margin 1 have no
    slope.

    Args:
        beta: > 0; the margin of log-ratios aimed at is 1 / beta.
        f_divergence, f_alpha, ld_alpha: as of `dpo`.

    Returns:
        as of `dpo`.

    Example:
        >>> from slimepo.losses import hinge
        >>> from slimepo.losses.example import after, before
        >>> hinge(after, before, beta=0.25).loss  # 1 - 0.25 * (1 + 1)
        tensor([0.5000])
    """
    chosen, rejected = _rewards(policy, reference, beta, f_divergence, f_alpha, ld_alpha)
    return LossOutput(
        F.relu(1 - (chosen - rejected)), pair_metrics(policy) | reward_metrics(chosen, rejected)
    )


def discopop(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    temperature: float = 0.05,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float | None = None,
    ld_alpha: float = 1.0,
) -> LossOutput:
    """Discovered preference optimisation: a logistic and an exponential loss, blended by the margin itself.

    L = -(1 - s) log sigma(h) + s exp(-h) with s = sigma(h / temperature) (arXiv 2406.08414, Eq. 5).

    Args:
        beta: > 0, strength of the tie to the reference.
        temperature: > 0, width of the blend.
        f_divergence, f_alpha, ld_alpha: as of `dpo`.

    Returns:
        as of `dpo`.

    Example:
        >>> from slimepo.losses import discopop
        >>> from slimepo.losses.example import after, before
        >>> discopop(after, before, beta=0.5).loss  # h = 1 is far past it: exp(-1)
        tensor([0.3679])
    """
    check_number("temperature", temperature, above=0)
    chosen, rejected = _rewards(policy, reference, beta, f_divergence, f_alpha, ld_alpha)
    h = chosen - rejected
    share = torch.sigmoid(h / temperature)
    # exp(-h) counts where h is positive alone, but its gradient must be finite everywhere.
    loss = -F.logsigmoid(h) * (1 - share) + exp_then_line(-h) * share
    return LossOutput(loss, pair_metrics(policy) | reward_metrics(chosen, rejected))


def ipo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    tau: float = 0.1,
    length_normalized: bool = True,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float | None = None,
    ld_alpha: float = 1.0,
) -> LossOutput:
    """Identity preference optimisation: L = (d_w - d_l - 1 / (2 tau))^2.

    With d a response's log-ratio to the reference per token (arXiv 2310.12036, Eq. 17, which sums over tokens; the
    mean is what its authors ran, as TRL reports).

    Args:
        tau: > 0; the margin aimed at is 1 / (2 tau), in nats per token.
        length_normalized: False takes sums over tokens.
        f_divergence, f_alpha, ld_alpha: as of `dpo`.

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the implicit rewards tau * d.

    Example:
        >>> from slimepo.losses import ipo
        >>> from slimepo.losses.example import after, before
        >>> ipo(after, before, tau=0.5).loss  # log-ratios per token 0.5 and -1: (1.5 - 1) ** 2
        tensor([0.2500])
    """
    check_number("tau", tau, above=0)
    scores = _scores(policy, reference, f_divergence, f_alpha, ld_alpha, length_normalized)
    return LossOutput(
        (scores.chosen - scores.rejected - 1 / (2 * tau)) ** 2,
        pair_metrics(policy) | reward_metrics(tau * scores.chosen, tau * scores.rejected),
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
        >>> from slimepo.losses import chi_po
        >>> from slimepo.losses.example import after, before
        >>> chi_po(after, before, beta=0.5).loss  # log-ratios 1 and -1: softplus(-0.5 * (e + 1 - 1 / e + 1))
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


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(h) - e log sigma(-h), the logistic loss with a share e of flipped labels."""
    # In one piece: log(sigmoid(h)) is log(0) for a very negative h, where this is h and its slope 1.
    loss = -F.logsigmoid(margin)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)


def _rewards(
    policy: PairLogps,
    reference: PairLogps,
    beta: float,
    f_divergence: str,
    f_alpha: float | None,
    ld_alpha: float,
    length_normalized: bool = False,
) -> LogRatios:
    """beta times the scores of both responses, `[pairs]`."""
    check_number("beta", beta, above=0)
    scores = _scores(policy, reference, f_divergence, f_alpha, ld_alpha, length_normalized)
    return LogRatios(beta * scores.chosen, beta * scores.rejected)


def _scores(
    policy: PairLogps,
    reference: PairLogps,
    f_divergence: str,
    f_alpha: float | None,
    ld_alpha: float,
    length_normalized: bool,
) -> LogRatios:
    """What stands for log pi / pi_ref of each response under the options of `dpo`, `[pairs]`."""
    check_choice(
        "f_divergence", f_divergence, ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    )
    if (f_alpha is not None) != (f_divergence == "alpha_divergence"):
        raise InputError(
            "f_alpha goes with f_divergence: alpha_divergence, which needs it: give both, such as 0.5"
        )
    check_number("ld_alpha", ld_alpha, at_least=0, at_most=1)
    if ld_alpha < 1:
        policy, reference = (_with_light_tails(logps, policy, ld_alpha) for logps in (policy, reference))
    scores = LogRatios(*(_f_prime(r, f_divergence, f_alpha) for r in log_ratios(policy, reference)))
    if not length_normalized:
        return scores
    masks = (policy.chosen_mask, policy.rejected_mask)
    return LogRatios(*(score / token_counts(mask, score) for score, mask in zip(scores, masks, strict=True)))


def _with_light_tails(logps: PairLogps, masks: PairLogps, weight: float) -> PairLogps:
    """The log-probs, times `weight` where they stand behind the end of the shorter response of the pair."""
    sides = ((logps.chosen, masks.chosen_mask), (logps.rejected, masks.rejected_mask))
    shorter_B1 = torch.minimum(*(mask.sum(dim=-1, keepdim=True) for _, mask in sides))
    weighed = []
    for values, mask in sides:
        values_BT = masked(values, mask)
        behind_BT = (mask.cumsum(dim=-1) > shorter_B1).to(values_BT.dtype)
        weighed.append(values_BT * (1 - (1 - weight) * behind_BT))
    return PairLogps(weighed[0], masks.chosen_mask, weighed[1], masks.rejected_mask)


def _f_prime(ratio: Tensor, f_divergence: str, alpha: float | None) -> Tensor:
    """f'(exp(ratio)) up to a constant, which no margin feels."""
    match f_divergence:
        case "forward_kl":
            return 1 - exp_then_line(-ratio)
        case "js_divergence":
            return math.log(2) + F.logsigmoid(ratio)
        case "alpha_divergence" if alpha is not None and abs(alpha - 1) >= 1e-6:
            return (exp_then_line((alpha - 1) * ratio) - 1) / (alpha - 1)
        case _:
            return ratio
