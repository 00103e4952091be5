"""Means with intervals, differences seed by seed, and what makes a comparison unfair."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.sweep.cells import Cell, cell_recipe
from slimepo.sweep.settings import Sweep
from slimepo.sweep.table import edges, figures_of, rows_of, unfair, write_tables
from slimepo.terminal import make_console
from tests.report.conftest import scores_row

BASE: dict[str, Any] = {
    "model": "some/model",
    "data": {"path": "pairs.jsonl"},
    "stages": [{"loss": "slime", "batch_size": 4, "learning_rate": 1e-5}],
}


def done(
    tmp_path: Path, arm: str, keys: dict[str, Any], seed: int, after: dict[str, float], steps: int = 10
) -> Cell:
    cell = Cell(arm, {}, cell_recipe(BASE, None, arm, keys, seed), tmp_path / arm / f"seed-{seed}")
    folder = cell.folder / arm
    folder.mkdir(parents=True)
    stage = {
        "steps": steps, "seconds": 1.0, "name": arm,
        "heldout": {"before": {"logps/chosen": -1.0}, "after": after, "chosen_fell": 0.25},
    }  # fmt: skip
    (folder / "stage.json").write_text(json.dumps(stage))
    (folder / "data.json").write_text(
        json.dumps({"kept": 10, "response_tokens": 200 if arm == "slime" else 100})
    )
    (folder / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 2.0}\n{"step": 10, "loss": 1.0, "monitor/x": 1}\n'
    )
    return cell


def all_figures(cells: list[Cell]) -> dict[tuple[str, int], dict[str, float]]:
    return {(cell.arm, cell.recipe.seed): figures_of(cell) for cell in cells}


def test_figures_are_of_what_is_held_out_of_benchmarks_and_of_the_end_of_training(tmp_path: Path) -> None:
    cell = done(tmp_path, "slime", {}, 0, {"logps/chosen": -0.5, "accuracy": 0.75})
    scores = cell.folder / "eval" / "ifeval" / "scores"
    scores.mkdir(parents=True)
    rows = [scores_row(model, value) for model, value in (("seed-0-slime", 17.5), ("seed-0-my-slime", 3.0))]
    (scores / "one.json").write_text(json.dumps({"scores": rows}))
    assert figures_of(cell) == {
        "logps/chosen": -0.5, "accuracy": 0.75, "chosen_change": 0.5, "chosen_fell": 0.25,
        "arena-hard-v0.1/win_rate": 17.5,
        "train/step": 10, "train/loss": 1.0, "steps": 10, "seconds": 1.0,
    }  # fmt: skip


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    cells = [
        done(tmp_path, arm, {}, seed, {"accuracy": value})
        for arm, values in {"slime": [0.5, 0.7], "other": [0.6, 0.8]}.items()
        for seed, value in enumerate(values)
    ]
    header, slime, other = rows_of(all_figures(cells), "slime", ["accuracy"], cells)
    assert header == ["arm", "at", "seeds", "accuracy", "Δ"]
    assert slime[2:] == ["2", "0.60 ± 1.27", "–"]
    # Both seeds gain the same: the spread between seeds is not that of the difference.
    assert other[4] == "+0.100 ± 0.000"


def test_a_seed_that_is_not_done_is_not_made_up(tmp_path: Path) -> None:
    one = done(tmp_path, "slime", {}, 0, {"accuracy": 0.5})
    missing = Cell("slime", {}, cell_recipe(BASE, None, "slime", {}, 1), tmp_path / "slime" / "seed-1")
    cells = [one, missing]
    assert rows_of(all_figures(cells), "slime", ["accuracy"], cells)[1][2:4] == ["1 of 2", "0.500"]


def test_a_figure_over_fewer_seeds_than_asked_says_so(tmp_path: Path) -> None:
    measured = {
        "slime": [{"accuracy": 0.5}, {"accuracy": 0.7}, {}],
        "other": [{"accuracy": 0.6}, {}, {"accuracy": 0.9}],
    }
    cells = [
        done(tmp_path, arm, {}, seed, after)
        for arm, found in measured.items()
        for seed, after in enumerate(found)
    ]
    _, slime, other = rows_of(all_figures(cells), "slime", ["accuracy"], cells)
    assert slime[2:4] == ["3", "0.60 ± 1.27 (2 of 3)"]
    assert other[3:] == ["0.75 ± 1.91 (2 of 3)", "+0.100 (1 of 3)"]


def test_what_is_not_alike_is_said(tmp_path: Path) -> None:
    cells = [
        done(tmp_path, "slime", {}, 0, {}),
        done(tmp_path, "dpo", {"loss": "dpo", "epochs": 2, "args.max_grad_norm": 1.0}, 0, {}, steps=20),
        done(tmp_path, "cpo", {"loss": "cpo"}, 0, {}),
    ]
    notes = "\n".join(unfair(cells, all_figures(cells)))
    assert "epochs differs (1.0: slime, cpo; 2.0: dpo)" in notes
    assert "args.max_grad_norm differs (not set: slime, cpo; 1.0: dpo)" in notes
    assert "cpo has a likelihood term of its own (nll_weight 1)" in notes
    assert "rows learnt from with seed 0: slime 40, dpo 80, cpo 40" in notes
    assert "tokens learnt from with seed 0: slime 800, dpo 800, cpo 400" in notes


def test_the_seed_in_which_arms_saw_least_alike_is_told(tmp_path: Path) -> None:
    # Alike with the first seed; seed 3 was not run for one of them.
    steps = {"dpo": {0: 10, 1: 10, 2: 30, 3: 10}, "ipo": {0: 10, 1: 11, 2: 10}}
    cells = [
        done(tmp_path, arm, {"loss": arm}, seed, {}, steps=count)
        for arm, of_seed in steps.items()
        for seed, count in of_seed.items()
    ]
    rows, tokens = unfair(cells, all_figures(cells))
    assert rows == "rows learnt from with seed 2: dpo 120, ipo 40"
    assert tokens == "tokens learnt from with seed 2: dpo 1,200, ipo 400"


def test_arms_that_differ_in_nothing_but_the_objective_are_alike(tmp_path: Path) -> None:
    arms = {"dpo": {"loss": "dpo"}, "ipo": {"loss": "ipo", "loss_options.tau": 0.2}}
    cells = [done(tmp_path, name, keys, 0, {}) for name, keys in arms.items()]
    assert unfair(cells, all_figures(cells)) == []


def test_the_end_of_a_search_is_said() -> None:
    search = {"by": "x", "seeds": [9], "grid": {"learning_rate": [1, 2, 3]}}
    sweep = Sweep.model_validate({"recipe": "r", "arms": {"a": {}}, "seeds": [0], "search": search})
    recipe = cell_recipe(BASE, None, "a", {}, 0)
    assert edges(sweep, [Cell("a", {"learning_rate": 2}, recipe, Path())]) == []
    found = edges(sweep, [Cell("a", {"learning_rate": 3}, recipe, Path())])
    assert found == ["a: the best learning_rate of the search, 3, is at its end: a better one may lie beyond"]
    words = {**search, "grid": {"loss_options.soft_gate": ["one", "sigmoid", None]}}
    of_words = Sweep.model_validate({"recipe": "r", "arms": {"a": {}}, "seeds": [0], "search": words})
    assert edges(of_words, [Cell("a", {"loss_options.soft_gate": None}, recipe, Path())]) == []


def test_tables_are_written_and_an_unknown_measure_refused(tmp_path: Path) -> None:
    cells = [done(tmp_path, "slime", {}, seed, {"accuracy": 0.5 + seed / 10}) for seed in (0, 1)]
    sweep = Sweep.model_validate({"recipe": "r", "arms": {"slime": {}}, "seeds": [0, 1]})
    write_tables(cells, sweep, tmp_path, make_console(quiet=True))
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    seen = [(row["arm"], row["seed"], row["accuracy"]) for row in rows]
    assert seen == [("slime", "0", "0.5"), ("slime", "1", "0.6")]
    assert "| slime |  | 2 | 0.550 ± 0.635 |" in (tmp_path / "sweep.md").read_text()
    steps = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert [(row["seed"], row["step"], row["loss"]) for row in steps][:2] == [
        ("0", "5", "2"),
        ("0", "10", "1"),
    ]
    (tmp_path / "runs.csv").unlink()
    (tmp_path / "sweep.md").unlink()
    with pytest.raises(InputError, match=r"nothing is called 'acuracy' .did you mean 'accuracy'"):
        write_tables(
            cells,
            sweep.model_copy(update={"measures": ["acuracy", "accuracy"]}),
            tmp_path,
            make_console(quiet=True),
        )
    # What took hours to run is not lost to a word.
    assert (tmp_path / "runs.csv").read_text().count("\n") == 3
    assert "| arm | at | seeds | accuracy | Δ |" in (tmp_path / "sweep.md").read_text()
