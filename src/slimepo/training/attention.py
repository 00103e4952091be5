"""Attention for packed rows, through transformers' own extension point.

`install` registers the attention function `slimepo` and lets a model use it. A call that carries `packing` is
computed group by group; any other call goes where it went before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slimepo.data.packing import Packing

NAME = "slimepo"

# Sequences up to this many tokens attend side by side, padded inside attention alone; longer ones one by one.
SIDE_BY_SIDE = 256

_no_mask: ContextVar[bool] = ContextVar("slimepo_no_mask", default=False)


def install(model: PreTrainedModel) -> None:
    """Let `model` attend through `packed_attention`; raises ValueError where it does not take such functions."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query `[1, heads, T, D]` to output `[1, T, heads, D]`.

    `sliding_window` counts in position ids, which run on from the prompt in every response.
    """
    if packing is None:
        if softcap is None:
            return sdpa_attention_forward(  # type: ignore[no-any-return]
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        # transformers leaves the mask out where plain causal attention says it all.
        output = _attend(query, key, value, attention_mask, dropout, scaling, softcap, causal=True)
        return output.transpose(1, 2), None
    if packing["gather"].shape[1] <= SIDE_BY_SIDE or query.device.type != "cpu":
        return _side_by_side(query, key, value, packing, dropout, scaling, sliding_window, softcap), None
    return _one_by_one(query, key, value, packing, dropout, scaling, sliding_window, softcap), None


def _side_by_side(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """All sequences of prompt + response in one causal call; a shared prompt's outputs are taken from the first."""
    gather, scatter = packing["gather"], packing["scatter"]
    rows, longest = gather.shape
    places = gather.flatten()

    def spread(states: Tensor) -> Tensor:  # [1, heads, T, D] -> [sequences, heads, longest, D]
        states = states[0].transpose(0, 1).index_select(0, places)
        return states.view(rows, longest, *states.shape[1:]).transpose(1, 2)

    mask = _window_mask(longest, longest, sliding_window, query.device)
    output = _attend(spread(query), spread(key), spread(value), mask, dropout, scaling, softcap, causal=True)
    output = output.transpose(1, 2).reshape(rows * longest, query.shape[1], -1)
    return output.index_select(0, scatter)[None]


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Two calls a pair: prompt + first response, causal; every further response over [prompt; response]."""
    outputs = []
    for prompt, responses in packing["groups"]:
        for number, response in enumerate(responses):
            start, stop = response[0], response[0] + response[1]
            if number == 0:
                part = slice(prompt[0], stop)
                keys, values = key[:, :, part], value[:, :, part]
            else:
                part = slice(start, stop)
                keys, values = (
                    torch.cat([states[:, :, prompt[0] : prompt[0] + prompt[1]], states[:, :, part]], dim=2)
                    for states in (key, value)
                )
            queries = query[:, :, part]
            size = (queries.shape[2], keys.shape[2])
            mask = _window_mask(*size, sliding_window, query.device)
            outputs.append(_attend(queries, keys, values, mask, dropout, scaling, softcap, causal=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _window_mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Causal from the bottom right and within the window, `[queries, keys]`; None where plain causal says it all."""
    beyond = sliding_window is not None and keys > sliding_window
    if queries == keys and not beyond:
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    mask = distance >= 0
    return mask & (distance < sliding_window) if sliding_window is not None else mask


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    causal: bool = False,
) -> Tensor:
    """`[..., heads, queries, D]`; key and value may have fewer heads, each serving a group of query heads."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout,
            is_causal=causal and mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(-2, -1) * (scaling or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        query.dtype
    )
    return F.dropout(weights, dropout) @ value


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _no_mask.get() else sdpa_mask(*args, **kwargs)
