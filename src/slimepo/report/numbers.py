"""How numbers are written on the page and in tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from slimepo.report.groups import Group, Spread
from slimepo.report.records import ABSENT, Record, number

Figure = Callable[[Record], float | None]


def written(value: Spread | None, form: str, scale: float = 1.0) -> str:
    """A figure; with several seeds the median, and the lowest and the highest in brackets."""
    if value is None:
        return ABSENT
    median, low, high = (_rounded(scale * each, form) for each in value[:3])
    return median if value.n == 1 else f"{median} ({low} to {high})"


def after(group: Group, key: str, form: str, scale: float = 1.0) -> str:
    """A held-out figure after training."""
    return written(group.spread(lambda record: record.after.get(key)), form, scale)


def change(group: Group, key: str, form: str, scale: float = 1.0) -> str:
    """A held-out figure before and after training: `-0.41 → -0.39`.

    With several seeds the medians, and in brackets the smallest and the largest change, for a seed is compared with its
    own start: `-0.41 → -0.39 (+0.01 to +0.03)`.
    """
    both = [r for r in group.records if key in r.before and key in r.after]
    if not both:
        return after(group, key, form, scale)
    was, now = [scale * r.before[key] for r in both], [scale * r.after[key] for r in both]
    medians = " → ".join(_rounded(statistics.median(values), form) for values in (was, now))
    changes = [b - a for a, b in zip(was, now, strict=True)]
    if len(both) == 1:
        return medians
    return f"{medians} ({_rounded(min(changes), f'+{form}')} to {_rounded(max(changes), f'+{form}')})"


def _rounded(value: float, form: str) -> str:
    """As `form` says, and never -0.00."""
    return format(value, f"+z{form[1:]}" if form.startswith("+") else f"z{form}")


def percent(share: float, digits: int) -> str:
    """A share in percent, with a space that does not break."""
    return f"{100 * share:.{digits}f}\u00a0%"


def count(value: Any) -> str:
    """A whole number with thousands marked."""
    whole = number(value)
    return ABSENT if whole is None else f"{whole:,.0f}"


def duration(value: Any) -> str:
    """Seconds in the unit that a reader thinks in."""
    seconds = number(value)
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def size(value: Any) -> str:
    """Bytes in MiB or GiB."""
    amount = number(value)
    if amount is None:
        return ABSENT
    mebibytes = amount / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"
