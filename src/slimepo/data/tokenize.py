"""Records to token ids, every row that is left out counted by reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from slimepo.data.render import (
    LEFT_OUT,
    NO_BOUNDARY,
    NOT_PREFIX_SAFE,
    SEVERAL_TURNS,
    SPECIAL_TOKEN,
    TEMPLATE_REFUSES,
    ChatFormat,
    Response,
    RowRefused,
    encode_prompts,
    encode_responses,
    refuse_marks,
    render_prompt,
    render_response,
)
from slimepo.data.rows import Ids, Row, Value
from slimepo.data.split import row_hash
from slimepo.errors import InputError
from slimepo.files import Kept
from slimepo.types import Preference

MALFORMED_ROW = "malformed row"
TIE = "tie"
NO_VERDICT = "no verdict"
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
    SEVERAL_TURNS,
    SPECIAL_TOKEN,
    NOT_PREFIX_SAFE,
    LEFT_OUT,
    TEMPLATE_REFUSES,
    NO_BOUNDARY,
    TIE,
    NO_VERDICT,
    MALFORMED_ROW,
)
# What other templates write, and so what a text that was rendered before holds. It may be a text about templates.
_FOREIGN_MARKS = re.compile(
    r"<\|im_(?:start|end)\|>|\[/?INST\]|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|<(?:start|end)_of_turn>|<\|(?:user|assistant)\|>"
    r"|^### (?:Instruction|Response):|(?:^|\n\n)(?:Human|Assistant):|^(?:USER|User): .*\n*.*(?:ASSISTANT|Assistant):"
    r"|(?:</s>|<\|endoftext\|>|<\|end_of_text\|>|<eos>)\s*\Z",
    re.MULTILINE,
)
FOREIGN_MARKS = "marks of a chat template or a transcript in the text"
HARMLESS_TOKENS = "special tokens in the text that end no turn; they are read as such, as in generation"
_BATCH = 512


@dataclass(frozen=True)
class Drop:
    """A row that was left out: one of DROP_REASONS, where it came from, and what was the matter."""

    reason: str
    source: str
    detail: str = ""


@dataclass(frozen=True)
class Tokenized:
    """The rows that can be trained on in their order, the drops, and the ids of rows that were cut to fit.

    `remarks` are on rows that are kept and may not be what they seem.
    """

    rows: Kept[Row]
    drops: list[Drop]
    cut: list[str]
    remarks: list[Drop] = field(default_factory=list)


def joined(parts: Sequence[Tokenized]) -> Tokenized:
    """What was tokenised in parts, in one."""
    if len(parts) == 1:
        return parts[0]
    return Tokenized(
        Kept(row for part in parts for row in part.rows),
        [drop for part in parts for drop in part.drops],
        [row for part in parts for row in part.cut],
        [remark for part in parts for remark in part.remarks],
    )


class Lengths(Protocol):
    """The settings of a run that say which rows fit."""

    @property
    def max_length(self) -> int: ...
    @property
    def max_prompt_length(self) -> int | None: ...
    @property
    def cut_long_responses(self) -> bool: ...


def tokenize_for(
    preferences: Sequence[Preference],
    chat: ChatFormat,
    lengths: Lengths,
    *,
    pairs: bool,
    one_sided: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenized:
    """`tokenize` with the lengths that a run's settings give."""
    return tokenize(
        preferences, chat, max_length=lengths.max_length, max_prompt_length=lengths.max_prompt_length,
        cut=lengths.cut_long_responses, pairs=pairs, one_sided=one_sided, progress=progress,
    )  # fmt: skip


def in_words(tokens: Tokenized) -> list[str]:
    """What became of the rows, a sentence a kind: how many were dropped or cut, and the first of each kind."""
    total = len(tokens.rows) + len(tokens.drops)
    told = [(f" dropped: {reason}", drops) for reason, drops in by_reason(tokens.drops).items()]
    told += [(f": {remark}", drops) for remark, drops in by_reason(tokens.remarks).items()]
    sentences = [
        f"{len(drops):,} of {total:,} rows{what} (the first, {drops[0].source}: {drops[0].detail})"
        for what, drops in told
    ]
    return sentences + ([f"{len(tokens.cut):,} of {total:,} rows were cut to fit"] if tokens.cut else [])


def by_reason(drops: Iterable[Drop]) -> dict[str, list[Drop]]:
    """The drops of each reason."""
    grouped: dict[str, list[Drop]] = {}
    for drop in drops:
        grouped.setdefault(drop.reason, []).append(drop)
    return grouped


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
    nothing fits in, and for a template that no answer can be trained with.
    """
    if chat.refusal:
        raise InputError(chat.refusal)
    if max_length < 2 or (max_prompt_length is not None and max_prompt_length < 1):
        raise InputError(
            f"max_length {max_length} and max_prompt_length {max_prompt_length} leave no room for a prompt and a "
            "response; they must be at least 2 and 1"
        )
    result = Tokenized(Kept(), [], [])
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
    responses: list[Response] = []
    for row in batch:
        try:
            sides = _sides(row, wanted)
            prompt_text, rendered = _rendered(row, sides, chat)
        except RowRefused as refused:
            result.drops.append(Drop(refused.reason, _row_id(row), refused.detail))
            continue
        result.remarks.extend(_remarks(row, rendered, sides, chat))
        prompt_texts.append(prompt_text)
        responses += rendered
        kept.append((row, sides))
    encoded = iter(encode_responses(chat, responses))
    for (row, sides), prompt in zip(kept, encode_prompts(chat, prompt_texts), strict=True):
        answers = [next(encoded) for _ in sides]
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
        values: dict[str, Value] = {} if row.weight == 1 else {"weight": row.weight}
        if row.scores:
            values["rewards"] = np.array(row.scores, dtype=np.float32)
        result.rows.append(Row(_ids(prompt), given, values, row_id))


def _rendered(row: Preference, sides: Sequence[str], chat: ChatFormat) -> tuple[str, list[Response]]:
    """The text of the prompt and of each answer. Raises RowRefused."""
    for side in ("prompt", *sides):
        refuse_marks(chat, getattr(row, side), f"'{side}'")
    prompt = render_prompt(chat, row.prompt, row.template_options)
    answers = (getattr(row, side) for side in sides)
    return prompt, [render_response(chat, row.prompt, prompt, each, row.template_options) for each in answers]


def _remarks(
    row: Preference, rendered: Sequence[Response], sides: Sequence[str], chat: ChatFormat
) -> Iterator[Drop]:
    """What is worth saying of a row that is kept."""
    for remark in dict.fromkeys(response.remark for response in rendered if response.remark):
        yield Drop(remark, _row_id(row), "the template moves what it wrote before")
    if chat.template is None:
        return
    texts = [(side, turn["content"]) for side in ("prompt", *sides) for turn in getattr(row, side)]
    for remark, pattern in ((FOREIGN_MARKS, _FOREIGN_MARKS), (HARMLESS_TOKENS, chat.harmless)):
        matches = ((side, pattern.search(text)) for side, text in texts if pattern)
        if found := next(((side, match[0]) for side, match in matches if match), None):
            yield Drop(remark, _row_id(row), f"{found[1][:60]!r} in '{found[0]}'")


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
        if not any(turn["content"].strip() or "tool_calls" in turn for turn in getattr(row, side)):
            raise RowRefused(EMPTY_RESPONSE, f"'{side}' has no text")
    return given


def _fit(prompt: list[int], encoded: Sequence[list[int] | None], limits: _Limits) -> list[list[int]]:
    """The answers that fit behind the prompt. Raises RowRefused."""
    answers = [ids for ids in encoded if ids is not None]
    if len(answers) < len(encoded):
        raise RowRefused(NO_BOUNDARY, "the tokenizer melts the answer with whatever stands before it")
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
