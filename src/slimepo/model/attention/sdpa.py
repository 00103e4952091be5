"""Attention over packed rows by torch's scaled_dot_product_attention: on every device, in every precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimepo.model.attention.path import AttentionCall

# Sequences up to this many tokens attend side by side, padded inside attention alone; longer ones one by one.
SIDE_BY_SIDE = 256


def by_length(call: AttentionCall) -> Tensor:
    """On a CPU side by side where the sequences are short, else one by one; elsewhere side by side."""
    long = call.packing["gather"].shape[1] > SIDE_BY_SIDE
    return one_by_one(call) if long and call.query.device.type == "cpu" else side_by_side(call)


def side_by_side(call: AttentionCall) -> Tensor:
    """All sequences of prompt + response in one causal call; a shared prompt's outputs are taken from the first.

    Returns `[1, T, heads, D]`, as every function of this kind.
    """
    gather, scatter = call.packing["gather"], call.packing["scatter"]
    rows, max_seqlen = gather.shape
    places = gather.flatten()

    def spread(states: Tensor) -> Tensor:  # [1, heads, T, D] -> [sequences, heads, max_seqlen, D]
        states = states[0].transpose(0, 1).index_select(0, places)
        return states.view(rows, max_seqlen, *states.shape[1:]).transpose(1, 2)

    mask = _window_mask(max_seqlen, max_seqlen, call.window, call.query.device)
    spread_call = call._replace(query=spread(call.query), key=spread(call.key), value=spread(call.value))
    output = attend(spread_call, mask).transpose(1, 2).reshape(rows * max_seqlen, call.query.shape[1], -1)
    return output.index_select(0, scatter)[None]


def one_by_one(call: AttentionCall) -> Tensor:
    """Two calls a pair: prompt + first response, causal; every further response over [prompt; response]."""
    outputs = []
    for prompt, responses in call.packing["groups"]:
        for number, response in enumerate(responses):
            start, stop = response[0], response[0] + response[1]
            if number == 0:
                part = slice(prompt[0], stop)
                keys, values = call.key[:, :, part], call.value[:, :, part]
            else:
                part = slice(start, stop)
                keys, values = (
                    torch.cat([states[:, :, prompt[0] : prompt[0] + prompt[1]], states[:, :, part]], dim=2)
                    for states in (call.key, call.value)
                )
            queries = call.query[:, :, part]
            mask = _window_mask(queries.shape[2], keys.shape[2], call.window, queries.device)
            outputs.append(attend(call._replace(query=queries, key=keys, value=values), mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend(call: AttentionCall, mask: Tensor | None) -> Tensor:
    """Attention of the call's states under `mask`, causal where it is None; its packing and window are not read."""
    query, key, value = call.query, call.key, call.value
    grouped = query.shape[1] != key.shape[1]
    if grouped and (call.softcap is not None or (mask is not None and query.is_cuda)):
        # With a mask, CUDA's fused kernels take no groups, and the one that does holds all the scores.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        grouped = False
    if call.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            call.dropout,
            is_causal=mask is None,
            scale=call.scaling,
            enable_gqa=grouped,
        )
    scores = query @ key.transpose(-2, -1) * (call.scaling or query.shape[-1] ** -0.5)
    scores = call.softcap * torch.tanh(scores / call.softcap)
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    # Not -inf: a row of padding sees nothing, and its NaN would reach every row through the next layer's values.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    precise = torch.promote_types(scores.dtype, torch.float32)
    return F.dropout(F.softmax(scores, dim=-1, dtype=precise).to(query.dtype), call.dropout) @ value


def _window_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Causal from the bottom right and within the window, `[queries, keys]`; None where plain causal says it all."""
    beyond = window is not None and keys > window
    if queries == keys and not beyond:
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    mask = distance >= 0
    return mask & (distance < window) if window is not None else mask
