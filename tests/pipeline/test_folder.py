"""The run folder survives a kill at any moment."""

import json
from pathlib import Path

from slimepo.pipeline.folder import last_checkpoint, remove_unfinished_checkpoints
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


def test_metrics_past_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    class State:
        is_world_process_zero = True
        global_step = 2

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path).on_train_begin(None, State(), None)  # type: ignore[arg-type]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
