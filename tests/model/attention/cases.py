"""What the tests of the attention paths share: calls, and what every token of a packing may see."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slimepo.data.packing import Packing, pack
from slimepo.data.rows import PAIR, Row
from slimepo.model.attention.path import AttentionCall

Lengths = Sequence[tuple[int, int, int]]  # prompt, chosen, rejected


def packing_of(lengths: Lengths, shared: bool = True) -> Packing:
    def ids(count: int) -> np.ndarray:
        return np.zeros(count, np.int32)

    return pack([Row(ids(p), (ids(c), ids(r)), id="row") for p, c, r in lengths], PAIR, shared).packing


def call_of(
    packing: Packing, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options
) -> AttentionCall:
    """Random states of 4 heads of 16 that share 2 of the keys'."""
    torch.manual_seed(seed)
    tokens = packing["position_ids"].shape[1]
    query, key, value = (torch.randn(1, heads, tokens, 16, dtype=dtype) for heads in (4, 2, 2))
    return AttentionCall(query, key, value, packing, **options)


def seen(lengths: Lengths, shared: bool, window: int | None) -> Tensor:
    """`[T, T]`: whether a token sees another, by the definition: each response read as a sequence of its own.

    A response that is not there (an answer judged by itself) has no prompt of its own either.
    """
    sequences, start = [], 0
    for prompt, *responses in lengths:
        for members in [responses] if shared else [[response] for response in responses if response]:
            prompt_places = list(range(start, start + prompt))
            start += prompt
            for response in members:
                sequences.append(prompt_places + list(range(start, start + response)))
                start += response
    mask = torch.zeros(start, start, dtype=torch.bool)
    for places in sequences:
        for i, query in enumerate(places):
            for j, key in enumerate(places[: i + 1]):
                if window is None or i - j < window:
                    mask[query, key] = True
    return mask


def with_gradients(output: Tensor, call: AttentionCall) -> list[Tensor]:
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device)
    gradients = torch.autograd.grad((output * weights.view_as(output)).sum(), call[:3])
    return [output.detach(), *gradients]


def leaves(call: AttentionCall) -> AttentionCall:
    states = [t.detach().clone().requires_grad_() for t in call[:3]]
    return call._replace(query=states[0], key=states[1], value=states[2])
