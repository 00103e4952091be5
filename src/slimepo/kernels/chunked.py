"""`linear_logps` in plain PyTorch with the logits of one chunk of rows alive at a time.

With a frozen head every row's input gradient is known up to a factor as soon as its logits are: it is computed
in the forward pass and scaled in the backward pass, so that the logits are computed once. A head that trains
has its logits computed again in the backward pass, and its gradient is summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits alive at once: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24


def linear_logps_chunked(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    compute_dtype: torch.dtype,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """As `linear_logps_naive`; matrix products run in `compute_dtype`, everything after them in float32 or wider."""
    rows = max(1, chunk_elements // weight_VH.shape[0])
    return _ChunkedLogps.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden_NH, weight_VH, bias_V, targets_N, softcap, scale, compute_dtype, rows
    )


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            head = (weight.to(dtype), None if bias is None else bias.to(dtype))
            trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
            keeps_gradient = ctx.needs_input_grad[0] and not trains_head
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
            lse = torch.empty_like(logps)
            slope = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if keeps_gradient else None
            for part in _parts(len(hidden), rows):
                logits, capped = _logits(hidden[part].to(dtype), head, softcap, scale, wide)
                lse[part] = logits.logsumexp(dim=-1)
                logps[part] = logits.gather(1, targets[part, None]).squeeze(1) - lse[part]
                if slope is not None:
                    gradient = _logit_gradient(logits, lse[part], capped, targets[part], scale)
                    slope[part] = gradient.to(dtype) @ head[0]
        ctx.settings = (softcap, scale, dtype, wide, rows)
        ctx.save_for_backward(*((slope,) if slope is not None else (hidden, weight, bias, targets, lse)))
        return logps

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if len(ctx.saved_tensors) == 1:
            (slope,) = ctx.saved_tensors
            return ((slope * grad_N[:, None]).to(slope.dtype), None, None, *nothing)
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        softcap, scale, dtype, wide, rows = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head = (weight.to(dtype), None if bias is None else bias.to(dtype))
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        d_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(hidden), rows):
                inputs = hidden[part].to(dtype)
                logits, capped = _logits(inputs, head, softcap, scale, wide)
                gradient = _logit_gradient(logits, lse[part], capped, targets[part], scale)
                gradient.mul_(grad_N[part, None])
                if d_bias is not None:
                    d_bias += gradient.sum(dim=0)
                narrow = gradient.to(dtype)
                if d_hidden is not None:
                    d_hidden[part] = (narrow @ head[0]).to(d_hidden.dtype)
                if d_weight is not None:
                    _add_product(d_weight, narrow, inputs)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            *nothing,
        )


def _parts(total: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def _logits(
    hidden: Tensor, head: tuple[Tensor, Tensor | None], softcap: float | None, scale: float, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Adjusted logits of a chunk, and tanh of the capped ones, which their derivative needs."""
    logits = torch.nn.functional.linear(hidden, *head).to(wide)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is None:
        return logits, None
    capped = logits.div_(softcap).tanh_()
    return capped * softcap, capped


def _logit_gradient(
    logits: Tensor, lse: Tensor, capped: Tensor | None, targets: Tensor, scale: float
) -> Tensor:
    """d logp / d raw logits, written over `logits`: (one-hot - softmax) times the slope of cap and scale."""
    gradient = logits.sub_(lse[:, None]).exp_().neg_()
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    if capped is not None:
        gradient.mul_(1 - capped.square())
    return gradient.mul_(scale) if scale != 1.0 else gradient


def _add_product(total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """total += gradient.T @ inputs, summed in the dtype of `total`."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, inputs)
    else:
        total += gradient.T @ inputs
