"""From arms to whole recipes, and what several of them share."""

import json
from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.sweep.cells import (
    Cell,
    by_shared,
    cell_recipe,
    link_shared,
    needed_by,
    shared_parts,
    shared_recipe,
)
from tests.report.conftest import scores_row

BASE: dict[str, Any] = {
    "model": "some/model",
    "data": {"path": "pairs.jsonl"},
    "tasks": {"train": "tasks.jsonl", "checker": "check.py:right"},
    "pairs": {"samples": {"model": "sft"}, "others": {"model": "sft"}},
    "stages": [
        {"loss": "sft"},
        {"loss": "dpo", "start": "sft"},
        {"loss": "slime", "start": "sft"},
        {"loss": "simpo", "name": "on-samples", "start": "sft", "part": "samples"},
    ],
    "evaluate": [{"benchmark": "ifeval"}],
}


def cell(name: str, keys: dict[str, Any], seed: int = 0, stage: str | None = None) -> Cell:
    return Cell(name, {}, cell_recipe(BASE, stage, name, keys, seed), Path("out") / name / f"seed-{seed}")


def test_a_cell_is_the_compared_stage_with_the_arm_s_keys_and_what_it_needs() -> None:
    recipe = cell_recipe(
        BASE, "slime", "small", {"loss_options.hard_margin": 0.5, "learning_rate": 1e-6}, seed=3
    )
    assert [stage.name for stage in recipe.stages] == ["sft", "small"]
    last = recipe.stages[-1]
    assert (last.loss, last.loss_options, last.learning_rate) == ("slime", {"hard_margin": 0.5}, 1e-6)
    assert (recipe.seed, recipe.pairs) == (3, {})
    assert recipe.evaluate[0].stages == ["small"]


def test_what_arms_share_in_the_file_stays_as_it_is_when_one_of_them_adds_to_it() -> None:
    shared = {"hard_margin": 0.5}
    for name, keys, options in (
        (
            "more",
            {"loss_options": shared, "loss_options.soft_margin": 0.1},
            {"hard_margin": 0.5, "soft_margin": 0.1},
        ),
        ("plain", {"loss_options": shared}, {"hard_margin": 0.5}),
    ):
        assert cell_recipe(BASE, "slime", name, keys, 0).stages[-1].loss_options == options


def test_the_last_stage_is_compared_unless_another_is_named() -> None:
    recipe = cell_recipe(BASE, None, "arm", {}, seed=0)
    assert [stage.name for stage in recipe.stages] == ["sft", "arm"]
    assert list(recipe.pairs) == ["samples"], "pairs that no stage of the cell trains on are left out"


def test_the_split_is_that_of_the_whole_recipe() -> None:
    whole = make_recipe(BASE)
    assert cell_recipe(BASE, "slime", "arm", {}, 0).parts == whole.parts
    assert shared_recipe(cell("arm", {}, stage="slime")).parts == whole.parts


def test_an_arm_may_set_keys_of_the_recipe_and_start_elsewhere() -> None:
    recipe = cell_recipe(BASE, "slime", "arm", {"data.limit": 100, "start": "dpo", "loss": "simpo"}, seed=0)
    assert recipe.data.limit == 100
    assert [stage.name for stage in recipe.stages] == ["sft", "dpo", "arm"]


def test_in_rounds_the_last_one_is_compared() -> None:
    recipe = cell_recipe({**BASE, "rounds": 3}, None, "arm", {}, seed=0)
    assert [stage.name for stage in recipe.stages] == ["sft", "arm", "arm-2", "arm-3"]
    stages, pairs = shared_parts(Cell("arm", {}, recipe, Path("out")))
    assert (stages, pairs) == (["sft"], ["samples"]), "samples of the arm itself are its own"


def test_a_stage_that_is_called_like_a_round_is_none() -> None:
    stages = [*BASE["stages"], {"loss": "slime", "name": "slime-2", "start": "slime"}]
    recipe = cell_recipe({**BASE, "stages": stages}, "slime", "slime", {}, seed=0)
    assert [stage.name for stage in recipe.stages] == ["sft", "slime"]


@pytest.mark.parametrize(
    ("asked", "scored"),
    [
        ({"benchmark": "ifeval"}, "ifeval"),
        ({"benchmark": "arena-hard", "judge": "gpt-4.1"}, "arena-hard-v2.0"),
        ({"benchmark": "alpaca-eval", "judge": "gpt-4"}, "alpaca-eval-2"),
    ],
    ids=["ifeval", "arena-hard", "alpaca-eval"],
)
def test_a_cell_is_done_when_its_benchmarks_are(tmp_path: Path, asked: dict[str, str], scored: str) -> None:
    recipe = cell_recipe({**BASE, "evaluate": [asked]}, "slime", "arm", {}, 0)
    one = Cell("arm", {}, recipe, tmp_path / "arm" / "seed-0")
    (one.folder / "arm").mkdir(parents=True)
    assert not one.done
    (one.folder / "arm" / "stage.json").write_text("{}")
    assert not one.done, "a kill between training and the benchmark"
    scores = one.folder / "eval" / "ifeval" / "scores"
    scores.mkdir(parents=True)
    row = scores_row("seed-0-arm", 17.5)
    row["identity"]["benchmark"] = scored
    (scores / "other.json").write_text(json.dumps({"scores": [{**row, "model": "seed-0-other-arm"}]}))
    assert not one.done
    (scores / "broken.json").write_text(json.dumps({"scores": [{"model": "seed-0-arm"}]}))
    with pytest.raises(InputError, match=r"broken\.json: no score file of slimepo eval"):
        _ = one.done
    (scores / "broken.json").unlink()
    (scores / "one.json").write_text(json.dumps({"scores": [row]}))
    assert one.done


@pytest.mark.parametrize(
    ("stage", "keys", "words"),
    [
        ("slim", {}, "there is no stage 'slim' .did you mean 'slime'"),
        (None, {"learning_rat": 1}, "'learning_rat' is no key .* .did you mean 'learning_rate'"),
        (None, {"learning_rate": -1}, "arm 'arm': .*learning_rate"),
        (None, {"loss_options.gama": 1}, "arm 'arm': .*gama"),
    ],
)
def test_wrong_keys_are_named(stage: str | None, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        cell_recipe(BASE, stage, "arm", keys, seed=0)


@pytest.mark.parametrize(("key", "value"), [("seed", 3), ("seeds", [3, 4])])
def test_seeds_of_the_recipe_are_refused_and_may_be_taken_out(key: str, value: Any) -> None:
    words = (
        rf"sweep: its recipe has {key} = .*every arm runs with the sweep's own.*overrides: {{{key}: null}}"
    )
    with pytest.raises(InputError, match=words):
        cell_recipe(BASE | {key: value}, "slime", "arm", {}, seed=0)
    assert cell_recipe(BASE | {key: None}, "slime", "arm", {}, seed=1).seed == 1
    again = make_recipe(BASE).model_dump()
    assert cell_recipe(again, "slime", "arm", {}, seed=1).seed == 1


def test_an_arm_without_pairs_runs_where_keys_are_for_those_of_others() -> None:
    values = BASE | {
        "data": {"cut_long_responses": True},
        "tasks": BASE["tasks"] | {"cost": "check.py:cost", "batch_rows": 8},
        "pairs": {"samples": {}},
        "stages": [{"loss": "slime", "part": "samples"}],
    }
    on_pairs = cell_recipe(values, None, "on-pairs", {}, 0)
    assert on_pairs.tasks is not None
    assert on_pairs.tasks.batch_rows == 8
    online = cell_recipe(values, None, "online", {"loss": "grpo", "rollouts": {"samples": 4}, "part": ""}, 0)
    assert online.tasks is not None
    assert (online.pairs, online.tasks.cost, online.tasks.batch_rows) == ({}, None, 256)


def test_what_cells_start_from_is_made_once_a_seed_and_setting(tmp_path: Path) -> None:
    alike = [cell("a", {}), cell("b", {"learning_rate": 1e-5}), cell("a", {}, seed=1)]
    other = cell("c", {"data.limit": 10})
    found = by_shared([*alike, other], tmp_path)
    assert [[each.arm for each in cells] for cells in found.values()] == [["a", "b"], ["a"], ["c"]]
    assert {folder.name.rpartition("-")[0] for folder in found} == {"seed-0", "seed-1"}
    assert [stage.name for stage in shared_recipe(alike[0]).stages] == ["sft"]
    one_stage = {"model": "some/model", "data": {"path": "pairs.jsonl"}, "stages": [{"loss": "dpo"}]}
    alone = Cell("x", {}, cell_recipe(one_stage, None, "x", {}, 0), tmp_path)
    assert by_shared([alone], tmp_path) == {}


def test_an_adapter_and_all_weights_learn_from_the_same_samples_of_the_recipes_model(tmp_path: Path) -> None:
    base = BASE | {"pairs": {"own": {}}, "stages": [{"loss": "dpo", "part": "own"}]}
    arms = {
        "all": {"adapter": "none"},
        "lora": {"adapter": {"r": 16}, "dtype": "float32"},
        "other": {"model": "another/model"},
    }
    cells = [
        Cell(arm, {}, cell_recipe(base, None, arm, keys, 0), tmp_path / arm) for arm, keys in arms.items()
    ]
    assert [[each.arm for each in alike] for alike in by_shared(cells, tmp_path).values()] == [
        ["all", "lora"],
        ["other"],
    ]


def test_a_cell_s_folder_holds_what_is_shared(tmp_path: Path) -> None:
    made = tmp_path / "shared"
    for name in ("sft", "samples"):
        (made / name).mkdir(parents=True)
        (made / name / "stage.json").write_text("{}")
    folder = tmp_path / "arm" / "seed-0"
    folder.mkdir(parents=True)
    one = Cell("arm", {}, cell_recipe(BASE, None, "arm", {}, 0), folder)
    link_shared(one, made)
    link_shared(one, made)
    assert (folder / "sft" / "stage.json").read_text() == "{}"
    assert (folder / "samples").resolve() == (made / "samples").resolve()


def test_needs_are_followed_to_the_first_stage() -> None:
    recipe = make_recipe(
        {**BASE, "stages": [*BASE["stages"], {"loss": "dpo", "name": "z", "start": "slime"}]}
    )
    assert needed_by(recipe, ["z"]) == ["sft", "slime", "z"]
