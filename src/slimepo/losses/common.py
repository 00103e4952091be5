"""What every objective shares: masked sums and means, the common metrics, and the reduction over a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.types import LossOutput, PairLogps, SampleLogps

_LARGEST_EXPONENT = 20.0


class Counts(NamedTuple):
    """What the sums of a step are divided by, over all micro-batches and ranks: its rows and their response tokens.

    Rows are pairs, or sampled responses. Each counts as much as its weight says; with weights of 1 these are plain
    numbers. `tokens` are by the keys of `LossOutput.token_loss`: chosen and rejected, or sampled.
    """

    rows: float
    tokens: Mapping[str, float]


def count(policy: PairLogps | SampleLogps) -> Counts:
    """The counts of one batch taken alone, as if it were the whole step.

    Example:
        >>> import torch
        >>> from slimepo.losses import count
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> count(pairs)
        Counts(rows=1, tokens={'chosen': 2.0, 'rejected': 1.0})
    """
    if isinstance(policy, SampleLogps):
        return Counts(len(policy.mask), {"sampled": float(policy.mask.sum())})
    tokens = {"chosen": float(policy.chosen_mask.sum()), "rejected": float(policy.rejected_mask.sum())}
    return Counts(len(policy.chosen_mask), tokens)


def step_loss(output: LossOutput, counts: Counts, weight: Tensor | None = None) -> Tensor:
    """The scalar that is differentiated: the weighted sum over these rows divided by the counts of the whole step.

    Added up over the micro-batches and ranks of a step this is the same number for every way to split it.

    Args:
        output: what the objective returned for these rows.
        counts: of the whole step, weighted in the same way; a step whose weights are all 0 has loss 0.
        weight: `[rows]`; None counts every row once.

    Example:
        >>> import torch
        >>> from slimepo.losses import count, cpo, step_loss
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> step_loss(cpo(pairs), count(pairs))  # softplus(0) / 1 pair + 4 / 2 chosen tokens
        tensor(2.6931)
    """
    of_tokens = [(sums, counts.tokens[side]) for side, sums in output.token_loss.items()]
    parts = [(output.loss, counts.rows), *of_tokens]
    return torch.stack(
        [(part if weight is None else part * weight).sum() / (count or 1) for part, count in parts]
    ).sum()


def masked(logps: Tensor, mask: Tensor) -> Tensor:
    """`logps` with zeros where there is no token, in at least float32 (float64 stays float64).

    Masked entries are replaced before any arithmetic (0 * NaN is NaN: a product would not do), so that NaN or
    infinity there reaches neither the value nor the gradient.
    """
    if logps.dtype not in (torch.float32, torch.float64):
        logps = logps.float()
    return torch.where(mask, logps, torch.zeros((), dtype=logps.dtype, device=logps.device))


def token_counts(mask: Tensor, like: Tensor) -> Tensor:
    """Response tokens a pair, `[pairs]`; at least 1, so that an empty response has mean 0 and not NaN."""
    return mask.sum(dim=-1).clamp(min=1).to(like.dtype)


def exp_then_line(values: Tensor) -> Tensor:
    """exp up to e^20 and its tangent from there on: finite for any log-probs, and still the right way downhill."""
    held = values.clamp(max=_LARGEST_EXPONENT)
    return held.exp() * (1 + (values - _LARGEST_EXPONENT).clamp(min=0))


def sum_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each response, `[pairs]`, in nats."""
    return masked(logps, mask).sum(dim=-1)


def mean_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """Log-probability per token of each response, `[pairs]`, in nats per token (0 for an empty one)."""
    total = sum_logps(logps, mask)
    return total / token_counts(mask, total)


def pair_metrics(policy: PairLogps) -> dict[str, Tensor]:
    """What is worth watching under any objective, each `[pairs]` and detached.

    `logps/chosen` and `logps/rejected` are nats per token; `margin` is their difference and `accuracy` whether it is
    positive. The rejected side is left out where an objective does not read it; NaN stands where a pair lacks an
    answer, and is left out of means.
    """
    chosen = _present(mean_logps(policy.chosen, policy.chosen_mask), policy.chosen_mask)
    if policy.rejected.shape[-1] == 0:
        return {"logps/chosen": chosen}
    rejected = _present(mean_logps(policy.rejected, policy.rejected_mask), policy.rejected_mask)
    margin = chosen - rejected
    return {
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "margin": margin,
        "accuracy": torch.where(margin.isnan(), margin, (margin > 0).to(margin.dtype)),
    }


def chosen_nll(policy: PairLogps, weight: float) -> dict[str, Tensor]:
    """For `token_loss`: the weighted negative log-likelihood of the chosen answers, none where it weighs nothing."""
    return {"chosen": -weight * sum_logps(policy.chosen, policy.chosen_mask)} if weight else {}


def _present(values: Tensor, mask: Tensor) -> Tensor:
    """`values` `[pairs]` where the pair has a response, NaN elsewhere; detached."""
    return torch.where(mask.any(dim=-1), values.detach(), torch.nan)


def check_number(
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuse a hyperparameter that is not a finite number in its range, naming it and the range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and at_least <= value <= at_most and above < value < below:
        return
    bounds = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
    told = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))
    raise InputError(f"{name} = {value!r} is out of range: give a finite number {told}".rstrip())


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a hyperparameter that is not one of the given words."""
    if value not in choices:
        raise InputError(f"{name} = {value!r} is unknown: give one of {', '.join(choices)}")


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


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The implicit rewards of an objective, detached, under the names that TRL gives them."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }
