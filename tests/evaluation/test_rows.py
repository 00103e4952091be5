"""Files of the benchmarks: written and read back, with errors that name the line."""

from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.evaluation.rows import field, read_rows, write_rows

ROWS: list[dict[str, Any]] = [
    {"a": "ünï\u2028code", "b": [1, {"c": None}]},
    {"a": "half a pair \ud800", "b": "line\nbreak"},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_come_back(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "new" / name, ROWS)
    assert read_rows(tmp_path / "new" / name) == ROWS


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not valid JSON"):
        read_rows(path)
    with pytest.raises(InputError, match="is not there"):
        read_rows(tmp_path / "none.jsonl")


def test_a_missing_field_is_named_with_those_that_are_there() -> None:
    with pytest.raises(InputError, match=r"the answer has no 'x' \(it has a, b\)"):
        field(ROWS[0], "x", "the answer")
