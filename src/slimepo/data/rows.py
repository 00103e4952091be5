"""The row that everything trains on and scores: a prompt with any number of responses, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from slimepo.errors import InputError
from slimepo.types import Preference, Unpaired

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Value = float | Floats | tuple[Floats, ...]

# What a response is to an objective is its position in the row; MISMATCHED is an answer to another prompt.
CHOSEN, REJECTED, MISMATCHED = 0, 1, 2
PAIR = (CHOSEN, REJECTED)
# Of a row with three answers of its own the last is the gold one.
SIDES = ("chosen", "rejected", "gold")


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt and its responses as token ids, int32 `[tokens]` each, with the values that travel with them.

    `prompt_ids` ends in the generation prompt; a response holds the trained tokens, the end-of-turn token last (unless
    it was cut). A pair has two responses, chosen and rejected, a demonstration one, a group of samples any number. An
    empty response is one that is not there, and takes no room in a batch: a judged undesirable answer is
    `(empty, answer)`.

    `values` are named numbers: a float for the row (`weight`), float32 `[responses]` for each response, or a tuple of
    float32 `[tokens]`, one a response in the order of its tokens (`reference`).
    """

    prompt_ids: Ids
    responses: tuple[Ids, ...]
    values: Mapping[str, Value] = field(default_factory=dict)
    id: str = ""

    def response(self, position: int) -> Ids:
        """The response at a position, empty where there is none."""
        return self.responses[position] if position < len(self.responses) else self.prompt_ids[:0]


def length(row: Row, positions: Sequence[int] = PAIR) -> int:
    """Tokens of the prompt and the longest of the responses that are read."""
    return len(row.prompt_ids) + max((len(row.response(position)) for position in positions), default=0)


def as_preference(row: Unpaired) -> Preference:
    """A judged answer as a record with one side: chosen if it is desirable, else rejected."""
    chosen, rejected = (row.response, []) if row.label else ([], row.response)
    return Preference(row.prompt, chosen, rejected, row.source, row.weight, row.template_options)


def judged_rows(rows: Sequence[Row]) -> list[Row]:
    """One row an answer: a pair becomes two rows, the desirable one first."""
    result: list[Row] = []
    for row in rows:
        given = [position for position in PAIR if len(row.response(position))]
        if len(given) < 2:
            result.append(row)
            continue
        for position, name in zip(PAIR, ("chosen", "rejected"), strict=True):
            values = {
                key: _only(value, position) if isinstance(value, tuple) else value
                for key, value in row.values.items()
            }
            result.append(Row(row.prompt_ids, _only(row.responses, position), values, f"{row.id} ({name})"))
    return result


def with_mismatched(rows: Sequence[Row], seed: int) -> list[Row]:
    """Every row with the answer of a row that has another prompt, a function of the rows and the seed alone.

    The answers that go round are those of the rows themselves, as nearly as prompts allow: row by row in a shuffled
    order, each takes the answer of the next one, as arXiv 2402.01306 estimates its reference point. An answer is cut
    where it would make a row longer than the longest of the rows, which memory and the model's context are fit for.

    Raises:
        InputError: all rows have the same prompt.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    result: list[Row] = list(rows)
    longest = max(map(length, rows), default=0)
    for place, index in enumerate(order):
        row = rows[index]
        other = next(
            (rows[i] for i in _after(order, place) if not np.array_equal(rows[i].prompt_ids, row.prompt_ids)),
            None,
        )
        if other is None:
            raise InputError(
                "all rows have the same prompt, and this objective needs answers to other prompts beside them"
            )
        answer = next(response for response in other.responses if len(response))
        answer = answer[: longest - len(row.prompt_ids)]
        result[index] = replace(row, responses=(row.response(CHOSEN), row.response(REJECTED), answer))
    return result


def _only(of_responses: tuple[npt.NDArray[Any], ...], position: int) -> tuple[npt.NDArray[Any], ...]:
    """Empty at every other position of a pair."""
    return tuple(of_responses[i] if i == position else of_responses[i][:0] for i in PAIR)


def _after(order: list[int], place: int) -> Iterator[int]:
    """What comes behind a place and, round the end, before it; one by one, as the first is nearly always taken."""
    return (order[(place + step) % len(order)] for step in range(1, len(order)))
