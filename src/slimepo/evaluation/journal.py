"""Append-only JSONL files that survive a kill: every finished row stays, a half-written last line goes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimepo.errors import InputError


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where it is absent. A half-written last line is left out.

    Raises:
        InputError: another line is no JSON object, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: no JSON object; mend or delete the line")
        rows.append(row)
    return rows


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows in one write, so that a kill leaves at most one half line, which the next call removes."""
    content = b"".join(_line(row) for row in rows)
    if not content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with path.open("ab") as file:
        file.write(content)


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


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair is no text in UTF-8, but JSON has a way to write it.
        return json.dumps(row).encode() + b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
