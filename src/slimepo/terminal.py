"""The one console, and how far work before training is: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from slimepo.files import is_main_process
from slimepo.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console

Report = Callable[[int, int], None]

# Seconds between two plain lines.
EVERY = 10.0


def make_console(*, errors: bool = False, **options: Any) -> Console:
    """A console that prints text as it is: brackets in it are no markup, numbers are not coloured, lines not broken.

    It prints no secrets, and is silent on every rank but the main one. errors: to standard error. `options` are those
    of rich's Console.
    """
    from rich.console import Console

    plain: dict[str, Any] = (
        {"file": _Redacted("stderr" if errors else "stdout")} if "file" not in options else {}
    )
    plain |= {"markup": False, "highlight": False, "soft_wrap": True, "quiet": not is_main_process()}
    return Console(**(plain | options))


class _Redacted:
    """Standard output or standard error, whichever it is by then, without secrets."""

    def __init__(self, stream: str) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        written: int = getattr(sys, self._stream).write(redact(text))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self._stream), name)


@contextmanager
def counted(console: Console, what: str) -> Iterator[Report]:
    """Inside, the yielded function takes what is done and the total, and shows them; the bar is gone afterwards."""
    if not console.is_terminal:
        yield _lines(console, what)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True) as bar:
        # Without a total the bar says that something is under way.
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(console: Console, what: str) -> Report:
    shown = monotonic()

    def report(done: int, total: int) -> None:
        nonlocal shown
        now = monotonic()
        if now - shown >= EVERY:
            shown = now
            console.print(f"{what}: {done:,}/{total:,}")

    return report
