"""Rows that every rank needs and that each works out a part of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.state import PartialState
from accelerate.utils import gather_object

Row = TypeVar("Row")
Result = TypeVar("Result")


def each_its_share(rows: Sequence[Row], work: Callable[[Sequence[Row]], Result]) -> list[Result]:
    """What `work` makes of consecutive parts of `rows`, one part on each rank; all ranks get all results, in order."""
    state = PartialState()
    ranks, rank = state.num_processes, state.process_index
    if ranks == 1:
        return [work(rows)]
    part = rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]
    results: list[Result] = gather_object([work(part)])
    return results
