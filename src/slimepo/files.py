"""Plain files: written whole or not at all, JSON lines that survive a kill, and where things are kept."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

from slimepo.errors import InputError, ResourceError
from slimepo.redaction import without_known

T = TypeVar("T")
# Says that a folder is a run of slimepo; nothing is ever deleted from a folder without it.
MARKER = ".slimepo-run"
# Values of a `Kept` that are at hand at once.
IN_MEMORY = 2000
# Levels of a value that is read; more than any row or setting has.
DEEPEST = 100


def write_text(path: Path, text: str) -> None:
    """Write a file so that a killed run leaves either the old one or the new one, never half of it; without secrets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(without_known(text), encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def refuse_folder(file: Path | None, option: str = "--out") -> None:
    """Nothing, where a file can be written, as far as can be told before there is anything to write.

    Raises:
        InputError: it is a folder, or lies in a file.
        ResourceError: it lies where nothing may be written.
    """
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder; give a file")
    if any(path.is_file() for path in file.parents):
        raise InputError(f"{option} {file} cannot be written: a part of the path is a file")
    refuse_read_only(file, option)


def refuse_read_only(place: Path, option: str = "--out") -> None:
    """Nothing, where files may be made at a place or in the folder that it will lie in. Raises ResourceError."""
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise ResourceError(
            f"{option} {place} cannot be written: {there} is read-only; give a place that you may write"
        )


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON (a JSONDecodeError), or JSON that nothing could be done with.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError:
        # Python reads no number of more than 4300 digits.
        raise ValueError("a number of too many digits") from None
    # Whoever walks through a value calls itself once a level.
    if max(text.count("["), text.count("{")) > DEEPEST and depth(value) > DEEPEST:
        raise ValueError(f"JSON nested more than {DEEPEST} levels deep")
    return value


def depth(value: Any) -> int:
    """How many levels of lists and mappings a value has, at most one above DEEPEST."""
    level, levels = [value], 0
    while (level := [each for each in level if isinstance(each, list | dict)]) and levels <= DEEPEST:
        levels += 1
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return levels


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A row a line, written whole."""
    write_text(path, b"".join(map(_encoded, rows)).decode())


def write_json(path: Path, value: Any) -> None:
    """A value as indented JSON, written whole."""
    write_text(path, _encoded(value, indent=2).decode())


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where it is absent.

    Raises:
        InputError: the file is there and is not JSON.
    """
    if not path.exists():
        return None
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def json_lines(path: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where it is absent. A line cut off by a kill, also within a letter, is left out.

    Raises:
        InputError: `strict`, and a line that is not the last is no JSON object, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        # Split as bytes: str.splitlines takes characters that may stand in an answer for ends of lines.
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif strict and line.strip() and number < len(lines):
            raise InputError(f"{path}:{number}: no JSON object; mend or delete the line")
    return rows


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows in one write, so that a kill leaves at most one half line, which the next call removes."""
    content = b"".join(map(_encoded, rows))
    if not content:
        return
    content = without_known(content.decode()).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with path.open("ab") as file:
        file.write(content)


class Kept(Sequence[T]):
    """A list of any length in bounded memory: beyond the first IN_MEMORY its values wait in a file without a name.

    A value is read when it is asked for; a slice is a view. What lies in the file is written and read by this process
    and its children alone.
    """

    def __init__(self, values: Iterable[T] = ()) -> None:
        self._first: list[T] = []
        self._file: IO[bytes] | None = None
        # Where each further value begins in the file, and its length.
        self._starts, self._sizes, self._end = array("q"), array("q"), 0
        for value in values:
            self.append(value)

    def append(self, value: T) -> None:
        if len(self._first) < IN_MEMORY:
            self._first.append(value)
        else:
            self._starts.append(0)
            self._sizes.append(0)
            self._write(len(self._starts) - 1, value)

    def _write(self, at: int, value: T) -> None:
        if self._file is None:
            folder = cache_folder("rows")
            folder.mkdir(parents=True, exist_ok=True)
            # Not where temporary files are, which may be memory.
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open as long as this is)
        content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        written = os.pwrite(self._file.fileno(), content, self._end)
        if written < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache_folder("rows")))
        self._starts[at], self._sizes[at] = self._end, len(content)
        self._end += len(content)

    def __len__(self) -> int:
        return len(self._first) + len(self._starts)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Part(self, range(*index.indices(len(self))))
        at = range(len(self))[index] - len(self._first)
        if at < 0 or self._file is None:
            return self._first[at + len(self._first)]
        value: T = pickle.loads(os.pread(self._file.fileno(), self._sizes[at], self._starts[at]))
        return value

    def __setitem__(self, index: int, value: T) -> None:
        at = range(len(self))[index] - len(self._first)
        if at < 0:
            self._first[at + len(self._first)] = value
        else:
            self._write(at, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        # To another process it goes whole.
        return Kept, ([*self],)


class Part(Sequence[T]):
    """Some values of a sequence, by their places in it; they stay where they are."""

    def __init__(self, whole: Sequence[T], places: Sequence[int]) -> None:
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Part(self.whole, self.places[index])
        return self.whole[self.places[index]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place in one step."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)


def is_main_process() -> bool:
    """Whether this process writes files and speaks (rank 0 under torchrun or accelerate)."""
    return int(os.environ.get("RANK", "0")) == 0


def cache_folder(kind: str) -> Path:
    """Where things worth keeping between runs are kept: a folder of SLIMEPO_CACHE, else of the user's cache."""
    base = os.environ.get("SLIMEPO_CACHE")
    if base:
        return Path(base) / kind
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slimepo" / kind


def _mend(path: Path) -> None:
    """Cut a half-written last line off; a whole one without its line end gets it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        content = path.read_bytes()
        start = content.rfind(b"\n") + 1
        if _row(content[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _encoded(value: Any, indent: int | None = None) -> bytes:
    # Half a surrogate pair, which an answer may hold, is no text in UTF-8, but JSON has a way to write it: \\udXXX.
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
