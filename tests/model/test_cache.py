"""Layers that grow in place hold what transformers' own hold, whatever is dropped in between."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from slimepo.model.cache import GrowingLayer, growing, selectable


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 2, tokens, 4, generator=made) for _ in range(2))
    return keys, values


@pytest.mark.parametrize("tokens", [1, 3])
def test_it_holds_the_same_as_transformers_own(tokens: int) -> None:
    plain, grows = DynamicCache(), DynamicCache()
    for cache in (plain, grows):
        cache.update(*states(5, 7, 0), 0)
    growing(grows)
    assert type(grows.layers[0]) is GrowingLayer
    assert selectable(grows)
    rows = 5
    for step in range(200):
        if step in (20, 130):
            for cache in (plain, grows):
                cache.layers[0].batch_select_indices(torch.arange(rows - 2))
            rows -= 2
        own, other = (cache.update(*states(rows, tokens, step), 0) for cache in (plain, grows))
        assert torch.equal(own[0], other[0])
        assert torch.equal(own[1], other[1])
        assert grows.get_seq_length() == plain.get_seq_length()


def test_new_tokens_are_written_where_there_is_room_for_them() -> None:
    cache = DynamicCache()
    cache.update(*states(2, 3, 0), 0)
    growing(cache)
    first, _ = cache.update(*states(2, 1, 1), 0)
    second, _ = cache.update(*states(2, 1, 2), 0)
    assert first.data_ptr() == second.data_ptr()
