"""Attention over packed rows by variable-length flash attention: the row's queries in one call, keys gathered.

The row is cut into segments: each prompt with its first response, and every further response. A segment's queries
are its own tokens, its keys the prompt's and the response's, causal from the bottom right. Queries and outputs stay
where they are in the row; only keys and values are gathered, those of a shared prompt once for each response.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from slimepo.model.attention.sdpa import AttentionCall

HALF = (torch.bfloat16, torch.float16)


def varlen(call: AttentionCall) -> Tensor:
    """`[1, T, heads, D]`, in half precision on CUDA."""
    keys = call.packing["keys"]
    query = call.query[0].transpose(0, 1)
    key, value = (states[0].transpose(0, 1).index_select(0, keys) for states in (call.key, call.value))
    return _kernel(call)(query, key, value, call)[None]


def missing(dropout: float, softcap: float | None) -> str | None:
    """Why there is no kernel for such calls here; None where there is one."""
    if torch_takes_windows() and not dropout and softcap is None:
        return None
    if find_spec("flash_attn") is not None:
        return None
    if not torch_takes_windows():
        return "this torch's varlen_attn takes no windows and flash_attn is not installed"
    return "torch's varlen_attn takes no dropout and no softcap, and flash_attn is not installed"


@functools.cache
def torch_takes_windows() -> bool:
    """Whether torch's own `varlen_attn` is here and takes a window and groups of heads (2.10 did not yet)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


def _kernel(call: AttentionCall) -> Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]:
    return _torch if torch_takes_windows() and not call.dropout and call.softcap is None else _flash_attn


def _torch(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output: Any = varlen_attn(
        query,
        key,
        value,
        *_ends(call),
        scale=call.scaling,
        window_size=_window(call),
        enable_gqa=True,
    )
    return output  # type: ignore[no-any-return]


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        *_ends(call),
        dropout_p=call.dropout,
        softmax_scale=call.scaling,
        causal=True,
        window_size=_window(call),
        softcap=call.softcap or 0.0,
    )
    return output


def _ends(call: AttentionCall) -> tuple[Tensor, Tensor, int, int]:
    """Where segments begin and end among the queries and among the keys, and the most of each in a segment."""
    queries, keys = call.packing["cu_seqlens"]
    return queries, keys, *call.packing["max_seqlen"]


def _window(call: AttentionCall) -> tuple[int, int]:
    """Keys to the left and to the right of a query's own; -1 on the left: all."""
    longest = call.packing["max_seqlen"][1]
    return (-1, 0) if call.window is None or call.window >= longest else (call.window - 1, 0)
