"""The run folder survives a kill at any moment."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.files import read_json
from slimepo.pipeline.folder import (
    MARKER,
    SETTINGS,
    check_folder,
    held,
    is_held,
    made_from,
    mark_folder,
    record_end,
    record_settings,
    refuse_other_folder,
)
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.terminal import make_console
from slimepo.training.callbacks import MetricsFile


def test_metrics_past_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    class State:
        is_world_process_zero = True
        global_step = 2

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path).on_train_begin(None, State(), None)  # type: ignore[arg-type]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def recipe(change: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": "m",
        "data": {"path": "pairs.jsonl"},
        "stages": [{"loss": "sft"}, {"loss": "dpo", **stage}],
    }
    return make_recipe(values | (change or {}))


JUDGE = {"benchmark": "mt-bench", "judge": "gpt-4"}
THIRD = [{"loss": "sft"}, {"loss": "dpo"}, {"loss": "slime", "start": "sft"}]


@pytest.mark.parametrize(
    "other",
    [
        recipe({"evaluate": [JUDGE]}),
        recipe({"stages": THIRD}),
        recipe(learning_rate=1e-3),
        recipe({"seeds": [0]}),
        make_recipe(recipe().model_dump()),
        make_recipe({"model": "m", "data": {"path": "pairs.jsonl"}, "stages": [
            {"loss": "sft", "save_every": 0.5, "monitor": False, "micro_batch_size": 1, "args": {"logging_steps": 1}},
            {"loss": "dpo"},
        ]}),
    ],
)  # fmt: skip
def test_what_does_not_change_a_finished_stage_does_not_invalidate_it(tmp_path: Path, other: Recipe) -> None:
    done(recipe(), tmp_path, "sft")
    check_folder(other, tmp_path, restart=False)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (recipe(learning_rate=1e-3), "dpo: stage.learning_rate was 5e-07, is now 0.001"),
        (recipe(loss_options={"beta": 0.2}), "dpo: stage.loss_options.beta was 0.1, is now 0.2"),
        (recipe({"model": "n"}), "sft: model was 'm', is now 'n'"),
        (recipe({"data": {"path": "pairs.jsonl", "max_length": 9}}), "data.max_length was 2048, is now 9"),
        (recipe(monitor={"stop_on": ["unlearning"]}), "dpo: stage.monitor"),
        (recipe({"stages": [{"loss": "sft"}, {"loss": "slime"}, {"loss": "dpo"}]}), "dpo: stage.start"),
    ],
)
def test_what_changes_one_is_refused_by_its_name(tmp_path: Path, other: Recipe, words: str) -> None:
    for name in ("sft", "dpo"):
        done(recipe(), tmp_path, name)
    with pytest.raises(InputError) as caught:
        check_folder(other, tmp_path, restart=False)
    assert words in str(caught.value)
    assert "delete" in str(caught.value)


def test_the_defaults_of_an_objective_are_what_they_are_written_out(tmp_path: Path) -> None:
    assert made_from(recipe(), "dpo") == made_from(recipe(loss_options={"beta": 0.1}), "dpo")


def test_samples_of_the_recipes_own_model_do_not_depend_on_what_trains(tmp_path: Path) -> None:
    pairs = {"pairs": {"own": {}}, "tasks": {"train": "t.jsonl", "checker": "c.py:right"}}
    stages = {"stages": [{"loss": "dpo", "part": "own"}]}
    whole, adapter = (
        recipe(pairs | stages),
        recipe({**pairs, **stages, "adapter": {"r": 4}, "dtype": "bfloat16"}),
    )
    assert made_from(whole, "own") == made_from(adapter, "own")
    assert made_from(whole, "dpo") != made_from(adapter, "dpo")
    # Earlier versions wrote down how the model trains beside them.
    for name in ("own", "dpo"):
        done(whole, tmp_path, name)
        made = json.loads((tmp_path / name / SETTINGS).read_text())
        (made if name == "own" else made["stage"]["pairs"]).update(adapter=None, dtype="auto", quantize=None)
        (tmp_path / name / SETTINGS).write_text(json.dumps(made))
    (tmp_path / "own" / "pairs.json").write_text("{}")
    check_folder(whole, tmp_path, restart=False)


def test_a_run_without_its_recipe_says_so_and_one_that_has_nothing_yet_goes_on(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text("")
    check_folder(recipe(), tmp_path, restart=False)
    done(recipe(), tmp_path, "sft")
    (tmp_path / "sft" / SETTINGS).unlink()
    with pytest.raises(InputError, match="what 'sft' was made from cannot be told"):
        check_folder(recipe(), tmp_path, restart=False)


def done(recipe: Recipe, out: Path, name: str) -> None:
    (out / MARKER).write_text("")
    record_settings(recipe, out, name)
    (out / name / "stage.json").write_text("{}")


HOLD = """
import sys, time
from pathlib import Path
from slimepo.pipeline.folder import held
from slimepo.terminal import make_console
with held(Path(sys.argv[1]), make_console()):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_has_one_process_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert is_held(out)
    with (
        pytest.raises(InputError, match="another process is at work in this run folder"),
        held(out, make_console()),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not is_held(out)
    with held(out, make_console()):
        assert out.is_dir()
    assert not out.exists(), "nothing was put there"


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_is_no_run_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file is a file; give a folder"),
        held(tmp_path / place, make_console()),
    ):
        pass
    assert (tmp_path / "file").read_text() == ""


def test_what_a_kill_leaves_before_the_marker_is_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / f"{MARKER}.part").write_text("half")
    refuse_other_folder(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty and no run of slimepo"):
        refuse_other_folder(tmp_path)


def test_a_stage_that_the_monitor_ended_makes_the_run_stopped(tmp_path: Path) -> None:
    """It was asked to: the exit code is that of a run that is done."""
    mark_folder(tmp_path)
    why = {"step": 4, "warning": "unlearning", "message": "chosen answers are less likely"}
    stages = [{"name": "sft", "monitor": {"stopped": None}}, {"name": "slime", "monitor": {"stopped": why}}]
    record_end(tmp_path, None, [*stages, {"name": "dpo", "monitor": None}])
    assert read_json(tmp_path / "status.json") == {"status": "stopped", "code": 0, "stopped": {"slime": why}}
    record_end(tmp_path, None, stages[:1])
    assert read_json(tmp_path / "status.json") == {"status": "done", "code": 0}
    record_end(tmp_path, InputError("no"), stages)
    found = read_json(tmp_path / "status.json")
    assert found is not None
    assert (found["status"], found["code"]) == ("failed", 2)
