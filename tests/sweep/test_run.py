"""Sweeps that run: what is shared is made once, what is done is not run again, what fails hides no other."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from slimepo.pipeline.folder import record_settings
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.settings import read_mapping
from slimepo.sweep.cells import Cell, by_shared, cell_recipe
from slimepo.sweep.processes import Process, run_processes
from slimepo.sweep.run import run_cells
from slimepo.sweep.search import searched
from slimepo.sweep.settings import load_sweep
from slimepo.terminal import make_console
from tests.command import slimepo

SWEEP = """
recipe: recipe.yaml
arms: {slime: {}, dpo: {loss: dpo, loss_options.beta: 0.5}}
search: {by: margin, seeds: [9], grid: {learning_rate: [1e-4, 1e-3]}}
seeds: [0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep, its recipe of two stages, and pairs."""
    folder = tmp_path_factory.mktemp("sweep")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"prompt": f"Add {i} and 1.", "chosen": str(i + 1), "rejected": str(i)} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
model: {{init: random, architecture: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
        num_attention_heads: 1, num_key_value_heads: 1, tie_word_embeddings: true}}
tokenizer: {folder / "tokenizer"}
data: {{path: {folder / "pairs.jsonl"}, parts: {{sft: 0.4, preference: 0.4, heldout: 0.2}}}}
stages:
  - {{loss: sft, learning_rate: 1e-2, epochs: 1, batch_size: 8, monitor: false}}
  - {{loss: slime, learning_rate: 1e-3, batch_size: 8, monitor: false}}
"""
    )
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; each in this process, where it starts at once."""
    ran: list[list[str]] = []
    one_at_a_time = threading.Lock()

    def run(words: list[str], stdout: Any, **_: Any) -> SimpleNamespace:
        with one_at_a_time:
            ran.append(words[3:])
            done = slimepo(*words[3:])
            stdout.write(done.stdout + done.stderr)
            stdout.flush()
            return SimpleNamespace(returncode=done.returncode)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    return folder / "out"


def sweep(folder: Path, *overrides: str) -> Any:
    return slimepo("sweep", folder / "sweep.yaml", *overrides, "--out", folder / "out", "--jobs", "2")


def test_a_sweep_searches_runs_every_arm_and_seed_and_compares(
    folder: Path, out: Path, commands: list[Any]
) -> None:
    done = sweep(folder)
    assert done.returncode == 0, done.stderr
    # SFT once a seed, two points for each of two arms, and every arm with every seed.
    assert [command[0] for command in commands] == ["run"] * (2 + 4 + 2)
    searched = json.loads((out / "search.json").read_text())
    with (out / "search-runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    tried = [point for points in searched["arms"].values() for point in points]
    # A table has six digits.
    figures = [point[searched["by"]] for point in tried]
    assert [float(row[searched["by"]]) for row in rows] == pytest.approx(figures, rel=1e-5)
    for arm, tried in searched["arms"].items():
        best = max(tried, key=lambda each: each["margin"])["point"]["learning_rate"]
        stage = json.loads((out / arm / "seed-0" / arm / "settings.json").read_text())["stage"]
        assert stage["learning_rate"] == best
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert [(row["arm"], row["seed"]) for row in rows] == [("slime", "0"), ("dpo", "0")]
    # The same start, which was made once: its figures before are equal.
    befores = [
        json.loads((out / arm / "seed-0" / arm / "stage.json").read_text())["heldout"]["before"]
        for arm in ("slime", "dpo")
    ]
    assert befores[0] == befores[1]
    assert "at its end" not in (out / "sweep.md").read_text(), "two points have no inside"
    # Weights are kept of the seeds' runs, and of what all start from.
    assert (out / "slime" / "seed-0" / "slime" / "model").is_dir()
    assert len([*(out / "shared").glob("*/sft/model")]) == 2
    assert [*out.rglob("checkpoint-*")] == [], "nothing goes on from a run that is done"
    for arm in ("slime", "dpo"):
        tries = [*(out / "search").glob(f"*/seed-9/{arm}")]
        assert [(at / "stage.json").exists() for at in tries] == [True, True]
        assert [at for at in tries if (at / "model").exists()] == []


def test_a_figure_that_is_none_costs_a_search_no_weights(
    folder: Path, tmp_path: Path, commands: list[Any]
) -> None:
    one = ["sweep", folder / "sweep.yaml", "arms={slime: {}}", "search.grid={learning_rate: [1e-3]}"]
    done = slimepo(*one, "search.by=margn", "--out", tmp_path / "out")
    assert "nothing is called 'margn'" in done.stderr
    (model,) = (tmp_path / "out" / "search").glob("*/seed-9/slime/model")
    assert slimepo(*one, "--out", tmp_path / "out").returncode == 0
    assert not model.exists()


def test_a_run_of_the_search_whose_weights_are_gone_is_made_again_where_more_is_asked(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(out, tmp_path / "out", symlinks=True)
    (at,) = (tmp_path / "out" / "search" / "slime-1e-3").glob("seed-9")
    base = {**read_mapping(folder / "recipe.yaml", "recipe"), "evaluate": [{"benchmark": "ifeval"}]}
    cell = Cell("slime", {}, cell_recipe(base, None, "slime", {}, 9), at)
    asked: list[Process] = []
    monkeypatch.setattr("slimepo.sweep.run.run_processes", lambda given, *_: asked.extend(given) or {})
    run_cells([cell], out=tmp_path / "out", jobs=1, prepare=lambda seed: None, console=make_console())
    assert [process.folder for process in asked] == [at]
    assert not (at / "slime" / "stage.json").exists()


def test_what_is_done_is_not_run_again(folder: Path, out: Path, commands: list[Any]) -> None:
    (out / "dpo" / "seed-0" / "dpo" / "stage.json").unlink()
    assert sweep(folder).returncode == 0
    assert [command[1] for command in commands] == [str(out / "dpo" / "seed-0" / "recipe.yaml")], (
        "no process is started to hear that the start is done"
    )
    commands.clear()
    assert sweep(folder).returncode == 0
    assert commands == []


def test_a_cell_is_an_ordinary_run(folder: Path, out: Path) -> None:
    cell = out / "slime" / "seed-0"
    whole = slimepo("run", cell / "recipe.yaml", "--out", folder / "alone")
    assert whole.returncode == 0, whole.stderr
    figures = [
        json.loads((run / "slime" / "stage.json").read_text())["heldout"] for run in (cell, folder / "alone")
    ]
    assert figures[0] == figures[1]
    assert slimepo("report", cell, "--out", folder / "page.html").returncode == 0


def test_another_sweep_does_not_go_on_in_its_folder(folder: Path, commands: list[Any]) -> None:
    done = sweep(folder, "arms.dpo={loss: dpo, loss_options.beta: 0.25}")
    assert done.returncode == 2
    assert "loss_options.beta was 0.5, is now 0.25" in done.stderr


def test_an_arm_that_fails_hides_no_other(folder: Path, commands: list[Any]) -> None:
    arms = "arms={slime: {}, broken: {learning_rate: 1e16}}"
    done = slimepo("sweep", folder / "sweep.yaml", "search=null", arms, "--out", folder / "broken")
    assert done.returncode == 4, "the code that the run ended with"
    assert "1 of 2 runs failed; broken seed 0" in done.stderr
    assert "not finite" in done.stderr
    rows = {row["arm"]: row for row in csv.DictReader((folder / "broken" / "runs.csv").open())}
    assert rows["slime"]["accuracy"] != ""
    assert rows["broken"]["accuracy"] == ""


def test_a_key_that_is_none_is_found_before_anything_runs(folder: Path, commands: list[Any]) -> None:
    done = slimepo("sweep", folder / "sweep.yaml", "arms.dpo.bta=1", "--out", folder / "never")
    assert (done.returncode, commands) == (2, [])
    assert "'bta' is no key of a stage or of a recipe" in done.stderr
    assert not (folder / "never").exists()


def test_an_objective_of_the_user_s_own_may_lie_beside_the_recipe(folder: Path, commands: list[Any]) -> None:
    (folder / "beside_the_sweep.py").write_text("from slimepo.losses import slime as mine\n")
    arms = "arms={own: {loss: beside_the_sweep.py:mine}, wrong: {bta: 1}}"
    done = slimepo("sweep", folder / "sweep.yaml", arms, "--out", folder / "never")
    assert "'bta' is no key" in done.stderr, "the file was found: it is the next arm that is wrong"


def test_an_objective_of_the_user_s_own_may_lie_beside_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_this_sweep.py").write_text("from slimepo.losses import slime as mine\n")
    arms = {"own": {"loss": "beside_this_sweep.py:mine"}, "wrong": {"bta": 1}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"recipe": "world", "arms": arms, "seeds": [0]}))
    done = slimepo("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "never")
    assert "'bta' is no key" in done.stderr, "the file was found: it is the next arm that is wrong"


def test_a_figure_to_search_by_that_is_none_is_named(folder: Path, commands: list[Any]) -> None:
    done = sweep(folder, "search.by=margn")
    assert (done.returncode, commands) == (2, [])
    assert "search.by: nothing is called 'margn' (did you mean 'margin'?)" in done.stderr


def test_measures_that_are_none_are_named_before_the_seeds_are_run(
    folder: Path, tmp_path: Path, commands: list[Any]
) -> None:
    done = sweep(folder, "measures=[ifeval/prompt_strict]")
    assert (done.returncode, commands) == (2, [])
    assert (
        "ifeval/prompt_strict is a figure of ifeval, which evaluate of the recipe does not name"
        in done.stderr
    )
    one = ["arms={slime: {}}", "search.grid={learning_rate: [1e-3]}", "measures=[margn]"]
    done = slimepo("sweep", folder / "sweep.yaml", *one, "--out", tmp_path / "out")
    assert "measures: nothing is called 'margn' (did you mean 'margin'?)" in done.stderr
    assert not [*(tmp_path / "out" / "slime").glob("seed-*")], "the search has told what there is"


def test_a_disk_without_room_for_the_models_of_all_runs_is_told_before_the_first(
    folder: Path, tmp_path: Path, commands: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = slimepo("sweep", folder / "sweep.yaml", "--out", tmp_path / "out")
    assert (done.returncode, commands) == (5, [])
    assert "GiB at the least" in done.stderr


def test_a_sweep_in_the_world_starts_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model's size is that of a tokenizer which is not there before the world is."""
    asked: list[Process] = []
    monkeypatch.setattr("slimepo.sweep.run.run_processes", lambda given, *_: asked.extend(given) or {})
    monkeypatch.setattr("slimepo.sweep.run.write_tables", lambda *_: None)
    world = {"demonstrations": 20, "preference_prompts": 20, "heldout_prompts": 20}
    keys = {"recipe": "world", "overrides": {"world": world}, "arms": {"slime": {}, "dpo": {"loss": "dpo"}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(keys | {"seeds": [3]}))
    done = slimepo("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(asked) > 0
    assert (tmp_path / "out" / "world" / "seed-3" / "world" / "tokenizer").is_dir()


def test_a_smoke_test_asks_for_no_real_model_and_no_benchmark(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimepo.pipeline.run.load_config", lambda _: pytest.fail("it is looked for"))
    asked: list[Process] = []
    monkeypatch.setattr("slimepo.sweep.run.run_processes", lambda given, *_: asked.extend(given) or {})
    shown: list[Any] = []
    monkeypatch.setattr("slimepo.sweep.run.write_tables", lambda _, sweep, *__: shown.extend(sweep.measures))
    given = ["overrides.model=owner/nowhere", "search=null", "measures=[margin, ifeval/prompt_strict]"]
    benchmark = "overrides.evaluate=[{benchmark: ifeval}]"
    done = slimepo("sweep", folder / "sweep.yaml", *given, benchmark, "--smoke", "--out", tmp_path / "out")
    assert (done.returncode, len(asked) > 0) == (0, True), done.stderr
    assert shown == ["margin"]


def test_two_sweeps_at_once_are_not_run_in_one_folder(folder: Path, out: Path, commands: list[Any]) -> None:
    with FileLock(out / ".lock"):
        done = sweep(folder)
    assert (done.returncode, commands) == (2, [])
    assert "another process is at work" in done.stderr


def test_what_cannot_be_shared_fails_those_that_start_from_it_alone(
    folder: Path, commands: list[Any]
) -> None:
    arms = "arms={slime: {}, high: {stages.sft.learning_rate: 1e16}}"
    done = slimepo(
        "sweep", folder / "sweep.yaml", "search=null", "seeds=[0]", arms, "--out", folder / "start"
    )
    assert "1 of 2 runs failed; high seed 0" in done.stderr
    assert "which it starts from, failed" in done.stderr
    rows = {row["arm"]: row for row in csv.DictReader((folder / "start" / "runs.csv").open())}
    assert rows["slime"]["accuracy"] != ""


def test_what_is_shared_and_done_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {
        "model": "some/model",
        "data": {"path": "pairs.jsonl"},
        "tasks": {"train": "tasks.jsonl", "checker": "check.py:right"},
        "pairs": {"samples": {"model": "sft"}},
        "stages": [{"loss": "sft"}, {"loss": "slime", "part": "samples"}],
    }
    cell = Cell("arm", {}, cell_recipe(base, None, "arm", {}, 0), tmp_path / "arm" / "seed-0")
    (shared,) = by_shared([cell], tmp_path / "shared")
    started: list[Process] = []
    monkeypatch.setattr("slimepo.sweep.run.run_processes", lambda found, *_: started.extend(found) or {})

    def commands_for_shared() -> list[str]:
        started.clear()
        prepared: list[int] = []
        console = make_console(quiet=True)
        assert run_cells([cell], out=tmp_path, jobs=1, prepare=prepared.append, console=console) == {}
        assert (started[-1].name, prepared) == ("arm seed 0", [0])
        return [words[0] for process in started[:-1] for words in process.commands]

    assert commands_for_shared() == ["run", "pairs"]
    record_settings(cell.recipe, shared, "sft")
    (shared / "sft" / "stage.json").write_text("{}")
    assert commands_for_shared() == ["pairs"]
    record_settings(cell.recipe, shared, "samples")
    (shared / "samples" / "pairs.json").write_text("{}")
    assert commands_for_shared() == []


def test_optuna_asks_for_the_same_points_again(folder: Path, commands: list[Any]) -> None:
    pytest.importorskip("optuna")
    search = "search={by: margin, seeds: [9], range: {learning_rate: [1e-5, 1e-3]}, trials: 2}"
    asked = [
        search,
        "arms={slime: {}}",
        "seeds=[0]",
        f"recipe={folder / 'recipe.yaml'}",
        "--out",
        str(folder / "optuna"),
    ]
    assert slimepo("sweep", folder / "sweep.yaml", *asked).returncode == 0
    first = (folder / "optuna" / "search.json").read_text()
    assert len({each["point"]["learning_rate"] for each in json.loads(first)["arms"]["slime"]}) == 2
    commands.clear()
    assert slimepo("sweep", folder / "sweep.yaml", *asked).returncode == 0
    assert (commands, (folder / "optuna" / "search.json").read_text()) == ([], first)


def test_processes_find_modules_where_this_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def run(words: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        told.extend(env["PYTHONPATH"].split(os.pathsep))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.syspath_prepend(tmp_path / "beside")
    run_processes([Process("a", tmp_path, [["--version"]])], 1, make_console(quiet=True))
    assert str(tmp_path / "beside") in told


def test_processes_run_side_by_side_and_one_waits_for_a_folder_that_is_held(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    lock = FileLock(tmp_path / "a" / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.5, lock.release).start()
    processes = [Process(name, tmp_path / name, [["--version"]]) for name in ("a", "b")]
    assert run_processes(processes, 2, make_console(quiet=True)) == {}
    assert all((tmp_path / name / "log.txt").read_text().startswith("slimepo ") for name in ("a", "b"))
    failed = run_processes([Process("c", tmp_path / "a", [["nothing"]])], 1, make_console(quiet=True))
    assert "No such command" in failed["c"].words, sys.executable
    assert failed["c"].code == 2


@pytest.mark.parametrize(("number", "memory"), [(9, True), (15, False)])
def test_a_run_that_the_system_kills_says_what_may_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, memory: bool
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-number))
    failed = run_processes([Process("a", tmp_path, [["--version"]])], 1, make_console(quiet=True))["a"]
    assert failed.code == 5
    assert f"killed by signal {number}" in failed.words
    assert ("memory may have run out: give fewer --jobs" in failed.words) == memory


def test_a_start_is_made_right_before_the_runs_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        ran.append(words[-1])
        return SimpleNamespace(returncode=3 if words[-1] == "start 1" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    starts = [Process(f"start {seed}", tmp_path, [[f"start {seed}"]]) for seed in (0, 1)]
    runs = [
        Process(f"{arm} {seed}", tmp_path, [[f"{arm} {seed}"]], starts[seed])
        for seed in (0, 1)
        for arm in "ab"
    ]
    processes = [starts[0], *runs[:2], starts[1], *runs[2:]]
    ended: list[str] = []
    failed = run_processes(processes, 1, make_console(quiet=True), ended.append)
    assert ran == ["start 0", "a 0", "b 0", "start 1"]
    assert ended == ["start 0", "a 0", "b 0"]
    assert failed.keys() == {"start 1", "a 1", "b 1"}
    assert "which it starts from, failed" in failed["a 1"].words
    assert failed["a 1"].code == 3


def test_a_free_place_takes_the_first_run_whose_start_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    second_ran = threading.Event()

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        if words[-1] == "start 0":
            assert second_ran.wait(10)
        ran.append(words[-1])
        if words[-1] == "start 1":
            second_ran.set()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    first, second = (Process(f"start {seed}", tmp_path / str(seed), [[f"start {seed}"]]) for seed in (0, 1))
    for process in (first, second):
        process.folder.mkdir()
    needy = Process("a 0", tmp_path, [["a 0"]], first)
    assert run_processes([first, needy, second], 2, make_console(quiet=True)) == {}
    assert ran == ["start 1", "start 0", "a 0"]


@pytest.mark.parametrize(("by", "scored"), [("margin", []), ("ifeval/prompt_strict", ["ifeval"])])
def test_a_search_runs_the_benchmark_that_it_goes_by_and_no_other(
    folder: Path, tmp_path: Path, by: str, scored: list[str]
) -> None:
    given = load_sweep(folder / "sweep.yaml", [f"search.by={by}"])
    base = read_mapping(folder / "recipe.yaml", "recipe")
    base["evaluate"] = [{"benchmark": "mt-bench"}, {"benchmark": "ifeval"}]
    asked: list[Cell] = []

    def run(cells: Any, **_: Any) -> dict[str, Any]:
        asked.extend(cells)
        return {}

    assert given.search is not None
    searched(given, given.search, base, run, tmp_path, make_console())
    assert len(asked) == 4
    for cell in asked:
        assert [entry.benchmark for entry in cell.recipe.evaluate] == scored
