"""Log-probs to try objectives on."""

import itertools
import math
from typing import TypeVar

import torch
from torch import Tensor

from slimepo.types import LossOutput, PairLogps, SampleLogps

Logps = PairLogps | SampleLogps
AnyLogps = TypeVar("AnyLogps", PairLogps, SampleLogps)


def pairs_of(
    chosen: list[list[float]], rejected: list[list[float]], dtype: torch.dtype = torch.float64
) -> PairLogps:
    """Pairs from ragged lists; places without a token hold NaN, which no objective may read."""
    (c, cm), (r, rm) = _side(chosen, dtype), _side(rejected, dtype)
    return PairLogps(c.requires_grad_(), cm, r.requires_grad_(), rm)


def slopes(output: LossOutput, policy: PairLogps) -> tuple[Tensor, Tensor]:
    """Of the summed loss by each log-prob of the chosen and the rejected answers."""
    chosen, rejected = torch.autograd.grad(output.loss.sum(), [policy.chosen, policy.rejected])
    return chosen, rejected


def ratios_of(chosen: float, rejected: float) -> tuple[PairLogps, PairLogps]:
    """Policy and reference of one pair with one token a side, whose log-ratios are the given ones (or nearly so)."""
    return pairs_of([[chosen - 40.0]], [[rejected - 40.0]]), pairs_of([[-40.0]], [[-40.0]])


def random_pairs(pairs: int = 8, seed: int = 0, scale: float = 3.0) -> PairLogps:
    """Float64 log-probs between -scale and 0, ragged, on 6 and 5 places."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for width in (6, 5):
        lengths = torch.randint(1, width + 1, (pairs, 1), generator=generator)
        mask = torch.arange(width) < lengths
        sides += [-scale * torch.rand(pairs, width, generator=generator, dtype=torch.float64), mask]
    return PairLogps(*sides)


def samples_of(logps: list[list[float]], dtype: torch.dtype = torch.float64) -> SampleLogps:
    """Samples from ragged lists, as `pairs_of`."""
    values, mask = _side(logps, dtype)
    return SampleLogps(values.requires_grad_(), mask)


def random_samples(responses: int = 8, seed: int = 0, scale: float = 3.0) -> SampleLogps:
    """The chosen side of `random_pairs`."""
    pairs = random_pairs(responses, seed, scale)
    return SampleLogps(pairs.chosen, pairs.chosen_mask)


def sides(policy: Logps) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and mask of each side; samples have one."""
    tensors = [*vars(policy).values()]
    return [*zip(tensors[::2], tensors[1::2], strict=True)]


def with_logps(policy: AnyLogps, *values: Tensor) -> AnyLogps:
    """The same masks with other log-probs, one tensor a side; of samples too."""
    return type(policy)(*itertools.chain(*zip(values, (mask for _, mask in sides(policy)), strict=True)))


def rows(policy: AnyLogps, index: Tensor | slice) -> AnyLogps:
    """Some of the pairs, or of the samples."""
    return type(policy)(*(value[index] for value in vars(policy).values()))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _side(given: list[list[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = max(map(len, given)) + 1
    values = torch.full((len(given), width), math.nan, dtype=dtype)
    mask = torch.zeros(len(given), width, dtype=torch.bool)
    for i, row in enumerate(given):
        values[i, : len(row)] = torch.tensor(row, dtype=dtype)
        mask[i, : len(row)] = True
    return values, mask


# r(w) = (-1 - 2) - (-2 - 3) = 2 over two tokens, r(l) = -4 - (-1) = -3 over one.
POLICY = pairs_of([[-1.0, -2.0]], [[-4.0]])
REFERENCE = pairs_of([[-2.0, -3.0]], [[-1.0]])
