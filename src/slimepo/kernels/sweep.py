"""One sweep of a block of rows over the vocabulary, a tile of logits at a time.

A row's softmax is put together from tile to tile as in flash attention: every tile is reduced relative to its own
largest logit, and the running sums are rescaled when a larger one comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimepo.kernels.passes import Adjustment, Passes, TileSums, adjusted, cap_slope
from slimepo.kernels.products import linear, product


class Tiling(NamedTuple):
    """Sizes of a tile, and how many logits a head that trains may keep from forward to backward."""

    rows: int
    columns: int
    keep: int


class Job(NamedTuple):
    """What the sweep needs to know besides its tensors."""

    adjustment: Adjustment
    dtype: torch.dtype  # of the matrix products
    passes: Passes
    tiling: Tiling
    stats: bool


class Head(NamedTuple):
    """The output embedding, cast a stretch of the vocabulary at a time."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    dtype: torch.dtype

    def embedding(self, columns: slice) -> Tensor:
        return self.weight[columns].to(self.dtype)

    def logits(self, inputs: Tensor, columns: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return linear(inputs, self.embedding(columns), bias)


class KeptLogits:
    """Raw logits of the tiles that come first, from the forward to the backward pass, within a budget."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._tiles: dict[tuple[int, int], Tensor] = {}

    def offer(self, rows: slice, columns: slice, raw: Tensor) -> None:
        if raw.numel() <= self._left:
            self._left -= raw.numel()
            self._tiles[rows.start, columns.start] = raw

    def take(self, rows: slice, columns: slice) -> Tensor | None:
        return self._tiles.pop((rows.start, columns.start), None)


class RowBlock(NamedTuple):
    """Per row: results, and what a backward pass needs. Also the whole of all blocks."""

    logps: Tensor
    lse: Tensor
    pull: Tensor  # d logp / d (scale * raw target logit): 1 - p, times the soft cap's slope
    entropy: Tensor | None
    top1: Tensor | None
    collision: Tensor | None
    hidden_grad: Tensor | None  # [n, H] d logp / d hidden


class _Running(NamedTuple):
    sums: TileSums
    mixture: Tensor | None  # [n, H] sum over the tiles so far of exp(logit - maximum) * slope * embedding


def parts(total: int, size: int) -> list[slice]:
    """Nearly equal stretches of at most `size`: no tile of one row is left over."""
    step = -(-total // -(-total // size)) if total else 1
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def sweep(
    inputs: Tensor,
    targets: Tensor,
    head: Head,
    job: Job,
    wants_hidden_grad: bool,
    kept: KeptLogits,
    rows: slice,
) -> RowBlock:
    """Log-probs (and what is asked for) of the block `rows`, whose hidden states are `inputs`."""
    running: _Running | None = None
    target = torch.full_like(inputs[:, 0], torch.nan)
    for columns in parts(len(head.weight), job.tiling.columns):
        raw = head.logits(inputs, columns)
        position, inside = locate(targets, columns)
        target = torch.where(inside, raw.gather(1, position).squeeze(1), target)
        kept.offer(rows, columns, raw)
        sums = job.passes.sums(raw, job.adjustment, wants_hidden_grad, job.stats)
        mixture = None
        if wants_hidden_grad:
            # The target's own term is left out here: it comes in at the end, with a factor that keeps its digits.
            place(raw, position, inside, raw.new_zeros(len(raw)))
            mixture = product(raw, head.embedding(columns)).to(sums.total.dtype)
        tile = _Running(sums, mixture)
        running = tile if running is None else _merged(running, tile, job.adjustment)
    assert running is not None
    return _finished(running, target, targets, head, job)


def locate(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where the targets lie in a tile: positions `[n, 1]` (any valid one for those outside), and which are inside."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(inside, targets - columns.start, 0)[:, None], inside


def place(tile: Tensor, position: Tensor, inside: Tensor, value_n: Tensor) -> None:
    """Write one value a row at the target's place, in the rows whose target is inside the tile."""
    there = tile.gather(1, position).squeeze(1)
    tile.scatter_(1, position, torch.where(inside, value_n.to(tile.dtype), there)[:, None])


def _merged(old: _Running, new: _Running, adjustment: Adjustment) -> _Running:
    maximum = torch.maximum(old.sums.maximum, new.sums.maximum)
    top = adjusted(maximum, adjustment)
    # exp(d) and d exp(d), relative to one maximum and moved to a higher one: d becomes d + down.
    down_old = adjusted(old.sums.maximum, adjustment) - top
    down_new = adjusted(new.sums.maximum, adjustment) - top
    factor_old, factor_new = down_old.exp(), down_new.exp()
    total = old.sums.total * factor_old + new.sums.total * factor_new
    weighted = squared = None
    if old.sums.squared is not None and new.sums.squared is not None:
        squared = old.sums.squared * factor_old.square() + new.sums.squared * factor_new.square()
    if old.sums.weighted is not None and new.sums.weighted is not None:
        weighted = (old.sums.weighted + old.sums.total * down_old) * factor_old
        weighted += (new.sums.weighted + new.sums.total * down_new) * factor_new
    mixture = old.mixture
    if mixture is not None and new.mixture is not None:
        mixture.mul_(factor_old[:, None]).addcmul_(new.mixture, factor_new[:, None])
    return _Running(TileSums(maximum, total, weighted, squared), mixture)


def _finished(running: _Running, target: Tensor, targets: Tensor, head: Head, job: Job) -> RowBlock:
    (maximum, total, weighted, squared), mixture = running
    softcap, scale = job.adjustment
    logit = adjusted(target, job.adjustment)
    lse = adjusted(maximum, job.adjustment) + total.log()
    # Rounding may put the target above the sum that it is part of.
    logps = (logit - lse).clamp_max_(0)
    pull = -torch.expm1(logps) * cap_slope(logit, softcap)
    hidden_grad = None
    if mixture is not None:
        own = head.weight.index_select(0, targets).to(total.dtype)
        own = own.mul_(pull[:, None]).addcdiv_(mixture, total[:, None], value=-1)
        hidden_grad = own.mul_(scale).to(job.dtype)
    # -sum p log p with log p = d - log(total); rounding may put a certain token's below 0.
    entropy = None if weighted is None else (total.log() - weighted / total).clamp_min_(0)
    # log sum p^2 with p = exp(d) / total.
    collision = None if squared is None else (squared.log() - 2 * total.log()).clamp_max_(0)
    top1 = target == maximum if job.stats else None
    return RowBlock(logps, lse, pull, entropy, top1, collision, hidden_grad)
