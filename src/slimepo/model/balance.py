"""The balance loss of a mixture of experts: how far its router is from giving all experts as many tokens (2101.03961).

It is computed by transformers' own function of the architecture, inside the model's forward, and gives gradients from
there: what comes out of the forward is log-probs alone, whatever is wrapped around the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimepo.errors import InputError


def balance_coefficient(model: PreTrainedModel, wanted: float | None = None) -> float:
    """What a model's balance loss is multiplied by: `wanted`, else as its config has it where that asks for it.

    0 where nothing asks, and where transformers has no such loss for the architecture.

    Raises:
        InputError: it is wanted of a model that has none.
    """
    there = balance_function(model) is not None
    if wanted is not None:
        if wanted and not there:
            raise InputError(
                f"router_aux_loss_coef = {wanted:g}: {type(model).__name__} is no mixture of experts that transformers "
                "has a balance loss for: leave it out"
            )
        return wanted
    config = model.config.get_text_config()
    asks = there and getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0) if asks else 0.0


def balance_function(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """transformers' balance loss of a model's architecture; None where it has none."""
    if getattr(model, "num_experts_per_tok", None) is None:
        return None
    found: Callable[..., Tensor] | None = getattr(
        sys.modules[type(model).__module__], "load_balancing_loss_func", None
    )
    return found


def balance_loss(
    model: Any, router_logits: tuple[Tensor, ...], input_ids: Tensor, predict_at: Tensor, *, padded: bool
) -> Tensor:
    """The model's balance loss over the real tokens of a batch, a scalar.

    router_logits: `[B * T, experts]` of each layer that routes. predict_at: where in `input_ids` `[B, T]`, flattened,
    targets are predicted; in padded rows the last of a row's targets is its last token.
    """
    function = balance_function(model)
    assert function is not None
    mask = None
    if padded:
        rows, width = input_ids.shape
        last = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        last.scatter_reduce_(0, predict_at // width, predict_at % width + 1, "amax")
        mask = torch.arange(width, device=input_ids.device)[None] <= last[:, None]
    return function(router_logits, model.num_experts, model.num_experts_per_tok, mask)


def with_gradient_of(value: Tensor, loss: Tensor, weight: float) -> Tensor:
    """`value` unchanged, whose backward pass also sends the gradient of `weight` times `loss`, a scalar."""
    apply: Callable[..., Tensor] = _WithGradientOf.apply
    return apply(value, loss, weight)


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = torch.full_like(loss, weight)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.weight, None
