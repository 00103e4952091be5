"""`linear_logps` in tiles: some rows by a stretch of the vocabulary, the logits of one tile alive at a time.

With a frozen head every row's input gradient is known up to a factor as soon as its logits are: the target's
embedding against the mean embedding under the softmax. It is summed in the forward sweep and scaled in the backward
pass, so that no logit is computed twice. A head that trains has its logits computed again in the backward pass,
apart from those that fit a fixed budget; its gradient is summed in float32.

The target's own gradient is 1 - p = -expm1(log p), which keeps its digits where p is close to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimepo.kernels.passes import wide_dtype
from slimepo.kernels.products import accumulate
from slimepo.kernels.sweep import Head, Job, KeptLogits, RowBlock, Tiling, locate, parts, place, sweep

# A tile of 2 MiB stays in a CPU's cache from pass to pass; a GPU wants large products.
CPU_TILING = Tiling(rows=512, columns=1024, keep=2**24)
GPU_TILING = Tiling(rows=4096, columns=16384, keep=2**26)

Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def linear_logps_chunked(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, bias_V: Tensor | None, job: Job
) -> Result:
    """Log-probs `[N]` as `linear_logps_naive`, and entropy, top1 and collision `[N]` where `job.stats` asks for them.

    Matrix products run in `job.dtype`, everything after them in float32 or wider.
    """
    if not torch.is_grad_enabled():
        # A function of its own sees that a head trains also where no gradient is wanted, and would keep its logits.
        weight_VH, bias_V = weight_VH.detach(), None if bias_V is None else bias_V.detach()
    return _ChunkedLogps.apply(hidden_NH, weight_VH, bias_V, targets_N, job)  # type: ignore[no-any-return, no-untyped-call]


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, job: Job
    ) -> Result:
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wants_hidden_grad = ctx.needs_input_grad[0] and not trains_head
        head = Head(weight, bias, job.dtype)
        kept = KeptLogits(job.tiling.keep if trains_head else 0)
        logps, lse, pull, entropy, collision = (
            hidden.new_empty(len(hidden), dtype=wide_dtype(job.dtype)) for _ in range(5)
        )
        top1 = hidden.new_empty(len(hidden), dtype=torch.bool)
        hidden_grad = hidden.new_empty(hidden.shape, dtype=job.dtype) if wants_hidden_grad else None
        whole = RowBlock(
            logps, lse, pull, entropy if job.stats else None, top1 if job.stats else None,
            collision if job.stats else None, hidden_grad,
        )  # fmt: skip
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in parts(len(hidden), job.tiling.rows):
                inputs = hidden[rows].to(job.dtype)
                block = sweep(inputs, targets[rows], head, job, wants_hidden_grad, kept, rows)
                for column, values in zip(whole, block, strict=True):
                    if column is not None and values is not None:
                        column[rows] = values
        ctx.job, ctx.kept = job, kept
        if whole.hidden_grad is not None:
            ctx.save_for_backward(whole.hidden_grad)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, whole.lse, whole.pull)
        ctx.mark_non_differentiable(
            *(t for t in (whole.entropy, whole.top1, whole.collision) if t is not None)
        )
        return whole.logps, whole.entropy, whole.top1, whole.collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (hidden_grad,) = ctx.saved_tensors
            return (hidden_grad * grad_N[:, None]).to(hidden_grad.dtype), None, None, None, None
        with torch.autocast(grad_N.device.type, enabled=False):
            return *_gradients(ctx, grad_N), None, None


def _gradients(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from logits computed again (or kept)."""
    hidden, weight, bias, targets, lse, pull = ctx.saved_tensors
    job: Job = ctx.job
    head, wide = Head(weight, bias, job.dtype), lse.dtype
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    d_hidden = torch.empty_like(hidden) if wants_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
    d_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if wants_bias else None
    for rows in parts(len(hidden), job.tiling.rows):
        inputs = hidden[rows].to(job.dtype)
        # A tile becomes softmax - onehot, against d logp / d raw = scale * (onehot - softmax): sign and scale go into
        # the factor of each row.
        step = grad_N[rows].to(wide) * -job.adjustment.scale
        stepped = (inputs * step[:, None]).to(job.dtype)
        row_sum = torch.zeros(inputs.shape, dtype=wide, device=hidden.device) if wants_hidden else None
        for columns in parts(len(weight), job.tiling.columns):
            tile = ctx.kept.take(rows, columns)
            tile = head.logits(inputs, columns) if tile is None else tile
            job.passes.exponentials(tile, lse[rows], job.adjustment)
            place(tile, *locate(targets[rows], columns), -pull[rows])
            if row_sum is not None:
                accumulate(row_sum, tile, head.embedding(columns))
            if d_weight is not None:
                accumulate(d_weight[columns], tile.T, stepped)
            if d_bias is not None:
                d_bias[columns] += tile.T.to(wide) @ step
        if d_hidden is not None and row_sum is not None:
            d_hidden[rows] = row_sum.mul_(step[:, None]).to(hidden.dtype)
    return (
        d_hidden,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )
