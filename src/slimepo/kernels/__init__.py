"""The one fused operation that every objective runs on: hidden states to log-probs of given tokens."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.kernels.chunked import CPU_TILING, GPU_TILING, linear_logps_chunked
from slimepo.kernels.naive import linear_logps_naive, token_stats_naive
from slimepo.kernels.passes import EAGER, Adjustment
from slimepo.kernels.sweep import Job

Implementation = Literal["auto", "naive", "chunked", "triton"]

log = logging.getLogger(__name__)


class TokenStats(NamedTuple):
    """Per token: log-prob (with gradients); without, entropy in nats, `top1`, whether no token is likelier, and
    `collision`, the log-probability that two draws are the same token, log sum p^2."""

    logps: Tensor
    entropy: Tensor
    top1: Tensor
    collision: Tensor


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
        scale: positive factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        impl: "naive" is the specification and holds all `[N, V]` logits. The others hold a tile of them, and
            at most 64 MiB (256 MiB on a GPU, in float32) from forward to backward where the head trains:
            "chunked" is plain PyTorch, "triton" the same with Triton kernels for its passes. "auto" is "triton"
            on a GPU that has it, else "chunked".

    Returns:
        `[N]` in nats, float32 (float64 for float64 input), with gradients for hidden, weight and bias. Under
        autocast the products run in its dtype.

    Raises:
        InputError: a target outside the vocabulary (on a GPU its log-prob is NaN), a scale that is not positive,
            or an implementation that cannot run here.

    Example:
        >>> import math, torch
        >>> from slimepo.kernels import linear_logps
        >>> hidden = torch.tensor([[1.0, 0.0]])
        >>> weight = torch.tensor([[math.log(2), 0.0], [0.0, 1.0], [0.0, 2.0]])  # probabilities 1/2, 1/4 and 1/4
        >>> linear_logps(hidden, weight, torch.tensor([0]))  # log(1/2)
        tensor([-0.6931])
    """
    if _checked(impl, hidden, weight, targets, scale) == "naive":
        return linear_logps_naive(hidden, weight, targets, bias, softcap, scale)
    job = _job(impl, hidden, softcap, scale, stats=False)
    return linear_logps_chunked(hidden, weight, targets, bias, job)[0]


def linear_logps_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    impl: Implementation = "auto",
) -> TokenStats:
    """`linear_logps`, and from the same sweep over the logits what metrics want to know about each token.

    Returns:
        TokenStats: `logps [N]` as from `linear_logps`; `entropy [N]` of the token's distribution in nats;
        `top1 [N]`, whether no token is likelier than the target (ties count); `collision [N]`, the log of the sum of
        its squared probabilities. No gradient flows through the three.

    Example:
        >>> import math, torch
        >>> from slimepo.kernels import linear_logps_stats
        >>> hidden = torch.tensor([[1.0, 0.0]])
        >>> weight = torch.tensor([[math.log(2), 0.0], [0.0, 1.0], [0.0, 2.0]])  # probabilities 1/2, 1/4 and 1/4
        >>> stats = linear_logps_stats(hidden, weight, torch.tensor([1]))
        >>> stats.logps, stats.entropy, stats.top1  # log(1/4), 1.5 * log(2), and token 0 is likelier
        (tensor([-1.3863]), tensor([1.0397]), tensor([False]))
        >>> stats.collision  # log(1/4 + 1/16 + 1/16)
        tensor([-0.9808])
    """
    if _checked(impl, hidden, weight, targets, scale) == "naive":
        inputs = (hidden, weight, targets, bias, softcap, scale)
        return TokenStats(linear_logps_naive(*inputs), *token_stats_naive(*inputs))
    job = _job(impl, hidden, softcap, scale, stats=True)
    logps, entropy, top1, collision = linear_logps_chunked(hidden, weight, targets, bias, job)
    assert entropy is not None
    assert top1 is not None
    assert collision is not None
    return TokenStats(logps, entropy, top1, collision)


def _checked(
    impl: Implementation, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float
) -> Implementation:
    if impl not in get_args(Implementation):
        raise InputError(f"linear_logps: impl={impl!r} is not one of {', '.join(get_args(Implementation))}")
    if not scale > 0:
        raise InputError(f"linear_logps: the logit scale must be positive, not {scale}")
    # On a GPU the check would wait for the device at every call.
    if targets.device.type == "cpu" and len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= len(weight):
            wrong = low if low < 0 else high
            raise InputError(
                f"linear_logps: target {wrong} is outside the vocabulary of {len(weight)} tokens"
            )
    return impl


def _job(impl: Implementation, hidden: Tensor, softcap: float | None, scale: float, *, stats: bool) -> Job:
    device, dtype = hidden.device.type, hidden.dtype
    if impl == "auto":
        impl = _automatic(device)
    passes = EAGER
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            raise InputError(
                'linear_logps: impl="triton" needs the triton package; install it or use impl="chunked"'
            )
        from slimepo.kernels.triton_passes import triton_passes

        passes = triton_passes(device)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    tiling = CPU_TILING if device == "cpu" else GPU_TILING
    return Job(Adjustment(softcap, scale), dtype, passes, tiling, stats)


@functools.cache
def _automatic(device: str) -> Implementation:
    has_triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    choice: Implementation = "triton" if has_triton else "chunked"
    log.debug("linear_logps on %s: impl=%s", device, choice)
    return choice


__all__ = ["TokenStats", "linear_logps", "linear_logps_stats"]
