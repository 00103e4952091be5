"""Append-only JSONL: what was written stays, what was half-written goes."""

from pathlib import Path

import pytest

from slimepo.errors import InputError
from slimepo.evaluation.journal import append, read_journal


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    append(path, [{"a": 1}, {"b": "zwei\nlines €"}])
    append(path, [{"c": None}])
    assert read_journal(path) == [{"a": 1}, {"b": "zwei\nlines €"}, {"c": None}]
    assert read_journal(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("half", ['{"b": "cut he', '{"b"', "{", '"text"', '{"b": "caf\\u00'])
def test_a_half_written_last_line_is_left_out_and_then_removed(tmp_path: Path, half: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + half)
    assert read_journal(path) == [{"a": 1}]
    append(path, [{"c": 3}])
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_a_character_cut_in_two_counts_as_half_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}\n{"b": "€'.encode()[:-1])
    assert read_journal(path) == [{"a": 1}]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}')
    append(path, [{"c": 3}])
    assert read_journal(path) == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: no JSON object"):
        read_journal(path)


def test_half_a_surrogate_pair_can_be_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, [{"text": "bad \ud83d end"}])
    assert read_journal(path) == [{"text": "bad \ud83d end"}]
    path.read_text(encoding="utf-8")  # The file itself is plain UTF-8.
