"""Rows of one data file, each with its place: JSONL, JSON, Parquet, CSV and TSV, plain or gzip."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from slimepo.data.columns import listed, renamed
from slimepo.data.formats import recognise
from slimepo.data.messages import MalformedRow
from slimepo.data.winners import Tie
from slimepo.errors import InputError
from slimepo.files import parse_json
from slimepo.words import first_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_MORE = "\0more"  # Where the CSV reader puts cells beyond the header.


@dataclass(frozen=True)
class BadRow:
    """A row whose text does not even parse."""

    reason: str


PlacedRow = tuple[str, Mapping[str, Any] | BadRow]


def data_suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def file_rows(path: Path) -> Iterator[PlacedRow]:
    suffix = data_suffix(path)
    if suffix is None:
        raise InputError(
            f"{path} is of a kind that cannot be read; known are {', '.join(SUFFIXES)}, each also with .gz: save a "
            "table as .csv, and JSON objects, one a line, as .jsonl"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    return readers.get(suffix, _csv_rows)(path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where it is a .gz; a damaged one is an InputError."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() != ".gz":
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast("IO[bytes]", unpacked)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path} is a damaged or incomplete gzip file ({error}); fetch or write it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _parsed(line: bytes) -> Mapping[str, Any] | BadRow:
    try:
        row = parse_json(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 text (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except ValueError as error:
        return BadRow(str(error))
    return _object(row)


def _object(row: Any) -> Mapping[str, Any] | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow(f"a row must be a JSON object with named columns, not a {type(row).__name__}")


def _jsonl_rows(path: Path) -> Iterator[PlacedRow]:
    """One object a line; blank lines are no rows, but count as lines."""
    started = False
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            if not started and (line.strip() in (b"[", b"{") or re.match(rb"\s*\[\s*\{", line)):
                raise InputError(
                    f"{path}:{number} begins one JSON {'list' if b'[' in line else 'object'} over the whole file, "
                    "where this kind of file has a row a line; name it .json"
                )
            started = True
            yield f"{path}:{number}", _parsed(line)


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    with _opened(path) as stream:
        content = stream.read()
    try:
        data = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # One object a line under the name .json, which is common.
            yield from _jsonl_rows(path)
            return
        raise InputError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    elif isinstance(data, dict):
        if len(data) > 1 and all(map(_is_column, data.values())):
            raise InputError(
                f"{path} is a table by columns ({listed(data)}); write a list with one object a row"
            )
        # A lone object may be a row by itself: a one-line JSONL file called .json.
        with suppress(InputError, MalformedRow):
            with suppress(Tie):
                recognise(renamed(data, {}))
            data = [data]
    if not isinstance(data, list):
        keys = f" with the keys {listed(data)}" if isinstance(data, dict) else ""
        rows = (
            [key for key, value in data.items() if isinstance(value, list)] if isinstance(data, dict) else []
        )
        keys += f" (the rows are under {rows[0]!r}: write that list alone)" if len(rows) == 1 else ""
        what = "object" if isinstance(data, dict) else type(data).__name__
        raise InputError(f'{path} must hold a list of rows or {{"data": [rows]}}; it holds one {what}{keys}')
    for index, row in enumerate(data, 1):
        yield f"{path}:row {index}", _object(row)


def _is_column(value: Any) -> bool:
    """Whether a value holds a cell a row: a list of anything but messages, or pandas' {"0": ..., "1": ...}."""
    if isinstance(value, dict):
        return bool(value) and all(key.isdigit() for key in value)
    return isinstance(value, list) and len(value) > 1 and not any(isinstance(item, dict) for item in value)


def _parquet_rows(path: Path) -> Iterator[PlacedRow]:
    import pyarrow.parquet as pq

    with _opened(path) as stream:
        source: Any = io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else path
        try:
            number = 0
            for batch in pq.ParquetFile(source).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
        except Exception as error:
            # Of whatever kind: a text that is none, a number out of range, a page that is damaged.
            raise InputError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def _csv_rows(path: Path) -> Iterator[PlacedRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            header = text.readline()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (in the header); save it as UTF-8") from error
        lines, mark = itertools.chain([header], text), _separator(header, data_suffix(path))
        reader = csv.DictReader(lines, restkey=_MORE, restval=None, strict=True, delimiter=mark)
        for number in itertools.count(1):
            try:
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} is not UTF-8 text (after row {number - 1}); save it as UTF-8"
                ) from error
            except csv.Error as error:
                yield f"{path}:row {number}", BadRow(f"not valid CSV: {error}")
                continue
            yield f"{path}:row {number}", _csv_row(row)


def _separator(header: str, suffix: str | None) -> str:
    """What separates the cells of a table: a comma, or what its header has where no comma is."""
    if "\t" in header and (suffix == ".tsv" or "," not in header):
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _csv_row(row: dict[str, Any]) -> Mapping[str, Any] | BadRow:
    if _MORE in row:
        looks = next((repr(mark) for mark in ("\t", ";") if any(mark in name for name in row)), "")
        hint = f" (looks separated by {looks}: save it with commas)" if looks else ""
        return BadRow(f"{len(row[_MORE])} more cells than the header has names{hint}")
    if any(cell is None for cell in row.values()):
        return BadRow("fewer cells than the header has names")
    return {key: _listed(value) if key in ("output", "history") else value for key, value in row.items()}


def _listed(text: str) -> Any:
    """The list in a cell of a column that is one; text that is no JSON stays text."""
    try:
        return parse_json(text) if text.lstrip().startswith("[") else text
    except ValueError:
        return text
