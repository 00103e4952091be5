"""Plain files: written whole or not at all, JSON lines that survive a kill, and where things are kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimepo.errors import InputError

# Levels of a value that is read; more than any row or setting has.
DEEPEST = 100


def write_text(path: Path, text: str) -> None:
    """Write a file so that a killed run leaves either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def refuse_folder(file: Path | None, option: str = "--out") -> None:
    """Nothing, where a file can be written, as far as can be told before there is anything to write.

    Raises:
        InputError: it is a folder, or lies in a file.
    """
    if file is not None and file.is_dir():
        raise InputError(f"{option} {file} is a folder; give a file")
    if file is not None and any(path.is_file() for path in file.parents):
        raise InputError(f"{option} {file} cannot be written: a part of the path is a file")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with path.open("ab") as file:
        file.write(content)


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
