"""Packed batches: pairs back to back in one row, without padding, the prompt of a pair computed once.

A row holds groups `[prompt | response | response ...]`. Position ids restart so that every response sits right
behind its prompt; a token sees its own group's prompt and its own response up to itself, nothing else. In the
`shared` layout a group is a pair; in the `packed` layout each response is a group with its own prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from slimepo.data.tokenize import TokenizedPair

Part = tuple[int, int]  # start in the row, length


class Packing(TypedDict):
    """What attention has to know about a packed row of T tokens.

    `groups` lists each group's prompt and responses as (start, length), plain numbers. The tensors describe the
    same as sequences of prompt + response: `gather` `[sequences, longest]` are places in the row (0 behind a
    sequence's end), `scatter` `[T]` the flat place in `gather` that each token's output is taken from.
    """

    position_ids: Tensor  # [1, T]
    gather: Tensor
    scatter: Tensor
    groups: list[tuple[Part, list[Part]]]


@dataclass(frozen=True)
class PackedRow:
    """One packed row before it becomes tensors; `predict_at` lists places by side, pair after pair."""

    ids: np.ndarray
    packing: Packing
    predict_at: list[list[np.ndarray]]  # [sides][pairs]


def pack(pairs: Sequence[TokenizedPair], sides: Sequence[str], shared: bool) -> PackedRow:
    """Lay `pairs` out in one row."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predict_at: list[list[np.ndarray]] = [[np.empty(0)] * len(pairs) for _ in sides]
    groups: list[tuple[Part, list[Part]]] = []
    start = 0
    for index, pair in enumerate(pairs):
        every = [(side, getattr(pair, name)) for side, name in enumerate(sides)]
        responses = [(side, response) for side, response in every if len(response)]
        for members in [responses] if shared else [[response] for response in responses]:
            prompt = (start, len(pair.prompt))
            ids.append(pair.prompt)
            positions.append(np.arange(prompt[1]))
            start += prompt[1]
            parts = []
            for side, response in members:
                # The last prompt token predicts the first response token, wherever the response stands.
                places = np.arange(start - 1, start + len(response) - 1)
                places[:1] = prompt[0] + prompt[1] - 1
                predict_at[side][index] = places
                ids.append(response)
                positions.append(prompt[1] + np.arange(len(response)))
                parts.append((start, len(response)))
                start += len(response)
            groups.append((prompt, parts))
    gather, scatter = _sequences(groups, start)
    position_ids = torch.from_numpy(np.concatenate(positions).astype(np.int64))[None]
    packing = Packing(position_ids=position_ids, gather=gather, scatter=scatter, groups=groups)
    return PackedRow(np.concatenate(ids), packing, predict_at)


def first_fit_decreasing(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into as few bins of `budget` as first-fit-decreasing finds; an item over it gets one of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        place = next((b for b, left in enumerate(room) if left >= costs[item]), None)
        if place is None:
            bins.append([item])
            room.append(budget - costs[item])
        else:
            bins[place].append(item)
            room[place] -= costs[item]
    return bins


def packed_cost(shared: bool, sides: Sequence[str]) -> Callable[[TokenizedPair], int]:
    """Tokens that a pair takes in a packed row."""

    def cost(pair: TokenizedPair) -> int:
        responses = [len(getattr(pair, side)) for side in sides]
        copies = 1 if shared else sum(map(bool, responses))
        return len(pair.prompt) * copies + sum(responses)

    return cost


def _sequences(groups: Sequence[tuple[Part, list[Part]]], tokens: int) -> tuple[Tensor, Tensor]:
    """`gather` and `scatter` of `Packing`."""
    rows = [
        np.concatenate([np.arange(*_span(prompt)), np.arange(*_span(response))])
        for prompt, responses in groups
        for response in responses
    ]
    gather = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    scatter = np.zeros(tokens, dtype=np.int64)
    for index, row in enumerate(rows):
        gather[index, : len(row)] = row
        scatter[row] = index * gather.shape[1] + np.arange(len(row))
    return torch.from_numpy(gather), torch.from_numpy(scatter)


def _span(part: Part) -> tuple[int, int]:
    return part[0], part[0] + part[1]
