"""The elementwise passes over one tile of logits, in plain PyTorch.

A tile holds raw logits `[n, v]`: some rows, a stretch of the vocabulary, in the dtype of the matrix product.
`sums` reduces it to what the softmax of whole rows is put together from; `exponentials` turns it into the
softmax when the rows' log-sum-exp is known. Both work in float32 or wider.

Exponentials are taken to base 2: measured on a CPU, PyTorch's exp2 was four times faster than its exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)


class Adjustment(NamedTuple):
    """What happens to raw logits: `softcap * tanh(scale * raw / softcap)`, or `scale * raw` without a cap."""

    softcap: float | None
    scale: float


class TileSums(NamedTuple):
    """A tile reduced to one value a row, relative to its own largest logit, so that nothing overflows."""

    maximum: Tensor  # [n] largest raw logit, in the tile's dtype
    total: Tensor  # [n] sum over the tile of exp(logit - largest logit)
    weighted: Tensor | None  # [n] sum of exp(d) * d, with d = logit - largest logit
    squared: Tensor | None  # [n] sum of exp(2 d)


class Passes(NamedTuple):
    """One implementation of the passes.

    `sums(raw, adjustment, write, stats)`: with `write`, `raw` becomes `exp(logit - largest logit)` times
    d logit / d (scale * raw); without, it is left alone. `exponentials(raw, shift, adjustment)`: `raw` becomes
    `exp(logit - shift)` times the same slope.
    """

    sums: Callable[[Tensor, Adjustment, bool, bool], TileSums]
    exponentials: Callable[[Tensor, Tensor, Adjustment], None]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything but the matrix products."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def adjusted(raw_n: Tensor, adjustment: Adjustment) -> Tensor:
    """Logits of some raw ones, never so low that a difference of two of them, in any base, is infinite or NaN."""
    wide = raw_n.to(wide_dtype(raw_n.dtype)) * adjustment.scale
    if adjustment.softcap is not None:
        wide = torch.tanh(wide / adjustment.softcap) * adjustment.softcap
    return wide.clamp_min(torch.finfo(wide.dtype).min / 4)


def cap_slope(logit: Tensor, softcap: float | None) -> Tensor | float:
    """d logit / d (scale * raw logit), from the capped logit."""
    return 1.0 if softcap is None else 1 - (logit / softcap).square()


def _sums(raw: Tensor, adjustment: Adjustment, write: bool, stats: bool) -> TileSums:
    maximum = raw.amax(dim=1)
    in_place = write and raw.dtype == wide_dtype(raw.dtype)
    exponent, slope = _exponent(raw, adjusted(maximum, adjustment), adjustment, in_place)
    exps = torch.exp2(exponent) if stats else exponent.exp2_()
    total = exps.sum(dim=1)
    weighted = squared = None
    if stats:
        squared = torch.linalg.vecdot(exps, exps)
        # A logit of -inf adds nothing, and 0 * -inf would be NaN.
        exponent.clamp_min_(torch.finfo(exponent.dtype).min).mul_(exps)
        weighted = exponent.sum(dim=1) / LOG2_E
    if write:
        _store(raw, exps, slope)
    return TileSums(maximum, total, weighted, squared)


def _exponentials(raw: Tensor, shift_n: Tensor, adjustment: Adjustment) -> None:
    in_place = raw.dtype == wide_dtype(raw.dtype)
    exponent, slope = _exponent(raw, shift_n, adjustment, in_place)
    _store(raw, exponent.exp2_(), slope)


def _exponent(
    raw: Tensor, shift_n: Tensor, adjustment: Adjustment, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """(logit - shift) * log2(e) of a tile, over `raw` where it may be, and the soft cap's slope."""
    softcap, scale = adjustment
    wide_raw = raw.to(shift_n.dtype)
    shift = -shift_n[:, None]
    # The difference comes before the change of base: it is small where it matters, so little is rounded off.
    if softcap is None:
        out = wide_raw if in_place or wide_raw is not raw else None
        return torch.add(shift, wide_raw, alpha=scale, out=out).mul_(LOG2_E), None
    # tanh(x) = 2 sigmoid(2x) - 1: sigmoid is ten times faster than tanh here.
    tanh = (wide_raw * (2 * scale / softcap)).sigmoid_().mul_(2).sub_(1)
    exponent = torch.add(shift, tanh, alpha=softcap, out=raw if in_place else None).mul_(LOG2_E)
    return exponent, tanh.square_().neg_().add_(1)


def _store(raw: Tensor, exps: Tensor, slope: Tensor | None) -> None:
    if slope is not None:
        exps = exps.mul_(slope)
    if exps.data_ptr() != raw.data_ptr():
        raw.copy_(exps)


EAGER = Passes(_sums, _exponentials)
