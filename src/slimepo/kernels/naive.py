"""The specification of `linear_logps` and `linear_logps_stats`: a few lines of float32 arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adjust(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Scale and soft-cap raw logits as some architectures do, in at least float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def gather_logps(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability of each target, `[N]`, in nats."""
    target_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1)
    return target_N - logits_NV.logsumexp(dim=-1)


def linear_logps_naive(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Project every row onto the vocabulary and read the target's log-probability; holds all `[N, V]` logits."""
    return gather_logps(adjust(F.linear(hidden_NH, weight_VH, bias_V), softcap, scale), targets_N)


@torch.no_grad()
def token_stats_naive(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Entropy of each row's distribution `[N]` in nats, and whether no logit is above the target's `[N]`."""
    raw_NV = F.linear(hidden_NH, weight_VH, bias_V)
    entropy_N = torch.special.entr(adjust(raw_NV, softcap, scale).softmax(dim=-1)).sum(dim=-1)
    return entropy_N, raw_NV.gather(1, targets_N[:, None]).squeeze(1) == raw_NV.amax(dim=-1)
