"""Objectives on a policy's own samples: clipped policy gradients with given advantages.

All of them weigh a sampled response y, or its tokens, by an advantage A, and hold the ratio to the policy that sampled
it near 1. With rho the ratio of the likelihoods of what is weighed, a token or a response::

    surrogate(rho, A) = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

They differ in what is weighed, in what is averaged, and in the advantages, which slimepo.onpolicy makes of rewards.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses.common import check_choice, check_number, exp_then_line, masked, mean_logps, token_counts
from slimepo.types import LossOutput, SampleLogps


def grpo(
    policy: SampleLogps,
    behaviour: SampleLogps,
    advantages: Tensor,
    reference: SampleLogps | None = None,
    *,
    level: Literal["token", "sequence"] = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: Literal["response", "token", "constant"] = "response",
    length: int | None = None,
    kl: float = 0.0,
    kl_times_ratio: bool = False,
) -> LossOutput:
    """Group-relative policy optimisation and its kin: a clipped surrogate a token, with a tie to a reference.

    With rho_t = exp(l_t - b_t), b_t the log-prob when the response was sampled, d_t = l_t - l_ref_t
    (arXiv 2602.02383, Eq. 3; arXiv 2402.03300)::

        L_t = surrogate(rho_t, A) + kl * (exp(-d_t) - 1 + d_t)
        L   = mean over a response's tokens of L_t, then over responses

    `level: sequence` puts exp(mean over tokens of log rho_t) in place of rho_t (GSPO, arXiv 2507.18071; Eq. 4).
    `grpo/gspo`, `grpo/dapo` (arXiv 2503.14476) and `grpo/dr` (arXiv 2503.20783) are presets.

    Args:
        policy, behaviour, reference: log-probs under the model in training, under it when it sampled, and under the
            reference, `[responses, tokens]`, in nats. `reference` is read where `kl` > 0.
        advantages: `[responses]`, or `[responses, tokens]`.
        level: what a ratio is of.
        clip_low, clip_high: >= 0, how far below and above 1 a ratio still has a slope.
        aggregation: "response" as above; "token" averages over all tokens of the global batch; "constant" sums over a
            response's tokens and divides by `length`.
        length: for "constant", the most tokens that a response may have.
        kl: >= 0, weight of the penalty.
        kl_times_ratio: multiply it by the ratio, which makes its gradient that of the reverse KL (arXiv 2512.02556).

    Returns:
        loss `[responses]`; metrics: log-prob per token, mean ratio, share of tokens (or of the response) whose
        slope is clipped away, and the penalty per token where there is one.

    Raises:
        InputError: a hyperparameter out of its range.

    Example:
        >>> import torch
        >>> from slimepo.losses import grpo
        >>> from slimepo.types import SampleLogps
        >>> mask = torch.tensor([[True, True]])
        >>> sampled = SampleLogps(torch.tensor([[-1.0, -1.0]]), mask)
        >>> now = SampleLogps(torch.tensor([[-0.7, -1.1]]), mask)
        >>> grpo(now, sampled, torch.tensor([1.0])).loss  # -(min(e^.3, 1.2) + e^-.1) / 2
        tensor([-1.0524])
        >>> grpo(now, sampled, torch.tensor([1.0]), level="sequence").loss  # -e^.1
        tensor([-1.1052])
    """
    check_choice("level", level, ("token", "sequence"))
    check_choice("aggregation", aggregation, ("response", "token", "constant"))
    check_number("kl", kl, at_least=0)
    if (aggregation == "constant") != (length is not None):
        raise InputError(
            "length goes with aggregation: constant, and that needs it: the most tokens of a response"
        )
    if length is not None:
        check_number("length", length, at_least=1)

    log_ratios_BT = _log_ratios(policy, behaviour)
    if level == "sequence":
        log_ratios_BT = (log_ratios_BT.sum(dim=-1) / token_counts(policy.mask, log_ratios_BT))[:, None]
    ratios_BT = exp_then_line(log_ratios_BT)
    loss_BT, metrics = _surrogate(policy, ratios_BT, _of_tokens(advantages, policy), clip_low, clip_high)
    if reference is not None:
        d_BT = _log_ratios(policy, reference)
        penalty_BT = exp_then_line(-d_BT) - 1 + d_BT
        metrics["kl"] = _per_response(penalty_BT.detach(), policy)
        loss_BT = loss_BT + kl * penalty_BT * (ratios_BT if kl_times_ratio else 1)
    return _aggregated(loss_BT, policy, metrics, aggregation, length)


def rloo(
    policy: SampleLogps,
    behaviour: SampleLogps,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): a response is one action.

    With rho = exp(sum over tokens of l_t - b_t)::

        L = surrogate(rho, A), averaged over responses

    Args:
        policy, behaviour: log-probs under the model in training, and under it when it sampled, `[responses, tokens]`.
        advantages: `[responses]`.
        clip_low, clip_high: >= 0, how far below and above 1 the ratio still has a slope.

    Returns:
        loss `[responses]`; metrics as those of `grpo`.

    Raises:
        InputError: a hyperparameter out of its range, or advantages by token.

    Example:
        >>> import torch
        >>> from slimepo.losses import rloo
        >>> from slimepo.types import SampleLogps
        >>> mask = torch.tensor([[True, True]])
        >>> sampled = SampleLogps(torch.tensor([[-1.0, -1.0]]), mask)
        >>> now = SampleLogps(torch.tensor([[-1.2, -1.1]]), mask)
        >>> rloo(now, sampled, torch.tensor([2.0])).loss  # -2 e^-.3
        tensor([-1.4816])
    """
    weighed = _of_responses("rloo", advantages, policy)[:, None]
    ratios = exp_then_line(_log_ratios(policy, behaviour).sum(dim=-1))[:, None]
    loss, metrics = _surrogate(policy, ratios, weighed, clip_low, clip_high)
    return LossOutput(loss.squeeze(1), metrics)


def reinforce_pp(
    policy: SampleLogps,
    behaviour: SampleLogps,
    advantages: Tensor,
    reference: SampleLogps | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: float = 0.0,
) -> LossOutput:
    """REINFORCE++ (arXiv 2501.03262): a clipped surrogate a token, averaged over all tokens of the global batch.

    With rho_t = exp(l_t - b_t) and d_t = l_t - l_ref_t::

        L_t = surrogate(rho_t, A_t) + kl * d_t^2 / 2

    Its advantages are whitened over all tokens of the step. The first form has its penalty in the reward and kl 0; the
    form with a baseline has it here.

    Args:
        policy, behaviour, reference: as those of `grpo`, `[responses, tokens]`. `reference` is read where `kl` > 0.
        advantages: `[responses, tokens]`, or `[responses]`.
        clip_low, clip_high: >= 0, how far below and above 1 a ratio still has a slope.
        kl: >= 0, weight of the penalty.

    Returns:
        loss: nothing a response; token_loss: sums `[responses]`; metrics as those of `grpo`.

    Raises:
        InputError: a hyperparameter out of its range.

    Example:
        >>> import torch
        >>> from slimepo.losses import count, reinforce_pp, step_loss
        >>> from slimepo.types import SampleLogps
        >>> mask = torch.tensor([[True, True]])
        >>> sampled = SampleLogps(torch.tensor([[-1.0, -1.0]]), mask)
        >>> now = SampleLogps(torch.tensor([[-1.1, -1.2]]), mask)
        >>> step_loss(reinforce_pp(now, sampled, torch.tensor([[1.0, 2.0]])), count(now))  # -(e^-.1 + 2 e^-.2) / 2
        tensor(-1.2711)
    """
    check_number("kl", kl, at_least=0)
    ratios_BT = exp_then_line(_log_ratios(policy, behaviour))
    loss_BT, metrics = _surrogate(policy, ratios_BT, _of_tokens(advantages, policy), clip_low, clip_high)
    if reference is not None:
        penalty_BT = _log_ratios(policy, reference) ** 2 / 2
        metrics["kl"] = _per_response(penalty_BT.detach(), policy)
        loss_BT = loss_BT + kl * penalty_BT
    return _aggregated(loss_BT, policy, metrics, "token", None)


def ppo(
    policy: SampleLogps,
    behaviour: SampleLogps,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossOutput:
    """Proximal policy optimisation (arXiv 1707.06347, Eq. 7), averaged over all tokens of the global batch.

    With rho_t = exp(l_t - b_t)::

        L_t = surrogate(rho_t, A_t)

    and with `dual_clip` c, at most -c A_t where A_t < 0 (arXiv 1912.09729), so that one token that the policy now finds
    far likelier does not carry the step.

    Args:
        policy, behaviour: log-probs under the model in training, and under it when it sampled, `[responses, tokens]`.
        advantages: `[responses, tokens]`, or `[responses]`.
        clip_low, clip_high: >= 0, how far below and above 1 a ratio still has a slope.
        dual_clip: > 1, or None for no such bound.

    Returns:
        loss: nothing a response; token_loss: sums `[responses]`; metrics as those of `grpo`.

    Raises:
        InputError: a hyperparameter out of its range.

    Example:
        >>> import torch
        >>> from slimepo.losses import count, ppo, step_loss
        >>> from slimepo.types import SampleLogps
        >>> mask = torch.tensor([[True]])
        >>> sampled = SampleLogps(torch.tensor([[-3.0]]), mask)
        >>> now = SampleLogps(torch.tensor([[-1.0]]), mask)
        >>> step_loss(ppo(now, sampled, torch.tensor([[-1.0]]), dual_clip=3.0), count(now))  # e^2, held at 3
        tensor(3.)
    """
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, above=1)
    advantages_BT = _of_tokens(advantages, policy)
    ratios_BT = exp_then_line(_log_ratios(policy, behaviour))
    loss_BT, metrics = _surrogate(policy, ratios_BT, advantages_BT, clip_low, clip_high)
    if dual_clip is not None:
        loss_BT = torch.where(advantages_BT < 0, loss_BT.minimum(-dual_clip * advantages_BT), loss_BT)
    return _aggregated(loss_BT, policy, metrics, "token", None)


def nash_md(
    policy: SampleLogps,
    advantages: Tensor,
    reference: SampleLogps,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Nash-MD-PG (arXiv 2312.00886, section 7): towards what is preferred to the answers of a mixture of policies.

    With A = P(y > y') - 1/2, y' drawn from the geometric mixture of policy and reference, log pi(y) and d = log pi(y) -
    log pi_ref(y) summed over the tokens::

        L = -A log pi(y) + beta d^2 / 2

    whose slope is that of the paper, -(A - beta d) times that of log pi(y), which estimates the slope of the KL to the
    reference without bias.

    Args:
        policy, reference: log-probs under the model in training and under the reference, `[responses, tokens]`.
        advantages: `[responses]`, how likely each is to be preferred, less 1/2.
        beta: >= 0, weight of the KL.

    Returns:
        loss `[responses]`; metrics: log-prob per token, and d per token.

    Raises:
        InputError: a hyperparameter out of its range, or advantages by token.

    Example:
        >>> import torch
        >>> from slimepo.losses import nash_md
        >>> from slimepo.types import SampleLogps
        >>> mask = torch.tensor([[True, True]])
        >>> now = SampleLogps(torch.tensor([[-1.0, -2.0]]), mask)
        >>> start = SampleLogps(torch.tensor([[-2.0, -2.0]]), mask)
        >>> nash_md(now, torch.tensor([0.25]), start).loss  # .25 * 3 + .1 * 1 / 2
        tensor([0.8000])
    """
    check_number("beta", beta, at_least=0)
    weighed = _of_responses("nash_md", advantages, policy)
    log_ratios_BT = _log_ratios(policy, reference)
    loss = (
        -weighed * masked(policy.logps, policy.mask).sum(dim=-1) + beta * log_ratios_BT.sum(dim=-1) ** 2 / 2
    )
    metrics = {"logps/sampled": policy.logps, "kl": log_ratios_BT}
    return LossOutput(loss, {name: _per_response(value.detach(), policy) for name, value in metrics.items()})


def _log_ratios(policy: SampleLogps, other: SampleLogps) -> Tensor:
    """log pi - log pi_other of every token, 0 where there is none: `[responses, tokens]`."""
    return masked(policy.logps, policy.mask) - masked(other.logps, policy.mask)


def _of_tokens(advantages: Tensor, policy: SampleLogps) -> Tensor:
    """One advantage a token, 0 where there is none: `[responses, tokens]`."""
    wide = advantages if advantages.dim() == 2 else advantages[:, None]
    return masked(wide.expand_as(policy.logps), policy.mask)


def _of_responses(loss: str, advantages: Tensor, policy: SampleLogps) -> Tensor:
    """One advantage a response, 0 for one that is not there: `[responses]`."""
    if advantages.dim() != 1:
        raise InputError(f"{loss} takes one advantage a response, not one a token")
    return masked(advantages, policy.mask.any(dim=-1))


def _surrogate(
    policy: SampleLogps, ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(rho A, clip(rho) A), in the shape of both together, and what is worth watching of each response.

    ratios and advantages: `[responses, tokens]`, or `[responses, 1]` where a response is weighed as a whole.
    """
    check_number("clip_low", clip_low, at_least=0)
    check_number("clip_high", clip_high, at_least=0)
    loss = -torch.minimum(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
    seen = ratios.detach()
    flat = ((seen > 1 + clip_high) & (advantages > 0)) | ((seen < 1 - clip_low) & (advantages < 0))
    return loss, {
        "logps/sampled": _per_response(policy.logps.detach(), policy),
        "ratio": _per_response(seen, policy),
        "clipped": _per_response(flat.to(seen.dtype), policy),
    }


def _aggregated(
    loss_BT: Tensor, policy: SampleLogps, metrics: dict[str, Tensor], aggregation: str, length: int | None
) -> LossOutput:
    sums = masked(loss_BT, policy.mask).sum(dim=-1)
    if aggregation == "token":
        return LossOutput(torch.zeros_like(sums), metrics, token_loss={"sampled": sums})
    return LossOutput(sums / (token_counts(policy.mask, sums) if length is None else length), metrics)


def _per_response(values: Tensor, policy: SampleLogps) -> Tensor:
    """Mean over the tokens of each response, `[responses]`; NaN for a response that is not there."""
    mean = mean_logps(values.expand(policy.mask.shape), policy.mask)
    return torch.where(policy.mask.any(dim=-1), mean, torch.nan)
