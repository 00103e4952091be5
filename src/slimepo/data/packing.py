"""Packed batches: pairs back to back in one row, without padding, the prompt of a pair computed once.

A row holds groups `[prompt | response | response ...]`. Position ids restart so that every response sits right
behind its prompt; a token sees its own group's prompt and its own response up to itself, nothing else. In the
`shared` layout a group is a pair; in the `packed` layout each response is a group with its own prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from slimepo.data.tokenize import TokenizedPair

Part = tuple[int, int]  # start in the row, length


class Packing(TypedDict):
    """What attention has to know about a packed row of T tokens.

    `groups` lists each group's prompt and responses as (start, length), plain numbers. The tensors describe the
    same in three ways, one for each way to attend:
    - as sequences of prompt + response: `gather` `[sequences, longest]` are places in the row (0 behind a
      sequence's end), `scatter` `[T]` the flat place in `gather` that each token's output is taken from;
    - token by token: `parts` `[2, T]` is the number of its group, and that of its response within it (0: prompt);
    - as segments of queries in the row's own order, a group's prompt and first response being one: `keys` `[K]` are
      the places of the keys that the segments see, one behind the other, `ends` `[2, segments + 1]` where each
      segment's queries and keys begin and end, `longest` the most queries and keys that a segment has.
    `masks` is room for what attention makes of these once a batch; it starts empty.
    """

    position_ids: Tensor  # [1, T]
    gather: Tensor
    scatter: Tensor
    groups: list[tuple[Part, list[Part]]]
    parts: Tensor  # int32
    keys: Tensor
    ends: Tensor  # int32
    longest: tuple[int, int]
    masks: dict[Any, Any]


@dataclass(frozen=True)
class PackedRow:
    """One packed row before it becomes tensors; `predict_at` lists places by side, pair after pair."""

    ids: np.ndarray
    packing: Packing
    predict_at: list[list[np.ndarray]]  # [sides][pairs]


def pack(pairs: Sequence[TokenizedPair], sides: Sequence[str], shared: bool) -> PackedRow:
    """Lay `pairs` out in one row; a pair without a response on any of the sides takes no place in it."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predict_at: list[list[np.ndarray]] = [[np.empty(0)] * len(pairs) for _ in sides]
    groups: list[tuple[Part, list[Part]]] = []
    start = 0
    for index, pair in enumerate(pairs):
        every = [(side, getattr(pair, name)) for side, name in enumerate(sides)]
        responses = [(side, response) for side, response in every if len(response)]
        for members in [responses] if shared and responses else [[response] for response in responses]:
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
    keys, ends, longest = _segments(groups)
    packing = Packing(
        position_ids=torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
        gather=gather,
        scatter=scatter,
        groups=groups,
        parts=_parts(groups),
        keys=keys,
        ends=ends,
        longest=longest,
        masks={},
    )
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


def _parts(groups: Sequence[tuple[Part, list[Part]]]) -> Tensor:
    """`parts` of `Packing`."""
    numbers = [
        (group, response, length)
        for group, (prompt, responses) in enumerate(groups)
        for response, (_, length) in enumerate([prompt, *responses])
    ]
    lengths = [length for *_, length in numbers]
    rows = [np.repeat([number[row] for number in numbers], lengths) for row in (0, 1)]
    return torch.from_numpy(np.stack(rows).astype(np.int32))


def _segments(groups: Sequence[tuple[Part, list[Part]]]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """`keys`, `ends` and `longest` of `Packing`."""
    keys, sizes = [], []
    for prompt, responses in groups:
        for number, response in enumerate(responses):
            # The last queries of a segment stand at the last of its keys: causal from the bottom right.
            queries = response[1] + (prompt[1] if number == 0 else 0)
            if queries:
                keys += [np.arange(*_span(prompt)), np.arange(*_span(response))]
                sizes.append((queries, prompt[1] + response[1]))
    ends = np.zeros((2, len(sizes) + 1), dtype=np.int32)
    ends[:, 1:] = np.cumsum(sizes, axis=0).T
    most = np.max(sizes, axis=0)
    return torch.from_numpy(np.concatenate(keys)), torch.from_numpy(ends), (int(most[0]), int(most[1]))


def _span(part: Part) -> tuple[int, int]:
    return part[0], part[0] + part[1]
