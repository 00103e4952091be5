"""Objectives made of others: a weighted sum, `0.8*dpo+1.0*sft`, and one with WPO's weights, `wpo(dpo)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from slimepo.errors import InputError
from slimepo.losses.common import check_number, mean_logps, pair_metrics
from slimepo.types import LossOutput, PairLogps


class Part(NamedTuple):
    """One objective of a sum: its share, the function, what it asks for beside the policy, and its options."""

    share: float
    function: Callable[..., LossOutput]
    asks: tuple[str, ...]
    options: Mapping[str, Any]


def sum_name(loss: str | Mapping[str, float]) -> str:
    """The name of a loss: itself, or that of the sum whose shares are given by objective.

    Raises:
        InputError: no objective, or a share that is no number >= 0.

    Example:
        >>> from slimepo.losses.composed import sum_name
        >>> sum_name({"dpo": 0.8, "sft": 1})
        '0.8*dpo+1.0*sft'
    """
    if isinstance(loss, str):
        return loss
    if not loss:
        raise InputError("loss: {} has no objective in it: give a name, or several with a share each")
    for name, share in loss.items():
        check_number(f"loss: the share of {name}", share, at_least=0)
    return "+".join(f"{float(share)!r}*{name}" for name, share in loss.items())


def shares_of(name: str) -> dict[str, float]:
    """The shares of a sum by the names of its objectives; nothing where the name is no sum's.

    Raises:
        InputError: a summand that is not SHARE*NAME, or stands there twice.

    Example:
        >>> from slimepo.losses.composed import shares_of
        >>> shares_of("0.8*dpo + 1*sft"), shares_of("dpo")
        ({'dpo': 0.8, 'sft': 1.0}, {})
    """
    if "*" not in name or weighted_by_wpo(name):
        return {}
    shares: dict[str, float] = {}
    for summand in name.split("+"):
        share, _, part = (text.strip() for text in summand.partition("*"))
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not part or not 0 <= value < float("inf"):
            raise InputError(
                f"loss {name!r}: {summand.strip()!r} is not SHARE*NAME with a number >= 0, as in 0.8*dpo+1*sft"
            )
        if part in shares:
            raise InputError(f"loss {name!r} has {part} twice: give it one share")
        shares[part] = value
    return shares


def option_key(name: str) -> str:
    """Under which key the options of an objective of a sum stand: without its preset, a user's own by its function."""
    return (weighted_by_wpo(name) or name).rpartition(":")[2].partition("/")[0]


def weighted_by_wpo(name: str) -> str:
    """The name within `wpo(NAME)`; nothing where the name is none such.

    Example:
        >>> from slimepo.losses.composed import weighted_by_wpo
        >>> weighted_by_wpo("wpo(dpo)"), weighted_by_wpo("dpo")
        ('dpo', '')
    """
    name = name.strip()
    return name[len("wpo(") : -1].strip() if name.startswith("wpo(") and name.endswith(")") else ""


def weighted_sum(parts: Mapping[str, Part]) -> Callable[..., LossOutput]:
    """The objective that is the sum of others' losses, each times its share, by their option keys.

    It asks for what any of them asks for. Its metrics are those of the parts, with the part's name in front of what is
    not a matter of the pair alone, and each part's own loss as `loss/NAME` (without what is averaged over tokens).

    Example:
        >>> from slimepo.losses import dpo, sft
        >>> from slimepo.losses.example import after, before
        >>> from slimepo.losses.composed import Part, weighted_sum
        >>> both = weighted_sum({"dpo": Part(0.5, dpo, ("reference",), {}), "sft": Part(1.0, sft, (), {})})
        >>> both(after, reference=before).loss  # half of softplus(-0.1 * 2), and (1 + 3) / 2
        tensor([2.2991])
    """

    def total(policy: PairLogps, **given: Any) -> LossOutput:
        outputs = {
            key: part.function(policy, **{ask: given[ask] for ask in part.asks})
            for key, part in parts.items()
        }
        loss = torch.stack([parts[key].share * output.loss for key, output in outputs.items()]).sum(dim=0)
        token_loss: dict[str, torch.Tensor] = {}
        metrics = pair_metrics(policy)
        for key, output in outputs.items():
            for side, sums in output.token_loss.items():
                token_loss[side] = token_loss.get(side, 0) + parts[key].share * sums
            own = {name: value for name, value in output.metrics.items() if name not in metrics}
            metrics |= {f"{key}/{name}": value for name, value in own.items()}
            metrics[f"loss/{key}"] = output.loss.detach()
        return LossOutput(loss, metrics, token_loss)

    asks = dict.fromkeys(ask for part in parts.values() for ask in part.asks)
    parameter = inspect.Parameter
    # What a table reads off an objective: what it asks for, and its options with their defaults.
    total.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in ("policy", *asks)]
        + [parameter(key, parameter.KEYWORD_ONLY, default=part.options) for key, part in parts.items()]
    )
    return total


def with_wpo_weights(function: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """An objective whose pairs weigh as much as their answers are like the policy's own: WPO (arXiv 2406.11827, eq. 2).

    Each loss is multiplied by w_w * w_l, with w = exp(mean over an answer's tokens of log p(y_t) - log sum_v p(v)^2): 1
    for an answer of which every token is as likely as a draw from the policy is on average. No gradient flows through
    the weights, and they are not divided out again. `collision` has log sum_v p(v)^2 at each token, `[pairs, T]`.

    Example:
        >>> from dataclasses import replace
        >>> import torch
        >>> from slimepo.losses import dpo
        >>> from slimepo.losses.composed import with_wpo_weights
        >>> from slimepo.losses.example import after, before
        >>> even = replace(after, chosen=torch.full((1, 2), -2.0), rejected=torch.full((1, 2), -2.0))
        >>> weighted = with_wpo_weights(dpo)(after, reference=before, collision=even)
        >>> plain = dpo(after, reference=before)
        >>> weighted.loss / plain.loss  # exp((-2 + 2) + (-4 + 2))
        tensor([0.1353])
    """

    @functools.wraps(function)
    def weighted(policy: PairLogps, *, collision: PairLogps, **given: Any) -> LossOutput:
        output = function(policy, **given)
        likeness = mean_logps(policy.chosen, policy.chosen_mask) - mean_logps(
            collision.chosen, policy.chosen_mask
        )
        likeness = likeness + mean_logps(policy.rejected, policy.rejected_mask)
        likeness = likeness - mean_logps(collision.rejected, policy.rejected_mask)
        weight = likeness.detach().exp()
        token_loss = {side: weight * sums for side, sums in output.token_loss.items()}
        return LossOutput(weight * output.loss, {**output.metrics, "wpo/weight": weight}, token_loss)

    own = inspect.signature(function)
    collision = inspect.Parameter("collision", inspect.Parameter.KEYWORD_ONLY)
    # In front of the **options that a function of one's own may take.
    parameters = sorted([*own.parameters.values(), collision], key=lambda each: each.kind)
    weighted.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return weighted
