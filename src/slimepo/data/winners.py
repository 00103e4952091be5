"""Rows whose two answers stand side by side, with a column that says which one is better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from slimepo.data.messages import MalformedRow, RawRow, holds_something

# What such a column is called; ours is the first.
WINNERS = ("preferred", "winner", "preference", "better_response_id", "choice")
# What the two answers are called before the letter or number that tells them apart; ours are response_a and response_b.
_ANSWERS = ("response", "answer", "completion", "conversation", "output", "reply", "candidate", "generation")
_ENDS = (("a", "b", "c"), ("0", "1", "2"), ("1", "2", "3"))
# A row with one of these has its answer already.
_ANSWERED = ("chosen", "rejected", "completion", "output", "response")
_TIE = re.compile(
    r"(a )?(tie|tied|both|neither|none|equal|draw|same|no preference)([ _-]?\(?(both)?[ _-]?(bad|good)\)?)?"
)
_SOMEBODY = r"(model|assistant|response|answer|completion|output|candidate|option)[ _-]?"


class Tie(Exception):
    """A row that prefers neither of its answers; `row` has them in their own order, as if the first was better."""

    def __init__(self, row: RawRow) -> None:
        self.row = row


class NoVerdict(MalformedRow):
    """A number that names no side, such as one of a scale: what it means, a file's other numbers then mean too."""


def sides_of(row: RawRow) -> tuple[str, str] | None:
    """The columns of the two answers, where there are just two under names such as response_a and response_b."""
    names = {str(key).lower(): str(key) for key in row}
    found = []
    for stem in _ANSWERS:
        for join in ("_", "-", ""):
            for first, second, third in _ENDS:
                pair = (f"{stem}{join}{first}", f"{stem}{join}{second}")
                if {*pair} <= names.keys():
                    found.append((names[pair[0]], names[pair[1]]))
                    if f"{stem}{join}{third}" in names:
                        return None
    return found[0] if len(found) == 1 else None


def ordered(row: RawRow, columns: Mapping[str, str | None]) -> RawRow:
    """The row with `chosen` and `rejected`, where it has two answers side by side and says which one is better.

    `columns` has the names that its file gives to response_a and response_b, where these are not the file's own: it is
    the file's that say which is better. Any other row is given back.

    Raises:
        MalformedRow: it says so in a way that may mean either.
        Tie: neither is better.
    """
    sides = sides_of(row)
    there = [str(key) for key in row if str(key).lower() in WINNERS]
    if sides is None or not there or any(name in row for name in _ANSWERED):
        return row
    column = next((name for name in there if holds_something(row[name])), there[0])
    value, said = row[column], str(row[column]).strip()
    theirs = (columns.get(sides[0]) or sides[0], columns.get(sides[1]) or sides[1])
    called = columns.get(column) or column
    for side, name in zip(sides, theirs, strict=True):
        if row[side] is None:
            raise MalformedRow(f"{name!r} is null")
    better = side_named(value, theirs)
    # Some files repeat the better answer.
    texts = [place for place, side in enumerate(sides) if said and row[side] == value]
    if len(texts) == 1 and better in (None, texts[0]):
        better = texts[0]
    elif len(texts) == 1:
        raise MalformedRow(f"{called!r} is {value!r}, which names one answer and is the text of the other")
    rest = {key: cell for key, cell in row.items() if key not in (*sides, column)}
    pair = [row[side] for side in sides]
    if better is None:
        if not holds_something(value) or _TIE.fullmatch(said.lower()):
            raise Tie(rest | {"chosen": pair[0], "rejected": pair[1]})
        kind = NoVerdict if _number(value) is not None else MalformedRow
        raise kind(
            f"{called!r} is {value!r}, which does not say whether {theirs[0]!r} or {theirs[1]!r} is better: write one "
            "of these names"
        )
    return rest | {"chosen": pair[better], "rejected": pair[1 - better]}


def side_named(value: Any, names: tuple[str, str]) -> int | None:
    """Which of two columns a cell names, 0 or 1: by the whole name, or by what tells the names apart.

    A number names a column that ends in it. `model_a` and the like name the one that ends in the letter.
    """
    number = _number(value)
    if number is None and not isinstance(value, str):
        return None
    said = str(value if number is None else number).strip().lower()
    for place, (whole, part) in enumerate(zip(names, _differing(*names), strict=True)):
        if said and (
            said in (whole.lower(), part) or (part and re.fullmatch(_SOMEBODY + re.escape(part), said))
        ):
            return place
    return None


def _number(value: Any) -> int | None:
    """A whole number, also as a float or text, as tables have it."""
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d{1,9}(\.0+)?", str(value).strip()):
        return None
    return int(float(value))


def _differing(first: str, second: str) -> tuple[str, str]:
    """The words and numbers in which two names differ: of left_text and right_text, left and right."""
    one, other = (re.findall(r"[^\W\d_a-z]?[^\W\d_A-Z]+|[^\W\d_]+|\d+", name) for name in (first, second))
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return "_".join(one).lower(), "_".join(other).lower()


def passed_over(rows: Iterable[RawRow], columns: Mapping[str, str | None], read: Iterable[str]) -> str | None:
    """What is wrong with a mapping that reads one of two equals as chosen, where a column says which one is better.

    That is a column that names both of them over these rows and holds nothing else; `read`: columns that formats read.
    """
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    # Names that have nothing in common, such as good and bad, are no pair of equals.
    if not chosen or not rejected or _differing(chosen, rejected) == (chosen.lower(), rejected.lower()):
        return None
    named: dict[str, set[int | None]] = {}
    for row in rows:
        for key, value in row.items():
            if holds_something(value) and not _TIE.fullmatch(str(value).strip().lower()):
                named.setdefault(str(key), set()).add(side_named(value, (chosen, rejected)))
    skipped = {*read, *columns, *columns.values()}
    for key, places in named.items():
        if places == {0, 1} and key not in skipped:
            return (
                f"{key!r} says which of {chosen!r} and {rejected!r} is better, and the first would be read as chosen "
                f"in every row: give columns {{response_a: {chosen}, response_b: {rejected}, preferred: {key}}}, or "
                f"{{{key}: null}} to leave the column out"
            )
    return None
