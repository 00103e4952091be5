"""One process at a time where two would write the same files of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

# Under --out. The files in it stay; what counts is the operating system's lock, which ends with its process.
LOCKS = ".locks"


@contextmanager
def locked(out: Path, label: str, console: Console) -> Iterator[None]:
    """Hold the lock of this name in `out`; where another process has it, say so and wait until it is done.

    Raises:
        InputError: the folder cannot be written, or its file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / LOCKS / f"{label}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            words = (
                f"waiting for another process that is at work on {label} in {out} (Ctrl-C leaves it alone)"
            )
            console.print(words)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        # NotImplementedError: a file system without locks.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out {out} cannot be written: {reason}") from error
    try:
        yield
    finally:
        lock.release()
