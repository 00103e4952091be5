"""The run folder survives a kill at any moment."""

import json
from pathlib import Path

import pytest

from slimepo.errors import InputError
from slimepo.pipeline.folder import (
    json_lines,
    last_checkpoint,
    read_json,
    remove_unfinished_checkpoints,
    replace_folder,
    versions,
    write_json,
)
from slimepo.training.callbacks import MetricsFile


def checkpoint(folder: Path, step: int, state: str | None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_last_checkpoint_is_the_last_complete_one_and_only_the_run_removes_the_others(
    tmp_path: Path,
) -> None:
    checkpoint(tmp_path, 5, json.dumps({"global_step": 5}))
    good = checkpoint(tmp_path, 10, json.dumps({"global_step": 10}))
    no_state, half = checkpoint(tmp_path, 15, None), checkpoint(tmp_path, 20, '{"global_st')
    assert last_checkpoint(tmp_path) == good
    assert no_state.exists(), "looking changes nothing: an export may look while a run is writing"
    remove_unfinished_checkpoints(tmp_path)
    assert good.exists()
    assert not no_state.exists()
    assert not half.exists()
    assert last_checkpoint(tmp_path / "absent") is None


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


def test_metrics_past_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    class State:
        is_world_process_zero = True
        global_step = 2

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path).on_train_begin(None, State(), None)  # type: ignore[arg-type]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_versions_name_the_libraries() -> None:
    assert {"python", "torch", "transformers", "slimepo"} <= versions().keys()
