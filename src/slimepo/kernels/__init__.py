"""The one fused operation that every objective runs on: hidden states to log-probs of given tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slimepo.kernels.chunked import linear_logps_chunked
from slimepo.kernels.naive import linear_logps_naive

Implementation = Literal["auto", "naive", "chunked"]


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: Implementation = "auto",
) -> Tensor:
    """Log-probability of each target token under `softmax(cap(scale * (hidden @ weight.T + bias)))`.

    Args:
        hidden: `[N, H]` hidden states of the tokens before the targets.
        weight: `[V, H]` output embedding.
        targets: `[N]` token ids.
        bias: `[V]` where the head has one.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2); None leaves them.
        scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        impl: "naive" is the specification and holds all `[N, V]` logits; "chunked" holds one chunk of them;
            "auto" is chunked.

    Returns:
        `[N]` in nats, float32 (float64 for float64 input), with gradients for hidden, weight and bias. Under
        autocast the products run in its dtype.
    """
    if impl == "naive":
        return linear_logps_naive(hidden, weight, targets, bias, softcap, scale)
    return linear_logps_chunked(hidden, weight, targets, bias, softcap, scale, _compute_dtype(hidden))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


__all__ = ["linear_logps"]
