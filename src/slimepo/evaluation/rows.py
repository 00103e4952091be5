"""Rows of the benchmarks' own files: JSONL and JSON, plain or gzip, read and written as upstream does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimepo.data.files import BadRow, file_rows
from slimepo.errors import InputError
from slimepo.files import write_json, write_json_lines

JsonObject = Mapping[str, Any]


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


def write_rows(path: Path, rows: Iterable[JsonObject]) -> None:
    """All rows at once, the old file or the new one at any time: a JSON list for .json, else one row a line."""
    if path.suffix == ".json":
        write_json(path, list(rows))
    else:
        write_json_lines(path, rows)


def need(rows: Iterable[JsonObject], names: Iterable[str], what: str) -> None:
    """Nothing, where every row has all these fields; else an InputError that says what lacks which."""
    for number, row in enumerate(rows, 1):
        for name in names:
            field(row, name, f"{what} {number}")


def field(row: JsonObject, name: str, what: str) -> Any:
    """`row[name]`, or an InputError that says what lacks it."""
    try:
        return row[name]
    except KeyError:
        keys = ", ".join(sorted(map(str, row)))
        raise InputError(f"{what} has no '{name}' (it has {keys or 'nothing'})") from None
