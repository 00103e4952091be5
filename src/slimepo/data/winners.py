"""Rows whose two answers stand side by side, with a column that says which one is better."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from slimepo.data.messages import MalformedRow, RawRow, holds_something

# What such a column is called; ours is the first.
WINNERS = (
    "preferred",
    "winner",
    "preference",
    "better_response_id",
    "choice",
    "better",
    "preferred_response",
    "label",
)
# What the two answers are called before the letter or number that tells them apart; ours are response_a and response_b.
_ANSWERS = (
    "response",
    "answer",
    "completion",
    "conversation",
    "output",
    "reply",
    "candidate",
    "generation",
    "text",
)
_ENDS = (("a", "b"), ("0", "1"), ("1", "2"))
_READ = ("prompt", "chosen", "rejected", "system", "weight")
_TIE = re.compile(r"\b(tie|both|neither|equal|draw|same)")


class Tie(Exception):
    """A row that prefers neither of its answers."""


def sides_of(row: RawRow) -> tuple[str, str] | None:
    """The columns of the two answers, where there are just two under names such as response_a and response_b."""
    names = {str(key).lower(): str(key) for key in row}
    found = [
        (names[first], names[second])
        for stem in _ANSWERS
        for join in ("_", "-", "")
        for ends in _ENDS
        for first, second in [(f"{stem}{join}{ends[0]}", f"{stem}{join}{ends[1]}")]
        if first in names and second in names
    ]
    return found[0] if len(found) == 1 else None


def ordered(row: RawRow, columns: Mapping[str, str | None]) -> RawRow:
    """The row with `chosen` and `rejected`, where it has two answers side by side and says which one is better.

    `columns` has the names that its file gives to response_a and response_b, where these are not the file's own: the
    word that tells them apart (left_text, right_text) may say which one is better too. Any other row is given back.

    Raises:
        MalformedRow: it says so in a way that may mean either.
        Tie: neither is better.
    """
    sides = sides_of(row)
    column = next((name for name in WINNERS if name in row), None)
    if sides is None or column is None or {"chosen", "rejected"} & row.keys():
        return row
    value = row[column]
    theirs = (columns.get(sides[0]) or sides[0], columns.get(sides[1]) or sides[1])
    better = side_named(value, [sides, theirs])
    if better is None:
        if not holds_something(value) or _TIE.search(str(value).lower()):
            raise Tie
        ends = " or ".join(_differing(*sides))
        raise MalformedRow(
            f"{column!r} is {value!r}, which does not say whether {theirs[0]!r} or {theirs[1]!r} is better: "
            f"write {ends}"
        )
    result = {key: cell for key, cell in row.items() if key not in (*sides, column)}
    return result | {"chosen": row[sides[better]], "rejected": row[sides[1 - better]]}


def side_named(value: Any, names: Sequence[tuple[str, str]]) -> int | None:
    """Which of two columns a cell names, 0 or 1: by a whole name, or by what tells the names apart.

    A number names a column that ends in it. `model_a` and the like name the one that ends in the letter.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    said = str(value).strip().lower()
    for pair in names:
        for place, (whole, part) in enumerate(zip(pair, _differing(*pair), strict=True)):
            if said in (whole.lower(), part) or (
                part in ("a", "b") and re.fullmatch(rf"[a-z]+[ _-]{part}", said)
            ):
                return place
    return None


def _differing(first: str, second: str) -> tuple[str, str]:
    """The words and numbers in which two names differ: of left_text and right_text, left and right."""
    one, other = (re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name) for name in (first, second))
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return "_".join(one).lower(), "_".join(other).lower()


def refuse_unread_winner(row: RawRow, columns: Mapping[str, str | None]) -> None:
    """MalformedRow for a cell that says which of two columns is better, where one is read as chosen in every row."""
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    if chosen is None or rejected is None:
        return
    names = (chosen, rejected)
    # Names that have nothing in common, such as good and bad, are no pair of equals.
    if _differing(*names) == (chosen.lower(), rejected.lower()):
        return
    for key, value in row.items():
        if key in _READ or not isinstance(value, str) or side_named(value, [names]) is None:
            continue
        raise MalformedRow(
            f"{key!r} is {value!r}, which says which of {chosen!r} and {rejected!r} is better, and the first is "
            "read as chosen in every row: give "
            f"columns {{response_a: {chosen}, response_b: {rejected}, preferred: {key}}}, "
            f"or {{{key}: null}} to leave the column out"
        )
