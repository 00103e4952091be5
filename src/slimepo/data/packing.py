"""Packed batches: rows back to back in one line, without padding, the prompt of a row computed once.

A line holds groups `[prompt | response | response ...]`. Position ids restart so that every response sits right
behind its prompt; a token sees its own group's prompt and its own response up to itself, nothing else. In the
`shared` layout a group is a row; in the `packed` layout each response is a group with its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from slimepo.data.rows import Row

Part = tuple[int, int]  # start in the line, length


class Packing(TypedDict):
    """What attention has to know about a packed line of T tokens.

    `groups` lists each group's prompt and responses as (start, length), plain numbers. The tensors describe the
    same in three ways, one for each way to attend:
    - as sequences of prompt + response: `gather` `[sequences, longest]` are places in the line (0 behind a
      sequence's end), `scatter` `[T]` the flat place in `gather` that each token's output is taken from;
    - token by token: `parts` `[2, T]` is the number of its group, and that of its response within it (0: prompt);
    - as segments of queries in the line's own order, a group's prompt and first response being one: `keys` `[K]` are
      the places of the keys that the segments see, one behind the other, `cu_seqlens` `[2, segments + 1]` where each
      segment's queries and keys begin and end, `max_seqlen` the most queries and keys that a segment has.
    `masks` is room for what attention makes of these once a batch; it starts empty.
    """

    position_ids: Tensor  # [1, T]
    gather: Tensor
    scatter: Tensor
    groups: list[tuple[Part, list[Part]]]
    parts: Tensor  # int32
    keys: Tensor
    cu_seqlens: Tensor  # int32
    max_seqlen: tuple[int, int]
    masks: dict[Any, Any]


@dataclass(frozen=True)
class PackedLine:
    """One packed line before it becomes tensors; `predict_at` lists places by position, row after row."""

    ids: np.ndarray
    packing: Packing
    predict_at: list[list[np.ndarray]]  # [positions][rows]


def pack(rows: Sequence[Row], positions: Sequence[int], shared: bool) -> PackedLine:
    """Lay `rows` out in one line; a row without a response at any of the positions takes no place in it."""
    ids: list[np.ndarray] = []
    position_ids: list[np.ndarray] = []
    predict_at: list[list[np.ndarray]] = [[np.empty(0)] * len(rows) for _ in positions]
    groups: list[tuple[Part, list[Part]]] = []
    start = 0
    for index, row in enumerate(rows):
        every = [(place, row.response(position)) for place, position in enumerate(positions)]
        responses = [(place, response) for place, response in every if len(response)]
        for members in [responses] if shared and responses else [[response] for response in responses]:
            prompt = (start, len(row.prompt_ids))
            ids.append(row.prompt_ids)
            position_ids.append(np.arange(prompt[1]))
            start += prompt[1]
            parts = []
            for place, response in members:
                # The last prompt token predicts the first response token, wherever the response stands.
                predicting = np.arange(start - 1, start + len(response) - 1)
                predicting[:1] = prompt[0] + prompt[1] - 1
                predict_at[place][index] = predicting
                ids.append(response)
                position_ids.append(prompt[1] + np.arange(len(response)))
                parts.append((start, len(response)))
                start += len(response)
            groups.append((prompt, parts))
    gather, scatter = _sequences(groups, start)
    keys, cu_seqlens, max_seqlen = _segments(groups)
    packing = Packing(
        position_ids=torch.from_numpy(np.concatenate(position_ids).astype(np.int64))[None],
        gather=gather,
        scatter=scatter,
        groups=groups,
        parts=_parts(groups),
        keys=keys,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        masks={},
    )
    return PackedLine(np.concatenate(ids), packing, predict_at)


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


def packed_cost(row: Row, positions: Sequence[int], shared: bool) -> int:
    """Tokens that a row takes in a packed line."""
    responses = [len(row.response(position)) for position in positions]
    copies = 1 if shared else sum(map(bool, responses))
    return len(row.prompt_ids) * copies + sum(responses)


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
    """`keys`, `cu_seqlens` and `max_seqlen` of `Packing`."""
    keys, sizes = [], []
    for prompt, responses in groups:
        for number, response in enumerate(responses):
            # The last queries of a segment stand at the last of its keys: causal from the bottom right.
            queries = response[1] + (prompt[1] if number == 0 else 0)
            if queries:
                keys += [np.arange(*_span(prompt)), np.arange(*_span(response))]
                sizes.append((queries, prompt[1] + response[1]))
    cu_seqlens = np.zeros((2, len(sizes) + 1), dtype=np.int32)
    cu_seqlens[:, 1:] = np.cumsum(sizes, axis=0).T
    most = np.max(sizes, axis=0)
    return torch.from_numpy(np.concatenate(keys)), torch.from_numpy(cu_seqlens), (int(most[0]), int(most[1]))


def _span(part: Part) -> tuple[int, int]:
    return part[0], part[0] + part[1]
