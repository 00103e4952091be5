"""The rows of a run: whatever a user hands to the trainer, tokenised and kept in one place."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from slimepo.data.chat import chat_format
from slimepo.data.read import all_preferences, left_out_in_words, row_notes, rows_from_records
from slimepo.data.rows import (
    MISMATCHED,
    SIDES,
    Row,
    Value,
    judged_rows,
    length,
    with_mismatched,
)
from slimepo.data.tokenize import in_words, joined, tokenize_for
from slimepo.errors import InputError
from slimepo.files import Kept
from slimepo.losses import Objective
from slimepo.losses.table import weighs_rows
from slimepo.parallel.agree import each_its_share
from slimepo.types import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimepo.training.config import PreferenceConfig


logger = logging.getLogger(__name__)


class RowDataset(Dataset[Row]):
    """The rows of a run, made once; what is computed of them is added by name.

    Log-probs of a reference that rows bring along are left out: they are another trainer's, for another reference.
    """

    def __init__(self, rows: Sequence[Row], positions: tuple[int, ...]) -> None:
        if any("reference" in row.values for row in rows) or not isinstance(rows, Kept):
            rows = Kept(
                replace(row, values={k: v for k, v in row.values.items() if k != "reference"}) for row in rows
            )
        self.rows: Kept[Row] = rows
        self.lengths = array("q", (length(row, positions) for row in rows))

    def tokens(self) -> Iterator[tuple[str, int, int]]:
        """Each row by its id: how many tokens prompt and longest response have, and the highest of all."""
        for row in self.rows:
            highest = max(int(ids.max(initial=0)) for ids in (row.prompt_ids, *row.responses))
            yield row.id, length(row, range(len(row.responses))), highest

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def add(self, name: str, index: Sequence[int], values: Sequence[Value]) -> None:
        """Give the rows at `index` a value of that name each."""
        for i, value in zip(index, values, strict=True):
            self.rows[i] = replace(self.rows[i], values={**self.rows[i].values, name: value})


def make_dataset(
    given: Any, tokenizer: PreTrainedTokenizerBase | None, args: PreferenceConfig, objective: Objective
) -> RowDataset | None:
    """The dataset of raw rows, of `Preference` or of `Row`, as the objective reads it; None stays None.

    For an objective that learns from answers judged one by one a pair becomes two rows, and where it asks for the
    divergence every row gets an answer to another prompt.

    Raises:
        InputError: rows of no known format, no tokenizer, no row left, or a row that lacks
            what the objective reads.
    """
    if given is None:
        return None
    rows: Sequence[Any] = given if isinstance(given, Kept) else list(given)
    if not (rows and isinstance(rows[0], Row)):
        rows = _tokenize(rows, tokenizer, args, objective)
    if weighs_rows(args.loss) and rows and not any("weight" in row.values for row in rows):
        raise InputError(
            f"loss {args.loss!r} weighs pairs by their costs, and no row has a weight but 1: give the column `weight`, "
            "or use simpo"
        )
    return RowDataset(rows_for(rows, objective, args.seed), args.positions)


def refuse_lengths(given: Any, args: PreferenceConfig) -> None:
    """Refuse limits that rows to train on would not be held to, because they are ids already. Raises InputError."""
    of_ids = given is not None and isinstance(next(iter(given), None), Row)
    for name in ("max_length", "max_prompt_length", "cut_long_responses") if of_ids else ():
        value = getattr(args, name)
        # None has become as many as there can be.
        if value not in (args.__dataclass_fields__[name].default, sys.maxsize):
            raise InputError(
                f"{name} = {value} is for text; rows of ids are trained on as they are: leave it out"
            )


def read_stream(
    given: Any, tokenizer: PreTrainedTokenizerBase | None, args: PreferenceConfig, objective: Objective
) -> list[Row]:
    """As many rows of a stream, tokenised, as the run's steps take, or all that it has.

    Raises:
        InputError: `max_steps` does not say how many that are; or as of `make_dataset`.
    """
    if args.max_steps <= 0:
        raise InputError("a stream of rows has no length: give max_steps, or load the rows first")
    wanted = args.max_steps * args.train_batch_size * args.world_size
    stream, rows = iter(given), list[Row]()
    while len(rows) < wanted and (read := list(itertools.islice(stream, wanted - len(rows)))):
        rows += _tokenize(read, tokenizer, args, objective)
    return rows


def rows_for(rows: Sequence[Row], objective: Objective, seed: int) -> Sequence[Row]:
    """Tokenised rows in the form that the objective reads.

    Raises:
        InputError: a row lacks an answer or a value that the objective reads, or its weight is no number >= 0.
    """
    asked = set(objective.asks) - {"reference", "divergence", "weight", "gold", "collision"}
    for row in rows:
        absent = [i for i in objective.positions or () if not len(row.response(i))]
        if absent and not objective.judged:
            raise InputError(f"row {row.id} has no {SIDES[absent[0]]} answer, and this loss reads it")
        if not any(len(response) for response in row.responses):
            raise InputError(f"row {row.id} has no answer at all")
        for name in sorted(asked - row.values.keys()):
            raise InputError(f"row {row.id} has no value {name!r}, and this loss asks for it")
        weight: Any = row.values.get("weight", 1.0)
        if not 0 <= weight < math.inf:
            raise InputError(f"row {row.id} has the weight {weight}; it must be a finite number, 0 or more")
    if not objective.judged:
        return rows
    judged = judged_rows(rows)
    done = all(len(row.response(MISMATCHED)) for row in judged)
    return with_mismatched(judged, seed) if "divergence" in objective.asks and not done else judged


def _tokenize(
    rows: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    args: PreferenceConfig,
    objective: Objective,
) -> Sequence[Row]:
    if tokenizer is None:
        raise InputError("give processing_class, the tokenizer: the rows are not tokenised yet")
    chat = chat_format(tokenizer, args.template_options)
    notes = list(chat.notes)
    if rows and isinstance(rows[0], Mapping):
        read = rows_from_records(rows)
        rows = all_preferences(read)
        notes += [*left_out_in_words(read.left_out), *row_notes(read)]
    if rows and not isinstance(rows[0], Preference):
        raise InputError(f"a dataset of {type(rows[0]).__name__} cannot be trained on: give preference pairs")
    ids = functools.partial(
        tokenize_for, chat=chat, lengths=args, pairs=len(args.positions) > 1, one_sided=objective.judged
    )
    result = joined(each_its_share(rows, ids))
    if not result.rows:
        reasons = "; ".join(in_words(result)) or "it has no rows"
        raise InputError(f"no row of the dataset is left to train on: {reasons}")
    for note in (*notes, *in_words(result)):
        logger.warning("%s", note)
    return result.rows
