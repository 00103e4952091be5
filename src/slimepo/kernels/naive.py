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
) -> tuple[Tensor, Tensor, Tensor]:
    """`stats_of_logits` of every row projected onto the vocabulary."""
    return stats_of_logits(F.linear(hidden_NH, weight_VH, bias_V), targets_N, softcap, scale)


@torch.no_grad()
def stats_of_logits(
    raw_NV: Tensor, targets_N: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's entropy `[N]` in nats, whether no logit is above the target's, and the log of the sum of p squared."""
    logps_NV = adjust(raw_NV, softcap, scale).log_softmax(dim=-1)
    entropy_N = torch.special.entr(logps_NV.exp()).sum(dim=-1)
    # From the raw logits: a soft cap makes large ones equal.
    top1_N = raw_NV.gather(1, targets_N[:, None]).squeeze(1) == raw_NV.amax(dim=-1)
    return entropy_N, top1_N, (2 * logps_NV).logsumexp(dim=-1)
