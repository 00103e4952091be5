"""Records to token ids, every row that is left out counted by reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slimepo.data.chat import (
    MALFORMED_ROW,
    NOT_PREFIX_SAFE,
    ChatFormat,
    RowRefused,
    encode_prompts,
    encode_responses,
    render_prompt,
    render_response,
)
from slimepo.data.rows import Ids, Row
from slimepo.data.split import row_hash
from slimepo.errors import InputError
from slimepo.types import Preference

EMPTY_RESPONSE = "empty response"
NOT_A_PAIR = "not a pair"
IDENTICAL_RESPONSES = "identical responses"
PROMPT_TOO_LONG = "prompt too long"
ROW_TOO_LONG = "row too long"
DROP_REASONS = (
    EMPTY_RESPONSE,
    NOT_A_PAIR,
    IDENTICAL_RESPONSES,
    PROMPT_TOO_LONG,
    ROW_TOO_LONG,
    NOT_PREFIX_SAFE,
    MALFORMED_ROW,
)
_BATCH = 512


@dataclass(frozen=True)
class Drop:
    """A row that was left out: one of DROP_REASONS, where it came from, and what was the matter."""

    reason: str
    source: str
    detail: str = ""


@dataclass(frozen=True)
class Tokenized:
    """The rows that can be trained on in their order, the drops, and the ids of rows that were cut to fit."""

    rows: list[Row]
    drops: list[Drop]
    cut: list[str]


def tokenize(
    preferences: Sequence[Preference],
    chat: ChatFormat,
    *,
    max_length: int = 2048,
    max_prompt_length: int | None = None,
    cut: bool = False,
    progress: Callable[[int, int], None] | None = None,
    pairs: bool = True,
    one_sided: bool = False,
) -> Tokenized:
    """Tokenise records; `max_length` counts the prompt and the longer response, in tokens.

    Rows that do not fit are dropped, or with `cut` their responses are cut and then carry no end token.
    With `pairs=False` only `chosen` is read (demonstrations); with `one_sided` rows that have one of the two
    responses are kept. `progress(done, total)` is called as rows are done. Raises InputError for limits that
    nothing fits in.
    """
    if max_length < 2 or (max_prompt_length is not None and max_prompt_length < 1):
        raise InputError(
            f"max_length {max_length} and max_prompt_length {max_prompt_length} leave no room for a prompt and a "
            "response; they must be at least 2 and 1"
        )
    result = Tokenized([], [], [])
    limits = _Limits(max_length, max_length - 1 if max_prompt_length is None else max_prompt_length, cut)
    wanted = _Wanted(("chosen", "rejected") if pairs else ("chosen",), one_sided)
    for start in range(0, len(preferences), _BATCH):
        batch = preferences[start : start + _BATCH]
        _tokenize_batch(batch, chat, limits, wanted, result)
        if progress is not None:
            progress(start + len(batch), len(preferences))
    return result


@dataclass(frozen=True)
class _Limits:
    length: int
    prompt: int
    cut: bool


@dataclass(frozen=True)
class _Wanted:
    sides: tuple[str, ...]
    one_sided: bool


def _tokenize_batch(
    batch: Sequence[Preference], chat: ChatFormat, limits: _Limits, wanted: _Wanted, result: Tokenized
) -> None:
    kept: list[tuple[Preference, tuple[str, ...]]] = []
    prompt_texts: list[str] = []
    response_texts: list[str] = []
    for row in batch:
        try:
            sides = _sides(row, wanted)
            prompt_text = render_prompt(chat, row.prompt)
            response_texts += [render_response(chat, row.prompt, prompt_text, getattr(row, s)) for s in sides]
        except RowRefused as refused:
            result.drops.append(Drop(refused.reason, _row_id(row), refused.detail))
            continue
        prompt_texts.append(prompt_text)
        kept.append((row, sides))
    responses = iter(encode_responses(chat, response_texts))
    for (row, sides), prompt in zip(kept, encode_prompts(chat, prompt_texts), strict=True):
        answers = [next(responses) for _ in sides]
        row_id = _row_id(row)
        try:
            fitted = _fit(prompt, answers, limits)
        except RowRefused as refused:
            result.drops.append(Drop(refused.reason, row_id, refused.detail))
            continue
        if fitted != answers:
            result.cut.append(row_id)
        by_side = dict(zip(sides, fitted, strict=True))
        given = tuple(_ids(by_side.get(side, [])) for side in wanted.sides)
        values = {} if row.weight == 1 else {"weight": row.weight}
        result.rows.append(Row(_ids(prompt), given, values, row_id))


def _row_id(row: Preference) -> str:
    return row.source or row_hash(row)


def _ids(ids: list[int]) -> Ids:
    return np.array(ids, dtype=np.int32)


def _sides(row: Preference, wanted: _Wanted) -> tuple[str, ...]:
    """The responses of a row that are read. Raises RowRefused."""
    given = tuple(side for side in wanted.sides if getattr(row, side))
    absent = [side for side in wanted.sides if side not in given]
    if absent and not (given and wanted.one_sided):
        raise RowRefused(NOT_A_PAIR, f"it has no '{absent[0]}'")
    for side in given:
        if not any(turn["content"].strip() for turn in getattr(row, side)):
            raise RowRefused(EMPTY_RESPONSE, f"'{side}' has no text")
    return given


def _fit(prompt: list[int], answers: list[list[int]], limits: _Limits) -> list[list[int]]:
    """The answers that fit behind the prompt. Raises RowRefused."""
    if len(answers) == 2 and answers[0] == answers[1]:
        raise RowRefused(IDENTICAL_RESPONSES, "'chosen' and 'rejected' are the same tokens")
    if len(prompt) > limits.prompt or len(prompt) >= limits.length:
        most = min(limits.prompt, limits.length - 1)
        raise RowRefused(PROMPT_TOO_LONG, f"the prompt has {len(prompt)} tokens, more than {most}")
    room = limits.length - len(prompt)
    longest = max(map(len, answers))
    if longest <= room:
        return answers
    if not limits.cut:
        both = f"{len(prompt)} + {longest} = {len(prompt) + longest}"
        raise RowRefused(
            ROW_TOO_LONG, f"prompt and longer response have {both} tokens, more than {limits.length}"
        )
    fitted = [answer[:room] for answer in answers]
    if len(fitted) == 2 and fitted[0] == fitted[1]:
        raise RowRefused(
            IDENTICAL_RESPONSES, "'chosen' and 'rejected' are the same tokens once they are cut to fit"
        )
    return fitted
