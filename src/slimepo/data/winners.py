"""Which of a row's answers is the better one: of two side by side, by a column or scores; of a list, by scores."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimepo.data.messages import MalformedRow, RawRow, holds_something, number
from slimepo.files import parse_json
from slimepo.words import plural

# What such a column is called; ours is the first.
WINNERS = ("preferred", "winner", "preference", "better_response_id", "choice")
# What the two answers are called before the letter or number that tells them apart; ours are response_a and response_b.
_ANSWERS = ("response", "answer", "completion", "conversation", "output", "reply", "candidate", "generation")
_ENDS = (("a", "b", "c"), ("0", "1", "2"), ("1", "2", "3"))
# What scores of the two sides are called, before or behind what tells the sides apart: score_a, answer_1_rating.
_SCORES = ("score", "rating", "reward", "avg_rating", "overall_score")
# What the list's column is called; ours is the first.
_LISTS = ("answers", "completions", "responses", "candidates", "generations", "outputs")
# What an answer's text is called in an item of the list, and what says how good it is; of a rank, 1 is the best.
_TEXTS = ("response", "answer", "completion", "text", "content", "output")
_LIST_SCORES = ("overall_score", "score", "rating", "reward", "stars", "rank")
# A row with one of these has its answer already.
_ANSWERED = ("chosen", "rejected", "completion", "output", "response")
_TIE = re.compile(
    r"(a )?(tie|tied|both|neither|none|equal|draw|same|no preference)([ _-]?\(?(both)?[ _-]?(bad|good)\)?)?"
)
_SOMEBODY = r"(model|assistant|response|answer|completion|output|candidate|option)[ _-]?"


class Tie(Exception):
    """A row that prefers neither of its answers; `row` has them in their own order, as if the first was better.

    `blank`: it does not say that they are equal; it says nothing.
    """

    def __init__(self, row: RawRow, blank: bool = False) -> None:
        self.row, self.blank = row, blank


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

    A column says it, or two scores, which travel as `score_chosen` and `score_rejected` whatever says it. `columns` has
    the names that its file gives to response_a and response_b, where these are not the file's own: it is the file's
    that say which is better. Any other row is given back.

    Raises:
        MalformedRow: it says so in a way that may mean either.
        Tie: neither is better, or nothing says which.
    """
    sides = sides_of(row)
    if sides is None or any(name in row for name in _ANSWERED):
        return row
    theirs = (columns.get(sides[0]) or sides[0], columns.get(sides[1]) or sides[1])
    there = [str(key) for key in row if str(key).lower() in WINNERS]
    scored = _scored(row, sides, theirs, columns)
    if not there and not scored:
        return row
    for side, name in zip(sides, theirs, strict=True):
        if row[side] is None:
            raise MalformedRow(f"{name!r} is null")
    rest = {key: cell for key, cell in row.items() if key not in sides}
    blank = False
    if there:
        column = next((name for name in there if holds_something(row[name])), there[0])
        blank = not holds_something(rest.pop(column))
        better = None if blank else _named_side(row, column, sides, theirs, columns)
    else:
        better = _scored_side(row, scored, theirs, columns)
    order = (better or 0, 1 - (better or 0))
    found = [number(row.get(name)) for name in scored[0]] if len(scored) == 1 else []
    if found and None not in found:
        rest = {key: cell for key, cell in rest.items() if key not in scored[0]}
        rest |= {"score_chosen": found[order[0]], "score_rejected": found[order[1]]}
    rest |= {"chosen": row[sides[order[0]]], "rejected": row[sides[order[1]]]}
    if better is None:
        raise Tie(rest, blank)
    return rest


def _named_side(
    row: RawRow,
    column: str,
    sides: tuple[str, str],
    theirs: tuple[str, str],
    columns: Mapping[str, str | None],
) -> int | None:
    """Which side the cell of a column that says it calls better; None where that is neither. Raises MalformedRow."""
    value, said = row[column], str(row[column]).strip()
    called = columns.get(column) or column
    better = side_named(value, theirs)
    # Some files repeat the better answer.
    texts = [place for place, side in enumerate(sides) if said and row[side] == value]
    if len(texts) == 1 and better in (None, texts[0]):
        return texts[0]
    if len(texts) == 1:
        raise MalformedRow(f"{called!r} is {value!r}, which names one answer and is the text of the other")
    if better is None and not _TIE.fullmatch(said.lower()):
        kind = NoVerdict if _number(value) is not None else MalformedRow
        raise kind(
            f"{called!r} is {value!r}, which does not say whether {theirs[0]!r} or {theirs[1]!r} is better: write one "
            "of these names"
        )
    return better


def _scored(
    row: RawRow, sides: tuple[str, str], theirs: tuple[str, str], columns: Mapping[str, str | None]
) -> list[tuple[str, str]]:
    """Columns that score the two sides: named after the file's names of these; where they are mapped, after ours."""
    found = [pair for pair in score_columns(row, theirs) if not columns.keys() & {*pair}]
    mapped = [pair for pair in score_columns(row, sides) if columns.keys() & {*pair}]
    return found + [pair for pair in mapped if all(columns.get(name, name) for name in pair)]


def _scored_side(
    row: RawRow,
    scored: list[tuple[str, str]],
    theirs: tuple[str, str],
    columns: Mapping[str, str | None],
) -> int | None:
    """Which side has the higher score; None where both have the same. Raises MalformedRow."""
    if len(scored) > 1:
        raise MalformedRow(
            f"{scored[0][0]!r} and {scored[1][0]!r} both say how good {theirs[0]!r} is: leave one of them out, "
            f"columns: {{{scored[0][0]}: null, {scored[0][1]}: null}}"
        )
    scores = []
    for name, side in zip(scored[0], theirs, strict=True):
        score = number(row.get(name))
        if score is None:
            cell = "null" if row.get(name) is None else repr(row[name])
            raise MalformedRow(
                f"{columns.get(name) or name!r} is {cell}, and should be a number: the score of {side!r}"
            )
        scores.append(score)
    return None if scores[0] == scores[1] else int(scores[1] > scores[0])


def score_columns(names: Iterable[str], sides: tuple[str, str]) -> list[tuple[str, str]]:
    """Pairs of columns that score two sides: score_1, 1_score, answer_1_score ...; else one that is there by half."""
    there = {str(name).lower(): str(name) for name in names}
    pairs = [
        (there.get(first, first), there.get(second, second))
        for first, second in _score_names(*sides)
        if first in there or second in there
    ]
    present = set(there.values())
    return [pair for pair in pairs if {*pair} <= present] or pairs[:1]


@functools.cache
def _score_names(first: str, second: str) -> list[tuple[str, str]]:
    """What scores of two sides may be called, in small letters."""
    marks = dict.fromkeys([_differing(first, second), (first.lower(), second.lower())])
    return [
        # Of answer and answer_2 the first has no mark: score and score_2.
        (f"{before}{one}{behind}" if one else stem, f"{before}{other}{behind}" if other else stem)
        for one, other in marks
        for stem in _SCORES
        for join in ("_", "-", " ", "")
        for before, behind in ((f"{stem}{join}", ""), ("", f"{join}{stem}"))
    ]


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


def answer_list(row: RawRow) -> tuple[str, Sequence[Any]] | None:
    """The column that holds several answers, and these, in a row that has not its chosen or rejected one already."""
    if any(holds_something(row.get(side)) for side in ("chosen", "rejected")):
        return None
    return next(((name, found) for name in _LISTS if len(found := _items(row.get(name))) > 1), None)


def best_and_worst(row: RawRow, columns: Mapping[str, str | None]) -> RawRow:
    """The row with `chosen`, `rejected` and their scores, where it has a list of answers that says how good they are.

    It says so in the items (`[{"text": ..., "score": 4}, ...]`), or in a list of its own (`scores`). Of answers that
    are equally good the first one counts. What is not read stays under names of its own: keys of the items, and the
    answers between. `columns` has the names that the file gives to ours. Any other row is given back.

    Raises:
        MalformedRow: an answer has no text or no number, or a score and a rank disagree.
        Tie: all answers are equally good.
    """
    listed = answer_list(row)
    if listed is None or not (kinds := _scores_of_list(row, listed[1])):
        return row
    column, items = listed
    called = columns.get(column) or column
    ends = set()
    for name, cells in kinds.items():
        values = [number(cell) for cell in cells]
        if len(values) != len(items):
            raise MalformedRow(f"{name!r} has {plural(len(values), 'number')} for {len(items)} {called!r}")
        if None in values:
            raise MalformedRow(
                f"answer {values.index(None) + 1} of {called!r} has no {name!r} that is a number"
            )
        sign = -1 if name.startswith("rank") else 1
        scores = [sign * value for value in values if value is not None]
        ends.add((scores.index(max(scores)), scores.index(min(scores))))
    if len(ends) > 1:
        raise MalformedRow(
            f"{' and '.join(kinds)} of {called!r} do not call the same answers the best and the worst"
        )
    best, worst = ends.pop()
    # Where all are equally good there is still a prompt, with two answers.
    sides = {"chosen": best, "rejected": worst if worst != best else len(items) - 1}
    keys = {key for item in items if isinstance(item, Mapping) for key in item if holds_something(item[key])}
    found: dict[str, Any] = {key: cell for key, cell in row.items() if key not in {column, *kinds}}
    found |= {f"{called}.{key}": True for key in sorted(keys - {*kinds, *_TEXTS, "role"})}
    found |= {f"{called} between the best and the worst": True} if len(items) > 2 else {}
    name, cells = next(iter(kinds.items()))
    for side, at in sides.items():
        found[side] = _answer(items[at], f"answer {at + 1} of {called!r}")
        # A rank says the order alone, and is no reward.
        found |= {} if name.startswith("rank") else {f"score_{side}": number(cells[at])}
    if best == worst:
        raise Tie(found)
    return found


def _items(cell: Any) -> Sequence[Any]:
    """A list, also as JSON text or an array, as tables have it; anything else has no items."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = parse_json(cell)
        except ValueError:
            return []
    cell = cell.tolist() if type(cell).__name__ == "ndarray" else cell
    return cell if isinstance(cell, list) else []


def _scores_of_list(row: RawRow, items: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Every kind of score that the answers have, a cell an answer: in the items, or in lists beside theirs."""
    if any(isinstance(item, Mapping) for item in items):
        cells = [item if isinstance(item, Mapping) else {} for item in items]
        # A table has a cell for every key that any row has.
        inside = [name for name in _LIST_SCORES if any(item.get(name) is not None for item in cells)]
        if inside:
            return {name: [item.get(name) for item in cells] for name in inside}
    names = (name for each in _LIST_SCORES for name in (each, f"{each}s"))
    return {name: found for name in names if (found := _items(row.get(name)))}


def _answer(item: Any, what: str) -> Any:
    """The answer in an item of the list: a text, a message, or messages."""
    if not isinstance(item, Mapping) or "role" in item:
        return item
    texts = [key for key in _TEXTS if item.get(key) is not None]
    if len(texts) != 1:
        raise MalformedRow(
            f"{what} has {' and '.join(texts) or 'no text'}: one of {', '.join(_TEXTS)} is its text"
        )
    return item[texts[0]]


def passed_over(rows: Iterable[RawRow], columns: Mapping[str, str | None], read: Iterable[str]) -> str | None:
    """What is wrong with a mapping that reads one of two equals as chosen, where the rows say which one is better.

    By scores of both, or in a column that names both of them over these rows and holds nothing else; `read`: columns
    that formats read.
    """
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    if not chosen or not rejected:
        return None
    skipped = {*read, *columns, *columns.values()}
    # Names that have nothing in common, such as good and bad, are no pair of equals.
    equals = _differing(chosen, rejected) != (chosen.lower(), rejected.lower())
    named: dict[str, set[int | None]] = {}
    for row in rows:
        for pair in score_columns(row, (chosen, rejected)):
            first, second = (number(row.get(name)) for name in pair)
            if first is None or second is None or skipped & {*pair}:
                continue
            if equals or second > first:
                return (
                    f"{pair[0]!r} and {pair[1]!r} say which of {chosen!r} and {rejected!r} is better, and the first "
                    f"would be read as chosen in every row: give columns {{response_a: {chosen}, response_b: "
                    f"{rejected}}}, or {{{pair[0]}: null, {pair[1]}: null}} to leave the scores out"
                )
        for key, value in row.items():
            if holds_something(value) and not _TIE.fullmatch(str(value).strip().lower()):
                named.setdefault(str(key), set()).add(side_named(value, (chosen, rejected)))
    for key, places in named.items():
        if equals and places == {0, 1} and key not in skipped:
            return (
                f"{key!r} says which of {chosen!r} and {rejected!r} is better, and the first would be read as chosen "
                f"in every row: give columns {{response_a: {chosen}, response_b: {rejected}, preferred: {key}}}, or "
                f"{{{key}: null}} to leave the column out"
            )
    return None
