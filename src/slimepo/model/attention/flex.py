"""Attention over packed rows by FlexAttention: one kernel over the row, blocks that nobody sees left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from slimepo.data.packing import Packing
from slimepo.model.attention.path import HALF, AttentionCall, AttentionPath

BLOCK = 128
# On a GPU; a smaller head is an error of the compiler's.
SMALLEST_HEAD = 16

# (batch, head, query, key) as 0-dimensional tensors; whether the query sees the key.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex(call: AttentionCall) -> Tensor:
    """`[1, T, heads, D]`; no dropout. There is no backward pass on a CPU."""
    tokens = call.query.shape[2]
    # Whole blocks, and two at least: every row then runs the same compiled code (a size of 1 is one of its own).
    rows = max(2, -(-tokens // BLOCK)) * BLOCK
    attention, _ = _functions(call.query.device.type)
    output = attention(
        *(_filled(states, rows) for states in (call.query, call.key, call.value)),
        score_mod=None if call.softcap is None else _capped(call.softcap),
        block_mask=_block_mask(call.packing, call.window, rows),
        scale=call.scaling,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )
    return output[:, :, :tokens].transpose(1, 2)  # type: ignore[no-any-return]


def obstacle(call: AttentionCall) -> str | None:
    """Why such a call cannot be computed; None where it can."""
    device, dtype = call.query.device.type, call.query.dtype
    if call.dropout:
        return "FlexAttention has no dropout"
    if device == "cpu" and torch.is_grad_enabled():
        return "FlexAttention has no backward pass on a CPU"
    if device == "cuda" and dtype not in HALF:
        return f"flex computes in bfloat16 or float16, not {dtype}".replace("torch.", "")
    if device == "cuda" and call.query.shape[-1] < SMALLEST_HEAD:
        return f"FlexAttention needs heads of at least {SMALLEST_HEAD}, not {call.query.shape[-1]}"
    return None


FLEX = AttentionPath(flex, obstacle, measured=True, planned_as="side_by_side")


def mask_mod(group: Tensor, response: Tensor, position: Tensor, window: int | None) -> MaskMod:
    """What a token sees: its own group's prompt and its own response, up to itself, within the window.

    `group`, `response` (0: prompt) and `position` describe the row's tokens, `[T]` each.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        readable = (response[key] == 0) | (response[key] == response[query])
        distance = position[query] - position[key]
        mask = (group[query] == group[key]) & readable & (distance >= 0)
        return mask if window is None else mask & (distance < window)

    return sees


def _block_mask(packing: Packing, window: int | None, rows: int) -> BlockMask:
    """Made in the first layer of each window and kept with the batch: the other layers, and those that are computed
    again in the backward pass, get the same dict."""
    masks = packing["masks"]
    if window not in masks:
        more = rows - packing["parts"].shape[1]
        # What fills the last block is a group of its own that sees itself: no row without a key, so no NaN.
        # Tensors of their own, not views of one: of those, the offset would be a variable of the compiled code too.
        group, response = (F.pad(part, (0, more), value=-1) for part in packing["parts"])
        position = F.pad(packing["position_ids"][0], (0, more)).to(torch.int32)
        _, make = _functions(group.device.type)
        sees = mask_mod(group, response, position, window)
        masks[window] = make(sees, None, None, rows, rows, device=group.device)
    mask: BlockMask = masks[window]
    return mask


def _filled(states: Tensor, rows: int) -> Tensor:
    """`[1, heads, T, D]` to `[1, heads, rows, D]`, contiguous like every other, or it would be compiled again."""
    more = rows - states.shape[2]
    return F.pad(states, (0, 0, 0, more)) if more else states.contiguous()


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.cache
def _functions(device: str) -> tuple[Any, Any]:
    """`flex_attention` and `create_block_mask`, compiled but on a CPU.

    The second length makes torch take the length as a variable; after that nothing is compiled again. Each window
    and each of forward-only and training has code of its own, twice: more than torch's limit of 8 would bring back
    the eager function, which holds all scores.
    """
    if device == "cpu":
        return flex_attention, create_block_mask
    return compiled()


@functools.cache
def compiled() -> tuple[Any, Any]:
    """`flex_attention` and `create_block_mask` under torch.compile."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(flex_attention), torch.compile(create_block_mask)
