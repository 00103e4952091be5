"""A weighted sum of objectives, as an objective: `0.8*dpo+1.0*sft`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from slimepo.errors import InputError
from slimepo.losses.common import check_number, pair_metrics
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
        >>> from slimepo.losses.weighted_sum import sum_name
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
        >>> from slimepo.losses.weighted_sum import shares_of
        >>> shares_of("0.8*dpo + 1*sft"), shares_of("dpo")
        ({'dpo': 0.8, 'sft': 1.0}, {})
    """
    if "*" not in name:
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
    return name.rpartition(":")[2].partition("/")[0]


def weighted_sum(parts: Mapping[str, Part]) -> Callable[..., LossOutput]:
    """The objective that is the sum of others' losses, each times its share, by their option keys.

    It asks for what any of them asks for. Its metrics are those of the parts, with the part's name in front of what is
    not a matter of the pair alone, and each part's own loss as `loss/NAME` (without what is averaged over tokens).

    Example:
        >>> from slimepo.losses import dpo, sft
        >>> from slimepo.losses.example import after, before
        >>> from slimepo.losses.weighted_sum import Part, weighted_sum
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
