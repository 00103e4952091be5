"""The quickstart at a small size: SFT, pairs from samples, objectives, table and page; the cache; wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.monitor.callback import DisplacementMonitor
from slimepo.playground.quickstart import build_world, run_quickstart, run_seeds, sft_key
from slimepo.playground.settings import load_quickstart
from slimepo.playground.world import demonstrations
from slimepo.terminal import make_console

SMALL = [
    "world.demonstrations=300",
    "world.preference_prompts=60",
    "world.heldout_prompts=36",
    "sft.steps=20",
    "samples.per_prompt=2",
    "samples.max_new_tokens=12",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "preference.learning_rates=[1e-3]",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(cache: Path) -> tuple[dict[str, Any], Path]:
    out = cache / "out"
    return run_quickstart(load_quickstart(SMALL), out, make_console(quiet=True), cache=cache / "models"), out


def test_it_leaves_a_table_a_page_and_the_numbers(first: tuple[dict[str, Any], Path]) -> None:
    result, out = first
    assert {"quickstart.json", "table.md", "page.html"} == {p.name for p in out.iterdir()}
    assert json.loads((out / "quickstart.json").read_text())["runs"][0]["name"] == result["runs"][0]["name"]
    once_or_twice = ["sft on chosen", "dpo", "dpo", "simpo", "simpo", "slime", "slime"]
    assert [run["objective"] for run in result["runs"]] == once_or_twice
    for run in result["runs"]:
        figures = {"exact_match", "format_valid", "end_rate", "repetition", "logps/chosen", "logps/rejected"}
        assert figures | {"rejected_below_floor"} <= run["before"].keys() & run["after"].keys()
        assert 0 <= run["chosen_fell"] <= 1
        assert run["curve"]
        assert set(run["distributions"]) == {"margin", "rejected_tokens", "answer_lengths"}
        assert sum(run["distributions"]["answer_lengths"]["after"]) == result["heldout_prompts"]
        start, *_, end = run["monitor"]
        assert (start["kind"], end["kind"]) == ("start", "end")
        assert start["rows"]["heldout"], "the monitor is given the held-out pairs"
        answers = next(line for line in run["monitor"] if line["kind"] == "generation")
        assert answers["valid"] is not None, "and the world's checker of forms"
    assert "slime 1e-3" in (out / "page.html").read_text()


def test_the_second_run_starts_from_the_cached_sft_model(
    first: tuple[dict[str, Any], Path], cache: Path
) -> None:
    again = run_quickstart(
        load_quickstart(SMALL), cache / "again", make_console(quiet=True), cache=cache / "models"
    )
    assert again["sft"]["cached"]
    assert not first[0]["sft"]["cached"]
    for one, two in zip(first[0]["runs"], again["runs"], strict=True):
        assert one["after"] == two["after"]


def test_the_cache_is_keyed_by_what_the_model_depends_on() -> None:
    def key(*overrides: str) -> str:
        recipe = load_quickstart([*SMALL, *overrides])
        world = build_world(recipe)
        return sft_key(recipe, demonstrations(world.demonstrated, recipe.seed))

    assert key() == key("preference.epochs=1")
    assert len({key(), key("seed=1"), key("sft.steps=21"), key("model.hidden_size=64")}) == 4


def test_no_heldout_problem_is_trained_on() -> None:
    world = build_world(load_quickstart(SMALL))
    heldout = {task.key for task in world.heldout}
    assert not heldout & {task.key for task in (*world.demonstrated, *world.compared)}


def test_one_objective_runs_beside_the_control() -> None:
    recipe = load_quickstart(SMALL, ["slime"], sweep=True)
    assert [o.name for o in recipe.objectives] == ["sft on chosen", "slime"]
    assert recipe.preference.learning_rates == recipe.preference.sweep


def test_any_other_objective_runs_when_it_is_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last_words: list[int] = []
    monkeypatch.setattr(
        DisplacementMonitor, "conclude", lambda self, before, after: last_words.append(len(after.chosen))
    )
    assert [o.name for o in load_quickstart().objectives] == ["sft on chosen", "dpo", "simpo", "slime"]
    recipe = load_quickstart(SMALL, ["kto", "slime/without-hard"])
    result = run_quickstart(recipe, cache / "others", make_console(quiet=True), cache=cache / "models")
    names = {run["objective"]: run for run in result["runs"]}
    assert set(names) == {"sft on chosen", "kto", "slime/without-hard"}
    assert all(run["error"] is None for run in result["runs"])
    assert len({run["steps"] for run in result["runs"]}) == 1
    assert last_words == [result["pairs"]["heldout"]] * 3, "all held-out pairs judge every run"


def test_several_seeds_share_a_page(cache: Path) -> None:
    out = cache / "seeds"
    recipe = load_quickstart([*SMALL, "seed=4"], ["slime"])
    folders = run_seeds(recipe, 2, out, make_console(quiet=True), cache=cache / "models")
    assert folders == [out / "seed-4", out / "seed-5"]
    first, second = (json.loads((folder / "quickstart.json").read_text()) for folder in folders)
    assert (first["seed"], second["seed"]) == (4, 5)
    assert first["runs"][0]["before"] != second["runs"][0]["before"], "another seed is another SFT model"
    assert "slime 1e-4 (2 seeds)" in (out / "table.md").read_text()
    assert "slime 1e-4 (2 seeds)" in (out / "page.html").read_text()


def test_a_run_that_breaks_is_a_result_too(cache: Path) -> None:
    overrides = [*SMALL, "objectives.slime.learning_rates=[1e16]"]
    result = run_quickstart(
        load_quickstart(overrides, ["slime"]),
        cache / "broken",
        make_console(quiet=True),
        cache=cache / "models",
    )
    broken = result["runs"][1]
    assert "not finite at step" in broken["error"]
    assert "not finite" in (cache / "broken" / "page.html").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.step=3", "unknown key 'sft.step'; did you mean 'steps'"),
        ("objectives.kto.loss=kto", "there is no 'kto'; there are: sft on chosen, dpo, simpo, slime"),
        ("objectives.slime.loss_options.exponent=0", "exponent = 0"),
        ("world.right=2", "world.right"),
    ],
)
def test_wrong_input_is_named(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_quickstart([override])
