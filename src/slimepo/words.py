"""Words in messages: the nearest known name, the first line of an error, a number in few characters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """' (did you mean X?)' for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


def nearest_entry(path: Path) -> str:
    """What `nearest` says of a path that is not there, by the entries of its folder."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder} either)"
    return nearest(path.name, [entry.name for entry in folder.iterdir()], cutoff=0.5)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def plural(count: int, noun: str) -> str:
    """A number of things: 1 row, 2 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# What stands in a table where there is no figure.
ABSENT = "–"


def short_number(value: float | None) -> str:
    """A number in the fewest characters, small ones as 1e-4, 5e-7 or 2.5e-5; at most six digits."""
    if value is None:
        return ABSENT
    mantissa, _, exponent = f"{value:.5e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value and not 0.01 <= abs(value) < 1e6 else f"{value:g}"
