"""Rows of the benchmarks' own files: JSONL and JSON, plain or gzip, read and written as upstream does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimepo.data.files import BadRow, file_rows
from slimepo.errors import InputError

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl or .json file (a list of objects), also with .gz.

    Raises:
        InputError: the file cannot be read, or a row is not a JSON object; the line names file and line.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there")
    rows = []
    for place, row in file_rows(path):
        if isinstance(row, BadRow):
            raise InputError(f"{place}: {row.reason}")
        rows.append(dict(row))
    return rows


def row_line(row: Row) -> str:
    """One row as one line of JSONL, without the line break; text stays readable (UTF-8)."""
    return json.dumps(row, ensure_ascii=False)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All rows at once: a JSON list for .json, else one row a line; .gz is packed. Replaces the file."""
    if path.name.removesuffix(".gz").endswith(".json"):
        text = json.dumps(list(rows), ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(row_line(row) + "\n" for row in rows)
    # Answers may hold half of a surrogate pair, which strict UTF-8 cannot write.
    content = text.encode("utf-8", "backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def need(rows: Iterable[Row], names: Iterable[str], what: str) -> None:
    """Nothing, where every row has all these fields; else an InputError that says what lacks which."""
    for number, row in enumerate(rows, 1):
        for name in names:
            field(row, name, f"{what} {number}")


def field(row: Row, name: str, what: str) -> Any:
    """`row[name]`, or an InputError that says what lacks it."""
    try:
        return row[name]
    except KeyError:
        keys = ", ".join(sorted(map(str, row)))
        raise InputError(f"{what} has no '{name}' (it has {keys or 'nothing'})") from None
