"""Shapes of a loss on two implicit rewards, from the logistic one of DPO to those of its relatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(h) - e log sigma(-h), the logistic loss with a share e of flipped labels."""
    # In one piece: log(sigmoid(h)) is log(0) for a very negative h, where this is h and its slope 1.
    loss = -F.logsigmoid(logits)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def _robust(margin: Tensor, e: float) -> Tensor:
    return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)


def _exo(margin: Tensor, e: float) -> Tensor:
    chosen, rejected = F.logsigmoid(margin), F.logsigmoid(-margin)
    return chosen.exp() * (chosen - math.log1p(-e)) + rejected.exp() * (rejected - math.log(e))


def _discopop(margin: Tensor) -> Tensor:
    share = torch.sigmoid(margin / 0.05)
    # exp(-h) counts where h is positive alone, but its gradient must be finite everywhere.
    return -F.logsigmoid(margin) * (1 - share) + torch.exp(-margin.clamp(min=-20)) * share


# Of w and v, the implicit rewards beta r of the chosen and the rejected response, `[pairs]`; of beta; of the smoothing.
Shape = Callable[[Tensor, Tensor, float, float], Tensor]
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "sigmoid": lambda w, v, beta, e: smoothed_logistic(w - v, e),
        "hinge": lambda w, v, beta, e: F.relu(1 - (w - v)),
        "robust": lambda w, v, beta, e: _robust(w - v, e),
        "exo_pair": lambda w, v, beta, e: _exo(w - v, e),
        "nca_pair": lambda w, v, beta, e: -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-v),
        "bco_pair": lambda w, v, beta, e: -F.logsigmoid(w) - F.logsigmoid(-v),
        "sppo_hard": lambda w, v, beta, e: ((w - 0.5) ** 2 + (v + 0.5) ** 2) / beta**2,
        "apo_zero": lambda w, v, beta, e: torch.sigmoid(-w) + torch.sigmoid(v),
        "apo_down": lambda w, v, beta, e: torch.sigmoid(w) + torch.sigmoid(v - w),
        "discopop": lambda w, v, beta, e: _discopop(w - v),
    }
)
# Those that know of a share of wrong labels.
SMOOTHED = ("sigmoid", "robust", "exo_pair")
