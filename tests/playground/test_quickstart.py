"""The quickstart at a small size: ordinary run folders, one page, and a command that goes on; wrong input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from slimepo.errors import InputError
from slimepo.files import json_lines
from slimepo.playground.quickstart import load_quickstart, sweep_base
from slimepo.report.folders import read_sources
from slimepo.settings import read_mapping
from tests.command import slimepo
from tests.playground.conftest import SMALL, command

STAGES = ["sft", "sft-on-chosen-1e-3", "slime-1e-4", "slime-1e16", "kto-3e-5"]
BROKEN = "slime-1e16"


def stage(run: Path, name: str) -> Any:
    return json.loads((run / name / "stage.json").read_text())


def test_it_leaves_ordinary_run_folders_and_a_page(quickstart: tuple[Path, str]) -> None:
    out, said = quickstart
    assert {path.name for path in out.iterdir()} == {
        "seed-4",
        "seed-5",
        "report.html",
        "report.md",
        "report.png",
    }
    for run in (out / "seed-4", out / "seed-5"):
        files = {".slimepo-run", ".lock", "recipe.yaml", "status.json", "versions.json", "data.json"}
        files |= {"world", "samples"}
        assert {path.name for path in run.iterdir()} == files | set(STAGES)
        recipe = read_mapping(run / "recipe.yaml", "recipe")
        assert [each["name"] for each in recipe["stages"]] == STAGES
        assert f"seed-{recipe['seed']}" == run.name
    for text in ((out / "report.html").read_text(), (out / "report.md").read_text(), said):
        assert "slime-1e-4" in text
        assert "not finite" in text
    assert "slime-1e-4 (2 seeds)" in (out / "report.md").read_text()
    assert f"page: {out / 'report.html'}" in said


def test_every_stage_is_measured_on_pairs_and_tasks(quickstart: tuple[Path, str]) -> None:
    run = quickstart[0] / "seed-4"
    made = json.loads((run / "samples" / "pairs.json").read_text())
    for name in STAGES[1:]:
        if name == BROKEN:
            continue
        heldout = stage(run, name)["heldout"]
        figures = {
            "exact_match",
            "format_valid",
            "end_rate",
            "repetition",
            "logps/chosen",
            "rejected_below_floor",
        }
        assert figures <= heldout["before"].keys() & heldout["after"].keys()
        assert (heldout["prompts"], heldout["pairs"]) == (36, made["heldout"]["pairs"])
        shapes = json.loads((run / name / "distributions.json").read_text())
        assert set(shapes) == {"margin", "rejected_tokens", "answer_lengths"}
        assert sum(shapes["answer_lengths"]["after"]) == len(json_lines(run / name / "answers.jsonl")) == 36
        answers = next(
            line for line in json_lines(run / name / "monitor.jsonl") if line["kind"] == "generation"
        )
        assert answers["valid"] is not None, "the monitor is given the world's checker of forms"
    # A pair is two judged answers, so that every objective takes the same number of steps.
    assert len({stage(run, name)["steps"] for name in STAGES[1:] if name != BROKEN}) == 1
    assert stage(run, "slime-1e-4")["heldout"]["before"] == stage(run, "kto-3e-5")["heldout"]["before"]


def test_a_run_that_breaks_is_a_result_too(quickstart: tuple[Path, str]) -> None:
    records = {record.name: record for source in read_sources([quickstart[0]]) for record in source.records}
    assert records[f"seed-5/{BROKEN}"].state == "failed"
    assert "not finite" in records[f"seed-5/{BROKEN}"].note
    assert records["seed-5/kto-3e-5"].state == "finished"


def test_another_seed_is_another_world_and_no_heldout_problem_is_trained_on(
    quickstart: tuple[Path, str],
) -> None:
    seen = []
    for run in sorted(quickstart[0].glob("seed-*")):
        heldout, compared = (json_lines(run / "world" / name) for name in ("heldout.jsonl", "tasks.jsonl"))
        assert not {row["id"] for row in heldout} & {row["id"] for row in compared}
        trained = {row["prompt"] for row in json_lines(run / "world" / "demonstrations.jsonl")}
        assert not {row["prompt"] for row in heldout} & trained
        seen.append({row["id"] for row in heldout})
    assert seen[0] != seen[1]


def test_the_same_command_goes_on_in_the_second_seed(quickstart: tuple[Path, str]) -> None:
    out = quickstart[0]
    whole = load_file(out / "seed-5" / "kto-3e-5" / "model" / "model.safetensors")
    shutil.rmtree(out / "seed-5" / "kto-3e-5")
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/*/stage.json")}
    assert slimepo(*command(out)).returncode == 4
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    again = load_file(out / "seed-5" / "kto-3e-5" / "model" / "model.safetensors")
    assert all((again[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["world.demonstrations=301"], "holds a run in another world; give another --out, or --restart"),
        (["sft.max_steps=21"], "holds a run of another recipe .*--restart"),
    ],
)
def test_a_folder_of_another_quickstart_is_refused(
    quickstart: tuple[Path, str], change: list[str], words: str
) -> None:
    result = slimepo(*command(quickstart[0]), *change)
    assert result.returncode == 2
    assert re.search(words, result.stderr)


def names(*arguments: Any, **options: Any) -> list[str]:
    return [each.name for each in load_quickstart(Path("out"), *arguments, **options).recipe.stages]


def test_the_listed_objectives_run_and_others_when_asked_for() -> None:
    control = ["sft", "sft-on-chosen-1e-3"]
    assert names() == [
        *control,
        "dpo-3e-5",
        "dpo-1e-3",
        "simpo-3e-5",
        "simpo-1e-3",
        "slime-1e-4",
        "slime-1e-3",
    ]
    assert names([], ["ipo", "slime/without-hard"]) == [*control, "ipo-1e-5", "slime-without-hard-1e-4"]


def test_one_seed_is_the_folder_itself() -> None:
    one, two = (load_quickstart(Path("out"), SMALL, seeds=seeds).recipe for seeds in (1, 2))
    assert (one.seeds, one.data.path) == ([0], "out/world/demonstrations.jsonl")
    assert (two.seeds, two.data.path) == ([0, 1], "out/seed-{seed}/world/demonstrations.jsonl")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.max_step=3", "unknown key 'stages.sft.max_step' .did you mean 'max_steps'"),
        ("world.heldout=3", "unknown key 'world.heldout' .did you mean 'heldout_prompts'"),
        ("objectives.kto.loss=kto", "there is no 'kto'; there are: sft-on-chosen, dpo, simpo, slime"),
        ("objectives.slime.loss_options.exponent=0", "exponent = 0"),
        ("world.right=2", "world.right"),
    ],
)
def test_wrong_input_is_named(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_quickstart(Path("out"), [override])


@pytest.mark.parametrize("objectives", [[], ["ipo"]])
def test_rates_for_objectives_without_their_own_are_refused_where_none_is(objectives: list[str]) -> None:
    words = r"'learning_rates' is of no use here, .*give objectives\.(slime|ipo)\.learning_rates"
    with pytest.raises(InputError, match=words):
        load_quickstart(Path("out"), ["learning_rates=[1e-5]"], objectives)
    assert names(["learning_rates=[1e-5]"], ["hinge"])[-1] == "hinge-1e-5"


def test_keys_of_pairs_are_refused_online(tmp_path: Path) -> None:
    words = "'pairs.per_prompt' is of no use online: preference.rollouts says how"
    with pytest.raises(InputError, match=words):
        load_quickstart(Path("out"), ["pairs.per_prompt=4"], online=True)
    with pytest.raises(InputError, match=words):
        sweep_base(tmp_path, {"pairs.per_prompt": 4}, kind="online")
    sweep_base(tmp_path, {"pairs.per_prompt": 4})


def test_a_sweep_goes_on_in_no_other_world(tmp_path: Path) -> None:
    small = {"world.demonstrations": 40, "world.preference_prompts": 24, "world.heldout_prompts": 24}
    sweep_base(tmp_path, small)[1](3)
    sweep_base(tmp_path, small)[1](3)
    with pytest.raises(InputError, match=r"another world; give another --out$"):
        sweep_base(tmp_path, {**small, "world.demonstrations": 50})[1](3)


@pytest.mark.parametrize("key", ["seed", "objectives.slime.learning_rates"])
def test_a_key_that_a_sweep_would_not_read_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"{key!r} is of no use here"):
        sweep_base(tmp_path, {key: 1})
