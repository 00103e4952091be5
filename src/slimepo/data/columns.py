"""What each column of a row is for: read, read under another name, refused, or left unread and said so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimepo.data.messages import MalformedRow, RawRow, holds_something, json_object, number, unread_keys
from slimepo.data.winners import best_and_worst, ordered
from slimepo.errors import InputError

# Names that others give to our columns; one is read where ours is not there.
SYNONYMS = {
    "kto_tag": "label",
    "question": "prompt",
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
    "rejected_messages": "rejected",
    "response_j": "chosen",
    "response_k": "rejected",
    "system_prompt": "system",
    "system_message": "system",
}

# Scores of the two answers of a pair: held against their order, and `rewards` for objectives that ask for such.
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)

# Read in every format, beside what the format itself reads.
ALWAYS_READ = (
    "system", "weight", "tools", "chat_template_kwargs", *(column for pair in _SCORES for column in pair),
)  # fmt: skip
# So many columns a message names.
_NAMED = 8

# Columns that tell what a row is worth or what is in it: refused by name where the format does not read them.
_ONLY_TEXT = "only text is trained on"
_TELLING = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _ONLY_TEXT),
    **dict.fromkeys(
        ("label", "kto_tag", "preferred", "preference", "winner", "better_response_id", "safer_response_id"),
        "it says which answer is good, and this format does not read it",
    ),
    **dict.fromkeys(
        ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages"),
        "it holds an answer, and this format does not read it",
    ),
    **dict.fromkeys(
        ("reasoning_content", "thinking", "tool_calls"),
        "it belongs to an answer: write it into the answer's message",
    ),
    "history": "it holds earlier turns: write them into the prompt as messages",
    "documents": "documents are not rendered",
}
# The same where a row has one answer, which a low score would make a bad one.
_TELLING_OF_ONE = dict.fromkeys(
    ("score", "scores", "rating", "ratings", "reward", "rank", "overall_score"),
    "it says how good the answer is, and this format trains every answer alike",
)


def columns_from(given: Iterable[str]) -> dict[str, str | None]:
    """The mapping of `--column OURS=THEIRS`, as often as it is given; `OURS=` and `OURS=null` leave a column out."""
    columns: dict[str, str | None] = {}
    for pair in given:
        ours, separator, theirs = pair.partition("=")
        if not separator:
            raise InputError(f"--column {pair!r} is not OURS=THEIRS, such as prompt=question")
        if ours == "null":
            raise InputError(
                f"--column {pair!r}: it is OURS=THEIRS, and null is no column of ours; {theirs}= leaves the column out"
            )
        columns[ours] = None if theirs in ("", "null") else theirs
    return columns


def renamed(row: RawRow, columns: Mapping[str, str | None]) -> RawRow:
    """The row under the names that formats read.

    `columns` says which column of the row is ours: {"prompt": "question"}; {"label": None} leaves a column out. Other
    people's names for ours (SYNONYMS) are read where ours is not there, OpenAI's `input` is opened, and of two answers
    that stand side by side, or of a list, the better one is chosen (`slimepo.data.winners`). Raises MalformedRow where
    a column that was asked for is not there, and Tie where no answer is better.
    """
    result = {key: value for key, value in row.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        result.pop(ours, None)
        if theirs is not None:
            if theirs not in row and ours in row:
                raise MalformedRow(
                    f"no '{theirs}' (columns: {listed(row)}); ours comes first: did you mean {theirs}={ours}?"
                )
            # No verdict is one too: a tie.
            result[ours] = row[theirs] if ours == "preferred" and theirs in row else required(row, theirs)
    given = result.get("input")
    if isinstance(given, str) and given.lstrip().startswith('{"messages"'):
        given = json_object(given, "'input'")
    if isinstance(given, Mapping) and "messages" in given:
        result |= {**given, "input": None}
    elif isinstance(given, str) and given and not {"instruction", "prompt", "question"} & result.keys():
        result["prompt"] = result.pop("input")
    for theirs, ours in SYNONYMS.items():
        same = theirs in result and result.get(ours) == result[theirs]
        if holds_something(result.get(theirs)) and (same or not holds_something(result.get(ours))):
            result[ours] = result.pop(theirs)
    return ordered(best_and_worst(result, columns), columns)


def refuse_telling(row: RawRow, reads: Sequence[str], single: bool) -> None:
    """MalformedRow for a column that tells something and is not among `reads`; `single`: the row has one answer."""
    for key, reason in (_TELLING | (_TELLING_OF_ONE if single else {})).items():
        if key not in reads and holds_something(row.get(key)):
            way_out = "" if reason == _ONLY_TEXT else f"; {leaving_out(key)}"
            names = [key, *(theirs for theirs, ours in SYNONYMS.items() if ours == key and theirs not in row)]
            raise MalformedRow(f"{' or '.join(map(repr, names))} is not empty: {reason}{way_out}")


def leaving_out(key: str) -> str:
    """How a column is left out of what is read."""
    return f"remove the column (columns: {{{key}: null}} leaves it out)"


def unread_columns(given: RawRow, row: RawRow, format_reads: Sequence[str]) -> list[str]:
    """Columns of a row, and keys of its messages, that hold something and that the format does not read.

    Not those that repeat a turn of what is read. given: the row as it stands in its file, under whose names they are.
    """
    reads = (*format_reads, *ALWAYS_READ)
    turns = [turn for column in format_reads if isinstance(row.get(column), list) for turn in row[column]]
    said = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    keys = [f"{column}.{key}" for column in format_reads for key in unread_keys(row.get(column))]
    for key, value in row.items():
        repeats = isinstance(value, str) and value in said
        if key not in reads and holds_something(value) and not repeats:
            theirs = next((name for name in given if given[name] is value), key)
            keys.append(str(key if key in given else theirs))
    return keys


def scores_of(row: RawRow) -> tuple[float, float] | None:
    """What the row itself says that its chosen and its rejected answer are worth; None where it does not."""
    for chosen, rejected in _SCORES:
        pair = (number(row.get(chosen)), number(row.get(rejected)))
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    return None


def listed(names: Iterable[object]) -> str:
    """The names of columns for a message: of many the first and how many more there are."""
    ordered_names = sorted(map(str, names))
    more = len(ordered_names) - _NAMED
    return ", ".join(ordered_names[:_NAMED]) + (f", and {more} more" if more > 0 else "") or "none"


def required(row: RawRow, key: str) -> Any:
    """A cell that has to be there. Raises MalformedRow."""
    if key not in row:
        raise MalformedRow(f"no '{key}' (columns: {listed(row)})")
    if row[key] is None:
        raise MalformedRow(f"'{key}' is null")
    return row[key]
