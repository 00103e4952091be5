"""Attention for packed rows, through transformers' own extension point.

`install` registers attention functions under the names `slimepo_...` and lets a model use one. A call that carries
`packing` is computed group by group, along the path of that name; any other call goes where it went before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slimepo.data.packing import Packing
from slimepo.model.attention.path import AttentionCall
from slimepo.model.attention.sdpa import attend, side_by_side
from slimepo.model.attention.table import PATHS

_PREFIX = "slimepo_"

# Tensors that models pass on to attention which compute nothing there.
_OF_NO_MATTER = ("position_ids", "cache_position")

_no_mask: ContextVar[bool] = ContextVar("slimepo_no_mask", default=False)


def install(model: PreTrainedModel, path: str = "by_length") -> None:
    """Let `model` attend along `path`; raises ValueError where it does not take such functions."""
    name = f"{_PREFIX}{path}"
    AttentionInterface.register(name, functools.partial(packed_attention, path=path))
    AttentionMaskInterface.register(name, _mask)
    model.set_attn_implementation(name)


def path_of(model: PreTrainedModel) -> str:
    """The path along which `install` lets `model` attend."""
    name: str = model.config._attn_implementation
    return name.removeprefix(_PREFIX)


@contextmanager
def packed_rows() -> Iterator[None]:
    """Inside, no mask is built: `packing` says all that attention has to know."""
    token = _no_mask.set(True)
    try:
        yield
    finally:
        _no_mask.reset(token)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: Packing | None = None,
    path: str = "by_length",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query `[1, heads, T, D]` to output `[1, T, heads, D]`.

    Raises:
        NotImplementedError: the model hands over more that attention depends on, such as learned sinks.
    """
    more = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _OF_NO_MATTER]
    if more:
        raise NotImplementedError(
            f"its attention takes {', '.join(more)}, which slimepo's attention does not know"
        )
    if packing is None:
        if softcap is None:
            return sdpa_attention_forward(  # type: ignore[no-any-return]
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        # transformers leaves the mask out where plain causal attention says it all.
        call = AttentionCall(query, key, value, None, dropout, scaling, None, softcap)  # type: ignore[arg-type]
        return attend(call, attention_mask).transpose(1, 2), None
    call = AttentionCall(query, key, value, packing, dropout, scaling, sliding_window, softcap)
    return attend_along(path, call), None


def attend_along(path: str, call: AttentionCall) -> Tensor:
    """The call along `path`, or side by side where the path's kernel does not take it (a float32 evaluation, say)."""
    attend_call, obstacle, *_ = PATHS[path]
    if obstacle is not None:
        call = _in_one_dtype(call)
        if obstacle(call) is not None:
            attend_call = side_by_side
    return attend_call(call)


def _in_one_dtype(call: AttentionCall) -> AttentionCall:
    """Under autocast some architectures hand over float32 queries with bfloat16 values; these kernels take one."""
    device = call.query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else call.value.dtype
    return call._replace(query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _no_mask.get() else sdpa_mask(*args, **kwargs)
