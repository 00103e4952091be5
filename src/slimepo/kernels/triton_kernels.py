# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are written in Triton's language: the arguments are pointers and blocks, which Python has no types for.
"""The passes over a tile as Triton kernels: float32 arithmetic (or wider) on tiles of any float type."""

import triton
import triton.language as tl


@triton.jit
def adjust(raw, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    logit = raw * SCALE
    if SOFTCAP > 0:
        # Triton's own language has no tanh; written as 2 sigmoid(2x) - 1 it would be half as far off again.
        falling = tl.exp(tl.abs(logit) * (-2 / SOFTCAP))
        capped = SOFTCAP * ((1 - falling) / (1 + falling))
        logit = tl.where(logit < 0, -capped, capped)
    return logit


@triton.jit
def finite(x):
    """Never so low that a difference of two such numbers is infinite or NaN."""
    return tl.maximum(x, -8e37)


@triton.jit
def with_slope(exps, logit, SOFTCAP: tl.constexpr):
    if SOFTCAP > 0:
        ratio = logit / SOFTCAP
        exps = exps * (1 - ratio * ratio)
    return exps


@triton.jit
def sums_kernel(
    raw_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    squared_ptr,
    columns,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITE: tl.constexpr,
    STATS: tl.constexpr,
):
    """One row: the online softmax of flash attention, and with WRITE the exponentials over the logits."""
    wide = total_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    row_ptr = raw_ptr + row * stride
    lane = tl.arange(0, BLOCK)
    maximum = tl.full((), float("-inf"), wide)
    top = finite(maximum)
    total = tl.zeros((), wide)
    weighted = tl.zeros((), wide)
    squared = tl.zeros((), wide)
    for start in range(0, columns, BLOCK):
        there = start + lane < columns
        raw = tl.load(row_ptr + start + lane, mask=there, other=float("-inf")).to(wide)
        maximum = tl.maximum(maximum, tl.max(raw, axis=0))
        new_top = finite(adjust(maximum, SCALE, SOFTCAP))
        down = top - new_top
        difference = adjust(raw, SCALE, SOFTCAP) - new_top
        exps = tl.where(there, tl.exp(difference), 0.0)
        if STATS:
            weighted = (weighted + total * down) * tl.exp(down) + tl.sum(exps * finite(difference), axis=0)
            squared = squared * tl.exp(2 * down) + tl.sum(exps * exps, axis=0)
        total = total * tl.exp(down) + tl.sum(exps, axis=0)
        top = new_top
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    if STATS:
        tl.store(weighted_ptr + row, weighted)
        tl.store(squared_ptr + row, squared)
    if WRITE:
        for start in range(0, columns, BLOCK):
            there = start + lane < columns
            raw = tl.load(row_ptr + start + lane, mask=there, other=float("-inf")).to(wide)
            logit = adjust(raw, SCALE, SOFTCAP)
            tl.store(row_ptr + start + lane, with_slope(tl.exp(logit - top), logit, SOFTCAP), mask=there)


@triton.jit
def exponentials_kernel(
    raw_ptr,
    shift_ptr,
    columns,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of one row: exp(logit - shift) times the cap's slope, over the logits."""
    wide = shift_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    here_ptr = raw_ptr + row * stride + column
    raw = tl.load(here_ptr, mask=there, other=float("-inf")).to(wide)
    logit = adjust(raw, SCALE, SOFTCAP)
    exps = tl.exp(logit - tl.load(shift_ptr + row))
    tl.store(here_ptr, with_slope(exps, logit, SOFTCAP), mask=there)
