"""Answers judged one by one: rows with one response, and answers behind prompts they do not belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from slimepo.data.batch import given_sides, length
from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError
from slimepo.types import Preference, Unpaired


def as_preference(row: Unpaired) -> Preference:
    """A judged answer as a row with one side: chosen if it is desirable, else rejected."""
    chosen, rejected = (row.response, []) if row.label else ([], row.response)
    return Preference(row.prompt, chosen, rejected, row.source)


def judged_rows(rows: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """One row an answer: a pair becomes two rows, the desirable one first."""
    return [row for pair in rows for row in _split(pair)]


def with_mismatched(rows: Sequence[TokenizedPair], seed: int) -> list[TokenizedPair]:
    """Every row with the answer of a row that has another prompt, a function of the rows and the seed alone.

    The answers that go round are those of the rows themselves, as nearly as prompts allow: row by row in a shuffled
    order, each takes the answer of the next one, as arXiv 2402.01306 estimates its reference point. An answer is cut
    where it would make a row longer than the longest of the rows, which memory and the model's context are fit for.

    Raises:
        InputError: all rows have the same prompt.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    result: list[TokenizedPair] = list(rows)
    longest = max((length(row) for row in rows), default=0)
    for place, index in enumerate(order):
        other = next((rows[i] for i in _after(order, place) if _another_prompt(rows[i], rows[index])), None)
        if other is None:
            raise InputError(
                "all rows have the same prompt, and this objective needs answers to other prompts beside them"
            )
        answer = getattr(other, given_sides(other)[0])
        result[index] = replace(rows[index], mismatched=answer[: longest - len(rows[index].prompt)])
    return result


def _split(pair: TokenizedPair) -> list[TokenizedPair]:
    sides = given_sides(pair)
    if len(sides) < 2:
        return [pair]
    nothing = pair.prompt[:0]
    return [
        replace(pair, rejected=nothing, row_id=f"{pair.row_id} (chosen)"),
        replace(pair, chosen=nothing, row_id=f"{pair.row_id} (rejected)"),
    ]


def _after(order: list[int], place: int) -> Iterator[int]:
    """What comes behind a place and, round the end, before it; one by one, as the first is nearly always taken."""
    return (order[(place + step) % len(order)] for step in range(1, len(order)))


def _another_prompt(row: TokenizedPair, than: TokenizedPair) -> bool:
    return not np.array_equal(row.prompt, than.prompt)
