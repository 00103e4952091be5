"""Log-probs to try objectives on."""

import math

import torch
from torch import Tensor

from slimepo.types import PairLogps

FIELDS = ("chosen", "chosen_mask", "rejected", "rejected_mask")


def pairs_of(
    chosen: list[list[float]], rejected: list[list[float]], dtype: torch.dtype = torch.float64
) -> PairLogps:
    """Pairs from ragged lists; places without a token hold NaN, which no objective may read."""
    (c, cm), (r, rm) = _side(chosen, dtype), _side(rejected, dtype)
    return PairLogps(c.requires_grad_(), cm, r.requires_grad_(), rm)


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


def rows(policy: PairLogps, index: Tensor | slice) -> PairLogps:
    """Some of the pairs."""
    return PairLogps(*(getattr(policy, field)[index] for field in FIELDS))


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
