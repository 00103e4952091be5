"""What `linear_logps` holds in memory, without computing it: a stand-in for tensors that have shapes and no data.

The sizes follow `slimepo.kernels.chunked` statement by statement; a test holds the two to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimepo.kernels.chunked import CPU_TILING
from slimepo.kernels.passes import wide_dtype
from slimepo.kernels.sweep import Tiling, parts


class HeadMemory(NamedTuple):
    """Bytes of `linear_logps` besides its inputs, its log-probs and its gradients."""

    forward: int  # while the forward pass runs, on top of `saved`
    saved: int  # from the forward to the backward pass, inputs not counted
    backward: int  # while the backward pass runs


def head_memory(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    dtype: torch.dtype,
    *,
    trains_head: bool,
    softcap: bool,
    tiling: Tiling,
) -> HeadMemory:
    """Bytes that the tiles and the saved tensors take; products run in `dtype`.

    With a frozen head the hidden states' gradients `[N, H]` are saved; one that trains keeps logits within the
    tiling's budget.
    """
    (tokens, hidden), vocabulary, wants_hidden = hidden_NH.shape, len(weight_VH), hidden_NH.requires_grad
    item, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    rows, columns = _largest(tokens, tiling.rows), _largest(vocabulary, tiling.columns)
    several = vocabulary > tiling.columns
    tile, states, embeddings = rows * columns * item, rows * hidden, columns * hidden * item
    cast = embeddings if weight_VH.dtype != dtype else 0
    narrow = int(item < wide)
    # Exponentials go over the tile where they may; a soft cap needs its tanh beside them, and the tile widened.
    over, beside = (narrow + int(softcap) * (1 + narrow), 1 + int(softcap) * (1 + narrow))
    vectors = 2 * tokens * wide  # log-sum-exp and pull
    if not trains_head:
        # Mixtures: that of the tiles so far, of the last tile, and of this one.
        mixture = states * wide if wants_hidden else 0
        forward = max(
            tile * (1 + several) + cast + 2 * several * mixture,  # the next tile is made beside the last one
            tile + rows * columns * wide * over + 2 * several * mixture,
            tile + cast + (2 + several) * mixture,
        )
        saved = tokens * hidden * item if wants_hidden else 0
        return HeadMemory(forward + vectors, saved, narrow * tokens * hidden * wide if wants_hidden else 0)
    kept = min(tiling.keep, tokens * vocabulary) * item
    # A tile that is kept is not held twice.
    extra = tile if kept < tokens * vocabulary * item else 0
    forward = extra * (1 + several) + max(cast, rows * columns * wide * beside)
    one = max(
        rows * columns * wide * over,
        cast + (states * item if wants_hidden else 0),
        embeddings,
    )
    row_sum = states * wide if wants_hidden else 0
    return HeadMemory(forward, kept + vectors, max(tile - kept, 0) + one + row_sum + states * item)


def planned_linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    tiling: Tiling = CPU_TILING,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """`linear_logps` in shapes and memory alone, `[N]`: what is in its tensors means nothing.

    `dtype` is that of the products (default: that of `hidden`); the scale needs no memory. Both passes make their
    tensors inside `within()`.
    """
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    memory = head_memory(
        hidden, weight, dtype or hidden.dtype,
        trains_head=trains_head, softcap=softcap is not None, tiling=tiling,
    )  # fmt: skip
    return _PlannedLogps.apply(hidden, weight, bias, targets, memory, within)  # type: ignore[no-any-return, no-untyped-call]


class _PlannedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        memory: HeadMemory,
        within: Callable[[], AbstractContextManager[object]],
    ) -> Tensor:
        with within():
            logps = hidden.new_empty(len(hidden), dtype=wide_dtype(hidden.dtype))
            saved = hidden.new_empty(memory.saved, dtype=torch.uint8)
            hidden.new_empty(memory.forward, dtype=torch.uint8)
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(saved, *((hidden, targets) if trains else ()))
        ctx.inputs = [
            (tensor.shape, tensor.dtype) if tensor is not None and wanted else None
            for tensor, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        ctx.trains, ctx.memory, ctx.within = trains, memory, within
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.within():
            # The head's gradient is summed in float32; the other tensors keep their dtypes.
            dtypes = [wanted and wanted[1] for wanted in ctx.inputs]
            sums = [dtypes[0], *(dtype and wide_dtype(dtype) for dtype in dtypes[1:])]
            gradients = [
                None if wanted is None else grad_N.new_empty(wanted[0], dtype=dtype)
                for wanted, dtype in zip(ctx.inputs, sums, strict=True)
            ]
            grad_N.new_empty(ctx.memory.backward, dtype=torch.uint8)
            cast = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        return *cast, None, None, None


def _largest(total: int, size: int) -> int:
    return max((part.stop - part.start for part in parts(total, size)), default=0)
