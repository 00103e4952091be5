"""Attention over packed rows by variable-length flash attention: the row's queries in one call, keys gathered.

The row is cut into segments: each prompt with its first response, and every further response. A segment's queries
are its own tokens, its keys the prompt's and the response's, causal from the bottom right. Queries and outputs stay
where they are in the row; only keys and values are gathered, those of a shared prompt once for each response.
"""

from __future__ import annotations

import functools
import inspect
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from slimepo.model.attention.path import HALF, AttentionCall, AttentionPath


def varlen(call: AttentionCall) -> Tensor:
    """`[1, T, heads, D]`, in half precision on CUDA."""
    keys, (cu_seqlens_q, cu_seqlens_k) = call.packing["keys"], call.packing["cu_seqlens"]
    max_seqlen_q, max_seqlen_k = call.packing["max_seqlen"]
    query = call.query[0].transpose(0, 1)
    key, value = (states[0].transpose(0, 1).index_select(0, keys) for states in (call.key, call.value))
    given = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    # Keys to the left and to the right of a query's own; -1 on the left: all.
    window = (-1, 0) if call.window is None or call.window >= max_seqlen_k else (call.window - 1, 0)
    output: Any
    if _torch_can(call.dropout, call.softcap):
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(*given, scale=call.scaling, window_size=window, enable_gqa=True)
    else:
        from flash_attn import flash_attn_varlen_func

        output = flash_attn_varlen_func(
            *given,
            dropout_p=call.dropout,
            softmax_scale=call.scaling,
            causal=True,
            window_size=window,
            softcap=call.softcap or 0.0,
        )
    return output[None]  # type: ignore[no-any-return]


def obstacle(call: AttentionCall) -> str | None:
    """Why such a call cannot be computed; None where it can."""
    dtype, device, head = call.query.dtype, call.query.device.type, call.query.shape[-1]
    if device != "cuda":
        return "variable-length flash attention needs a CUDA device"
    if head % 8 or head > 256:
        return f"flash attention takes heads of up to 256 numbers, a multiple of 8, not {head}"
    if dtype not in HALF:
        return f"varlen computes in bfloat16 or float16, not {dtype}".replace("torch.", "")
    return missing(call.dropout, call.softcap)


VARLEN = AttentionPath(varlen, obstacle, measured=True, planned_as="side_by_side")


def missing(dropout: float, softcap: float | None) -> str | None:
    """Why there is no kernel for such calls here; None where there is one."""
    if _torch_can(dropout, softcap) or find_spec("flash_attn") is not None:
        return None
    if not torch_takes_windows():
        return "this torch's varlen_attn takes no windows and flash_attn is not installed"
    return "torch's varlen_attn takes no dropout and no softcap, and flash_attn is not installed"


def _torch_can(dropout: float, softcap: float | None) -> bool:
    return torch_takes_windows() and not dropout and softcap is None


@functools.cache
def torch_takes_windows() -> bool:
    """Whether torch's own `varlen_attn` is here and takes a window and groups of heads (2.10 did not yet)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)
