"""Whatever a user hands to the trainer, as tokenised rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimepo.data.chat import chat_format
from slimepo.data.read import rows_from_records
from slimepo.data.rows import MISMATCHED, Row, as_preference, judged_rows, with_mismatched
from slimepo.data.tokenize import Drop, tokenize
from slimepo.errors import InputError
from slimepo.losses import Objective
from slimepo.types import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimepo.training.config import PreferenceConfig


logger = logging.getLogger(__name__)


def tokenized(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: PreferenceConfig,
    objective: Objective,
) -> list[Row] | None:
    """Tokenise a dataset of raw rows or of `Preference`, as the objective reads it; None stays None.

    Tokenised rows pass through. For an objective that learns from answers judged one by one a pair becomes two rows,
    and every row gets a mismatched answer where the objective asks for one.

    Raises:
        InputError: a dataset without length, rows of no known format, no tokenizer, or no row left.
    """
    if dataset is None:
        return None
    if not hasattr(dataset, "__len__"):
        raise InputError(
            "streaming datasets have no length and cannot be ordered exactly; load the rows first"
        )
    rows = list(dataset)
    if not (rows and isinstance(rows[0], Row)):
        rows = _tokenize(rows, tokenizer, args, objective)
    return rows_for(rows, objective, args.seed)


def rows_for(rows: Sequence[Row], objective: Objective, seed: int) -> list[Row]:
    """Tokenised rows in the form that the objective reads.

    Raises:
        InputError: a row lacks an answer that the objective reads.
    """
    if not objective.judged:
        for row in rows:
            absent = [i for i in objective.positions if not len(row.response(i))]
            if absent:
                raise InputError(
                    f"row {row.id} has no {('chosen', 'rejected')[absent[0]]} answer, and this loss reads it"
                )
        return list(rows)
    judged = judged_rows(rows)
    done = all(len(row.response(MISMATCHED)) for row in judged)
    return with_mismatched(judged, seed) if objective.mismatched and not done else judged


def without_reference(rows: Sequence[Row]) -> list[Row]:
    """The rows without log-probs of a reference: another trainer's would stand for this one's."""
    return [
        replace(row, values={name: value for name, value in row.values.items() if name != "reference"})
        for row in rows
    ]


def _tokenize(
    rows: list[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    args: PreferenceConfig,
    objective: Objective,
) -> list[Row]:
    if tokenizer is None:
        raise InputError("give processing_class, the tokenizer: the rows are not tokenised yet")
    if rows and isinstance(rows[0], Mapping):
        read = rows_from_records(rows)
        rows = [*read.preferences, *map(as_preference, read.unpaired)]
    if rows and not isinstance(rows[0], Preference):
        raise InputError(f"a dataset of {type(rows[0]).__name__} cannot be trained on: give preference pairs")
    result = tokenize(
        rows,
        chat_format(tokenizer, args.template_options),
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        cut=args.cut_long_responses,
        pairs=len(objective.positions) > 1,
        one_sided=objective.judged,
    )
    if not result.rows:
        reasons = ", ".join(sorted({drop.reason for drop in result.drops})) or "it has no rows"
        raise InputError(f"no row of the dataset is left to train on: {reasons}")
    _report(result.drops, result.cut, len(rows))
    return result.rows


def _report(drops: Sequence[Drop], cut: Sequence[str], total: int) -> None:
    """Say which rows were left out, as the command line does."""
    reasons = ", ".join(
        f"{count} {reason}" for reason, count in sorted(Counter(d.reason for d in drops).items())
    )
    if drops:
        logger.warning("%d of %d rows dropped: %s", len(drops), total, reasons)
    if cut:
        logger.warning("%d of %d rows cut to max_length", len(cut), total)
