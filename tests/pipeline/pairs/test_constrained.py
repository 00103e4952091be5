"""Answers with hard constraints: a grammar, a repair and a cost, from the recipe to the pairs and the figures."""

import copy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from slimepo.errors import InputError
from slimepo.files import json_lines, read_json
from slimepo.onpolicy.best_of import settled
from slimepo.pipeline.pairs.make import read_pairs
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.run import run_recipe
from slimepo.pipeline.tasks import load_tasks
from slimepo.playground.tours import length
from slimepo.playground.world import WorldSettings
from slimepo.terminal import make_console
from tests.pipeline.conftest import world_recipe

TOURS = "slimepo.playground.tours"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SFT, and BOPO on the cheapest of many trips."""
    world = WorldSettings(demonstrations=200, preference_prompts=24, heldout_prompts=12, families=("tours",))
    tools = {name: f"{TOURS}:{name}" for name in ("grammar", "repair", "cost")}
    values = world_recipe(tmp_path_factory.mktemp("tours"), world, max_new_tokens=32, **tools)
    values["pairs"] = {"best": {"model": "sft", "per_prompt": 4, "most": 12, "keep": 3, "reward": "cost"}}
    values["stages"] += [
        {"loss": "bopo", "part": "best", "learning_rate": 1e-3, "batch_size": 8, "max_steps": 2}
    ]
    return values


@pytest.fixture
def given(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe, to be changed."""
    return copy.deepcopy(recipe)


@pytest.fixture(scope="module")
def run(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("tours") / "run"
    run_recipe(make_recipe(recipe), run, make_console(quiet=True))
    return run


def test_every_answer_is_a_trip(run: Path) -> None:
    """Of a model that has hardly learnt anything: the mask gives the form, the repair the rest."""
    after = read_json(run / "bopo" / "stage.json")["heldout"]["after"]
    assert after["format_valid"] == 1.0
    assert after["repaired"] > 0, "a grammar cannot say that each town comes once"
    assert after["cost"] > 1.0
    lines = [line["after"] for line in json_lines(run / "bopo" / "answers.jsonl")]
    assert all(line["valid"] for line in lines)
    # What the model had written is kept where the repair changed it.
    assert sum("said" in line for line in lines) / len(lines) == pytest.approx(after["repaired"])
    assert sum(line["cost"] for line in lines) / len(lines) == pytest.approx(after["cost"])


def test_the_monitor_knows_the_task_of_every_pair_of_a_task(run: Path) -> None:
    """Two pairs of one task have rows of their own; the form of the answer is that of the task."""
    lines = json_lines(run / "bopo" / "monitor.jsonl")
    told = [line["valid"] for line in lines if line["kind"] == "generation"]
    assert told
    assert None not in told


def test_pairs_are_the_best_against_others_with_their_costs(run: Path, recipe: dict[str, Any]) -> None:
    tasks = {row["id"]: row for row in json_lines(Path(recipe["tasks"]["train"]))}
    rows = json_lines(run / "best" / "train.jsonl")
    assert len(rows) > len({row["task"] for row in rows}), "keep: 3 gives up to two pairs a task"
    for row in rows:
        places = tasks[row["task"]]["numbers"]
        best, other = (length(places, row[side][0]["content"]) for side in ("chosen", "rejected"))
        assert best < other
        assert row["score_rejected"] / row["score_chosen"] == pytest.approx(other / best)


def test_a_task_is_drawn_again_until_its_best_was_found_twice(run: Path) -> None:
    lines = json_lines(run / "best" / "samples-train.jsonl")
    lots = Counter(line["task"] for line in lines)
    assert len(lots) == 24
    assert set(lots.values()) == {1, 2, 3}, "some tasks are easier than others"
    facts = read_json(run / "best" / "pairs.json")["train"]
    assert facts["samples"] == 4 * sum(lots.values()) < 24 * 12
    assert facts["samples_repaired"] > 0
    # Another lot is another draw.
    drawn = {(line["task"], line.get("lot", 0)): line["said"] for line in lines}
    again = [task for task, lot in drawn if lot == 1]
    assert any(drawn[task, 0] != drawn[task, 1] for task in again)


def test_a_killed_run_draws_nothing_twice(run: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The last lot was cut off in the middle of a line."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    whole = (run / "best" / "samples-train.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (again / "best" / "samples-train.jsonl").write_text("".join(lines[:-1]) + lines[-1][:9])
    for name in ("pairs.json", "train.jsonl"):
        (again / "best" / name).unlink()
    shutil.rmtree(again / "bopo")
    run_recipe(make_recipe(recipe), again, make_console(quiet=True))
    for name in ("train.jsonl", "samples-train.jsonl"):
        kept = sorted(map(str, json_lines(run / "best" / name)))
        assert sorted(map(str, json_lines(again / "best" / name))) == kept


def test_bopo_is_given_the_ratio_of_costs(run: Path) -> None:
    plain, weighed = (read_pairs(run / "best" / "train.jsonl", by_cost=by_cost) for by_cost in (False, True))
    assert {pair.weight for pair in plain} == {1.0}
    for pair in weighed:
        assert pair.scores is not None
        assert pair.weight == pair.scores[1] / pair.scores[0] > 1


def test_a_best_that_was_found_twice_is_settled() -> None:
    assert not settled([])
    assert not settled([-1.0])
    assert not settled([-1.0, -2.0, -2.0])
    assert settled([-1.0, -2.0, -1.0])
    assert not settled([-1.0, float("nan")])


REFUSED = [
    ({"tasks": {"cost": None}}, r"reward 'cost' is the tasks'.*give tasks.cost"),
    ({"pairs": {"reward": None, "gold": True, "most": None}}, "keep ranks samples by a reward"),
    ({"pairs": {"most": 10}}, "most = 10 samples.*multiple of per_prompt"),
    ({"pairs": {"most": 4}}, "most = 4 samples.*multiple of per_prompt"),
    ({"pairs": {"repair": f"{TOURS}:repair"}}, "repair is for answers that are right or wrong"),
    ({"pairs": {"keep": 13}}, "keep = 13 samples of 12: lower keep"),
    ({"pairs": {"reward": "checker"}}, "most = 12 samples.*give reward: cost"),
    ({"pairs": {"engine": "http://localhost:1"}}, "tasks.grammar works with engine: transformers"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_cannot_be_is_refused_with_the_way_out(
    given: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    given["tasks"] |= changes.get("tasks", {})
    given["pairs"]["best"] |= changes.get("pairs", {})
    with pytest.raises(InputError, match=said):
        make_recipe(given)


def test_rollouts_do_not_learn_from_answers_that_others_have_changed(given: dict[str, Any]) -> None:
    given["stages"][1] = {"loss": "grpo", "rollouts": {"samples": 4}}
    with pytest.raises(InputError, match=r"stage 'grpo': rollouts learn .*tasks.grammar or tasks.repair"):
        make_recipe(given)


def test_bopo_is_refused_where_pairs_have_no_costs(given: dict[str, Any], tmp_path: Path) -> None:
    given["pairs"]["best"] |= {"reward": f"{tmp_path}/own.py:count", "most": None}
    with pytest.raises(InputError, match=r"stage 'bopo': bopo weighs pairs by their costs.*reward=cost"):
        run_recipe(make_recipe(given), tmp_path / "run", make_console(quiet=True))


OWN = """
def grammar(row):
    return 'root := "a'

def no_text(row, answer=None):
    return 3

def negative(row, answer):
    return -1.0

def fails(row, answer):
    raise KeyError("towns")
"""
MISTAKES = [
    ("grammar", "grammar", "task .*: the grammar cannot be read: .*line 1"),
    ("grammar", "no_text", "must return a text, and gave 3"),
    ("repair", "no_text", "must return a text, and gave 3"),
    ("repair", "fails", "fails on task .*KeyError"),
    ("cost", "negative", "must return a number above 0, and gave -1.0"),
    ("grammar", "absent", "cannot be imported"),
]


@pytest.mark.parametrize(("key", "name", "said"), MISTAKES)
def test_a_users_mistakes_are_told_with_the_task(
    given: dict[str, Any], tmp_path: Path, key: str, name: str, said: str
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    given["tasks"][key] = f"{tmp_path}/own.py:{name}"
    with pytest.raises(InputError, match=said):
        load_tasks(make_recipe(given))


def test_a_grammar_may_be_a_file(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "trip.ebnf").write_text('root ::= "a" (" " [b-f])*')
    given["tasks"]["grammar"] = f"{tmp_path}/trip.ebnf"
    tasks = load_tasks(make_recipe(given))
    assert tasks is not None
    assert tasks.grammar is not None
    assert tasks.grammar(tasks.train[0]) == 'root ::= "a" (" " [b-f])*'
    # Another text is another run.
    before = tasks.facts
    (tmp_path / "trip.ebnf").write_text('root ::= "a" (" " [b-f])+')
    changed = load_tasks(make_recipe(given))
    assert changed is not None
    assert changed.facts != before
    given["tasks"]["grammar"] = f"{tmp_path}/absent.ebnf"
    with pytest.raises(InputError, match=r"grammar .*absent.ebnf: No such file"):
        load_tasks(make_recipe(given))
