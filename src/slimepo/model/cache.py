"""Key-value caches while answers are written: which can lose rows, and layers that grow without being copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Tokens for which room is made at once. A copy every so many tokens costs nothing beside reading the cache for each.
_ROOM = 64


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A plain layer that writes new tokens behind the old ones in place.

    transformers' own copies the whole cache for every token, which on a CPU takes about as long as attention does.
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values so far, `[rows, heads, tokens, D]`, the given ones behind those that were there."""
        held = self.keys.shape[-2]
        total, buffers = held + key_states.shape[-2], self._buffers
        # Where rows were dropped, keys and values are tensors of their own again.
        kept = buffers is not None and buffers[0].data_ptr() == self.keys.data_ptr()
        if buffers is None or not kept or buffers[0].shape[-2] < total:
            buffers = self._buffers = (_roomy(self.keys, total), _roomy(self.values, total))
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[..., held:total, :] = new
        self.keys, self.values = (buffer[..., :total, :] for buffer in buffers)
        return self.keys, self.values


def growing(cache: Any) -> None:
    """Let the plain layers of a cache that holds a prompt grow in place."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.is_initialized:
            # The same object, for others hold it too: only how it takes in tokens changes.
            layer.__class__ = GrowingLayer


def selectable(cache: Any) -> bool:
    """Whether rows of this cache can be padded, repeated and dropped: true of plain attention layers.

    Other layers (recurrent states, quantised or indexed caches) keep what a plain selection would miss.
    """
    layers = getattr(cache, "layers", [])
    plain = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)
    return len(layers) > 0 and all(type(layer) in plain for layer in layers)


def _roomy(held: Tensor, total: int) -> Tensor:
    """A tensor with room for `total` tokens and more, that begins with those held."""
    rows, heads, tokens, size = held.shape
    room = torch.empty(rows, heads, total + _ROOM, size, dtype=held.dtype, device=held.device)
    room[..., :tokens, :] = held
    return room
