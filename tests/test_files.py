"""Plain files survive a kill at any moment."""

import json
import pickle
from pathlib import Path

import pytest

from slimepo import files
from slimepo.errors import InputError
from slimepo.files import Kept, append_json_lines, json_lines, read_json, replace_folder, write_json
from slimepo.versions import versions


def test_json_is_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"ä": 1})
    assert read_json(path) == {"ä": 1}
    assert read_json(tmp_path / "none.json") is None
    path.write_text("{")
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        read_json(path)


def test_a_line_ends_at_its_newline_and_a_cut_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answer = "one\u2028two\x85three"
    whole = json.dumps({"text": answer}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(whole + '{"text": "ü'.encode()[:-1])
    assert json_lines(path) == [{"text": answer}]
    assert json_lines(tmp_path / "none.jsonl") == []


def test_a_finished_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    old, new = tmp_path / "model", tmp_path / "model.part"
    for folder in (old, new):
        folder.mkdir()
        (folder / folder.name).write_text("x")
    replace_folder(new, old)
    assert [p.name for p in old.iterdir()] == ["model.part"]
    assert not new.exists()


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    append_json_lines(path, [{"a": 1}, {"b": "zwei\nlines €"}])
    append_json_lines(path, [{"c": None}])
    assert json_lines(path, strict=True) == [{"a": 1}, {"b": "zwei\nlines €"}, {"c": None}]
    assert json_lines(tmp_path / "absent.jsonl", strict=True) == []


@pytest.mark.parametrize("half", ['{"b": "cut he', '{"b"', "{", '"text"', '{"b": "caf\\u00'])
def test_a_half_written_last_line_is_left_out_and_then_removed(tmp_path: Path, half: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + half)
    assert json_lines(path, strict=True) == [{"a": 1}]
    append_json_lines(path, [{"c": 3}])
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_a_character_cut_in_two_counts_as_half_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}\n{"b": "€'.encode()[:-1])
    assert json_lines(path, strict=True) == [{"a": 1}]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}')
    append_json_lines(path, [{"c": 3}])
    assert json_lines(path, strict=True) == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: no JSON object"):
        json_lines(path, strict=True)


def test_half_a_surrogate_pair_can_be_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_lines(path, [{"text": "bad \ud83d end"}])
    assert json_lines(path, strict=True) == [{"text": "bad \ud83d end"}]
    path.read_text(encoding="utf-8")  # The file itself is plain UTF-8.


def test_versions_name_the_libraries() -> None:
    assert {"python", "torch", "transformers", "slimepo"} <= versions().keys()


class TestKept:
    @pytest.fixture(autouse=True)
    def little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "IN_MEMORY", 3)

    def test_it_is_a_list(self) -> None:
        values, kept = [{"a": n} for n in range(10)], Kept({"a": n} for n in range(10))
        assert kept == values
        assert len(kept) == 10
        assert (kept[2], kept[3], kept[-1], kept[-8]) == (values[2], values[3], values[-1], values[-8])
        assert kept[1:8:2] == values[1:8:2]
        assert kept[2:9][1:3] == values[2:9][1:3]
        with pytest.raises(IndexError):
            _ = kept[10]

    def test_what_is_set_is_read(self) -> None:
        kept = Kept(range(6))
        kept[1], kept[5] = 10, "longer than before"
        assert [*kept] == [0, 10, 2, 3, 4, "longer than before"]

    def test_it_goes_whole_to_another_process(self) -> None:
        assert pickle.loads(pickle.dumps(Kept(range(6)))) == [*range(6)]
