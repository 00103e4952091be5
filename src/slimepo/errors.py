"""The errors that slimepo raises on purpose, and what becomes of any error: an exit code and one line of words."""

from __future__ import annotations

import errno
import pickle
import re
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

# Exit codes of every command. UNFORESEEN: a fault of slimepo's own, or of a library where none was expected.
DONE, UNFORESEEN, INPUT, FILES, NUMBERS, RESOURCES, UNSCORED, PREEMPTED = 0, 1, 2, 3, 4, 5, 6, 75


class InputError(ValueError):
    """Something the user gave is wrong (exit code 2). The message names the thing, the place and the way out."""


class BadFilesError(InputError):
    """Files of a checkpoint or a model are damaged, or not those that belong together (exit code 3)."""


class CertificateError(InputError):
    """A run's loss or gradients are not those of the plain computation, and nothing was trained (exit code 4)."""


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite; the message gives the step and the row ids (exit code 4)."""


class ResourceError(RuntimeError):
    """The machine has too little of something, or does not permit it: disk, memory, a folder (exit code 5)."""


class UnscoredError(RuntimeError):
    """Too many items of a benchmark have no score for the rest to stand for the whole (exit code 6)."""


class Preempted(RuntimeError):
    """A run was told to end and wrote a checkpoint; the same command goes on from there (exit code 75)."""


class Failure(NamedTuple):
    """What a command ends with."""

    code: int
    words: str


class RunsFailed(RuntimeError):
    """Of several runs some failed: ends with the code of the first, and with 75 only where all can simply go on."""

    def __init__(self, words: str, codes: Collection[int]) -> None:
        super().__init__(words)
        self.code = next((code for code in codes if code != PREEMPTED), PREEMPTED)


# The first that an error is an instance of counts.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (CertificateError, NUMBERS),
    (BadFilesError, FILES),
    (InputError, INPUT),
    (NonFiniteLossError, NUMBERS),
    (ResourceError, RESOURCES),
    (UnscoredError, UNSCORED),
    (Preempted, PREEMPTED),
    (KeyboardInterrupt, PREEMPTED),
    (MemoryError, RESOURCES),
    (ImportError, INPUT),
)
# What the system says of a name that was given, and not of the machine.
_OF_A_NAME = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
_WAYS_OUT = {
    errno.ENOSPC: "free some space, or give a folder on another disk; the same command then goes on",
    errno.EDQUOT: "free some space, or give a folder on another disk; the same command then goes on",
    errno.EFBIG: "raise the limit (ulimit -f), or give a folder on another disk; the same command then goes on",
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.EROFS: "give a place that can be written",
    errno.EMFILE: "raise the limit (ulimit -n)",
}
# Libraries written in Rust or C++ say what the system said in words alone.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_WRITE_FAILED = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs")
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|std::bad_alloc|Unable to allocate", re.IGNORECASE
)
_LONGEST = 2000


def failure(error: BaseException) -> Failure:
    """The exit code of any error, and its words: one line that says what, where, and what to do.

    An error that nobody foresaw has code 1, its type, and the place in slimepo that it came through.
    """
    if isinstance(error, RunsFailed):
        return Failure(error.code, _line(error))
    number = _system_error(error)
    known = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    if is_closed_pipe(error):
        return Failure(RESOURCES, "nobody reads the output any more: the pipe that it goes to is closed")
    if isinstance(error, KeyboardInterrupt):
        return Failure(PREEMPTED, "interrupted; the same command goes on where it can")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("slimepo"):
        return Failure(
            INPUT, f"the package {error.name} is not installed: pip install {error.name.partition('.')[0]}"
        )
    if isinstance(error, pickle.UnpicklingError):
        # Not the words of torch, which advise to read it all the same.
        return Failure(
            FILES,
            "a file of the checkpoint is damaged, or holds more than tensors, and is not read; delete it",
        )
    if known is not None and not isinstance(error, ImportError | MemoryError):
        return Failure(known, _line(error))
    if number is not None:
        file = getattr(error, "filename", None)
        way_out = f"; {_WAYS_OUT[number]}" if number in _WAYS_OUT else ""
        said = (error.strerror if isinstance(error, OSError) else None) or _line(error)
        return Failure(
            INPUT if number in _OF_A_NAME else RESOURCES, f"{f'{file}: ' if file else ''}{said}{way_out}"
        )
    if isinstance(error, MemoryError) or _is_memory(error):
        return Failure(
            RESOURCES,
            f"out of memory ({_line(error)[:200]}); lower micro_batch_size, batch_rows or max_length, or give a "
            "smaller model",
        )
    if _WRITE_FAILED.search(str(error)):
        return Failure(RESOURCES, f"a file could not be written: {_line(error)[:200]}; is the disk full?")
    if known is not None or isinstance(error, OSError):
        return Failure(known or RESOURCES, f"{type(error).__name__}: {_line(error)}")
    said = f"{type(error).__name__}: {_line(error)[:300]}{_place(error)}"
    return Failure(UNFORESEEN, f"{said}; nobody foresaw this: --debug shows the traceback")


def unwritable(
    place: str, error: Exception, way_out: str = "give another place"
) -> InputError | ResourceError:
    """The error of a place that could not be written: whether its name is wrong or the machine forbids it."""
    kind = InputError if failure(error).code != RESOURCES else ResourceError
    return kind(f"{place} cannot be written: {getattr(error, 'strerror', None) or error}; {way_out}")


def is_closed_pipe(error: BaseException) -> bool:
    """Whether the output can go nowhere; rich ends the program where it finds that."""
    return isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)


def one_line(text: str) -> str:
    """A text in one line of bounded length, without characters that steer a terminal."""
    text = re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", text).strip()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST * 3 // 4]} ... {text[-_LONGEST // 4 :]}"


def _line(error: BaseException) -> str:
    return one_line(str(error)) or type(error).__name__


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error behind an exception, which may say it in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    if isinstance(error, InputError):
        return None
    said = _SYSTEM_ERROR.search(str(error))
    return int(said[1]) if said else None


def _is_memory(error: BaseException) -> bool:
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError | ValueError) and bool(_OUT_OF_MEMORY.search(str(error))))


def _place(error: BaseException) -> str:
    """The line of slimepo's that an error came through last."""
    ours = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(ours):
            return f" (in {Path(frame.filename).relative_to(ours.parent)}:{frame.lineno})"
    return ""
