"""Recipes: the paper's values as defaults, overrides, and errors that name the nearest key."""

from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.pipeline.recipe.read import load_recipe, make_recipe, one_stage_recipe
from slimepo.pipeline.recipe.sections import RandomModel
from slimepo.settings import dump, parse_value
from slimepo.types import REFERENCE_SOURCES

TEXT = """
model: some/model
data:
  path: pairs.jsonl
stages:
  - loss: sft
  - loss: slime
    loss_options: {hard_margin: 2}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_defaults_are_the_papers(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    sft, slime = recipe.stages
    assert (sft.learning_rate, sft.epochs, sft.part) == (2e-4, 3, "sft")
    assert (slime.learning_rate, slime.epochs, slime.part) == (5e-7, 1, "preference")
    assert recipe.adapter is not None
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.dropout) == (64, 128, 0)
    assert recipe.adapter.train_head
    assert recipe.seed == 0
    assert recipe.parts == {"sft": 0.33, "preference": 0.66, "heldout": 0.01}


@pytest.mark.parametrize(
    "key", ["model", "tokenizer", "data.path", "data.split", "tasks.heldout", "stages.slime.reference"]
)
def test_a_key_without_a_value_is_no_key_that_is_left_out(recipe_file: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"{key} is empty: give a value, or leave it out"):
        load_recipe(recipe_file, [f"{key}="])


def test_weights_of_wpo_are_a_part_of_a_stages_name(recipe_file: Path) -> None:
    stage = load_recipe(recipe_file, ["stages.slime.loss_options={}", "stages.slime.loss=wpo(dpo)"]).stages[1]
    assert (stage.loss, stage.name) == ("wpo(dpo)", "wpo-dpo")


def test_a_sum_of_objectives_is_named_by_its_parts(recipe_file: Path) -> None:
    overrides = [
        "stages.slime.loss_options={sft: {average: token}}",
        "stages.slime.loss={slime: 0.8, sft: 1}",
    ]
    sft, both = load_recipe(recipe_file, overrides).stages
    assert (both.loss, both.name, both.part) == ("0.8*slime+1.0*sft", "slime-sft", "preference")
    assert (both.learning_rate, sft.name) == (5e-7, "sft")
    with pytest.raises(InputError, match=r"loss '0.8\*slime\+1.0\*sft' has no part 'dpo'"):
        load_recipe(recipe_file, [*overrides, "stages.1.loss_options.dpo.beta=1"])
    with pytest.raises(InputError, match="the share of sft = 'much' is out of range"):
        load_recipe(recipe_file, ["stages.slime.loss={sft: much}"])


def test_overrides_find_stages_by_name_or_number(recipe_file: Path) -> None:
    overrides = ["stages.slime.learning_rate=1e-6", "stages.0.epochs=1", "data.path=more.csv", "adapter=none"]
    recipe = load_recipe(recipe_file, [*overrides, "stages.slime.loss_options.exponent=2"])
    assert recipe.stages[1].learning_rate == 1e-6
    assert recipe.stages[0].epochs == 1
    assert recipe.data.path == "more.csv"
    assert recipe.adapter is None
    assert recipe.stages[1].loss_options == {"hard_margin": 2, "exponent": 2}


HUB = "{path: hub/set, split: train_prefs, format: ultrafeedback, heldout: hub/set, heldout_split: test, limit: 9}"


@pytest.mark.parametrize(
    ("overrides", "split", "heldout", "heldout_split", "kind", "said"),
    [
        ([], "train_prefs", "hub/set", "test", "ultrafeedback", ""),
        (
            ["data.path=mine.jsonl"],
            None,
            None,
            None,
            "auto",
            "split, format, heldout, heldout_split of recipe",
        ),
        (
            ["data.path=mine.jsonl", "data.heldout_limit=5"],
            None,
            None,
            None,
            "auto",
            "split, format, heldout, heldout_split",
        ),
        (["data.split=x", "data.path=mine.jsonl"], "x", None, None, "auto", "format, heldout, heldout_split"),
        (["data.heldout=held.jsonl"], "train_prefs", "held.jsonl", None, "ultrafeedback", "heldout_split"),
    ],
)
def test_what_a_recipe_says_of_its_own_file_is_not_said_of_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, overrides: list[str], split: str | None,
    heldout: str | None, heldout_split: str | None, kind: str, said: str,
) -> None:  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: some/model\ndata: {HUB}\nstages: [{{loss: slime}}]\n")
    data = load_recipe(file, overrides).data
    assert (data.split, data.heldout, data.heldout_split, data.format) == (
        split,
        heldout,
        heldout_split,
        kind,
    )
    assert data.limit == 9
    assert said in caplog.text
    assert bool(said) is bool(caplog.text)


def test_a_model_can_be_replaced_by_a_random_one(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["model.init=random", "model.architecture=llama", "model.hidden_size=8", "tokenizer=folder"],
    )
    assert isinstance(recipe.model, RandomModel)
    assert recipe.model.sizes == {"hidden_size": 8}
    assert recipe.adapter is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sed=1", "unknown key 'sed' .did you mean 'seed'"),
        (
            "learning_rate=1",
            "'learning_rate': it belongs elsewhere; give stages.NAME.learning_rate",
        ),
        ("max_length=9", "unknown key 'max_length': it belongs elsewhere; give data.max_length"),
        ("data.pth=x", "unknown key 'data.pth' .did you mean 'path'"),
        (
            "stages.slime.learning_rte=1",
            "unknown key 'stages.slime.learning_rte' .did you mean 'learning_rate'",
        ),
        ("adapter.rank=3", "unknown key 'adapter.rank'"),
        ("stages.dpo.epochs=1", "there is no 'dpo'; there are: sft, slime"),
        ("stages.slime.loss_options.hard_margn=1", "stage 'slime'.*did you mean 'hard_margin'"),
        ("stages.slime.loss_options.exponent=0", "exponent = 0.*>= 1"),
        ("stages.slime.loss=slimy", "unknown loss 'slimy'.*did you mean 'slime'"),
        ("stages.slime.batch_size=0", "stages.slime.batch_size: .*greater than or equal to 1"),
        ("stages.slime.part=heldouts", "no part 'heldouts' in data.parts"),
        ("stages.slime.name=sft", "two stages are named 'sft'"),
        ("stages.slime.name=../x", "cannot be a stage's name"),
        ("seed", "is not key=value"),
        ("model.init=random", "model"),
    ],
)
def test_wrong_input_is_named(recipe_file: Path, override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "line 1 is not YAML"), ("- 1", "must be a mapping"), ("seed: 0", "is missing")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        load_recipe(path)
    with pytest.raises(InputError, match=r"No such file or directory \(did you mean 'bad.yaml'\?\)"):
        load_recipe(tmp_path / "baad.yaml")


def test_the_resolved_recipe_reads_back_the_same(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(recipe))
    assert load_recipe(again) == recipe


def test_numbers_without_a_point_are_numbers() -> None:
    assert parse_value("2e-4") == 2e-4
    assert parse_value("yes") == "yes"
    assert parse_value("[1, a]") == [1, "a"]


def test_one_stage_takes_keys_of_the_stage_and_of_the_recipe() -> None:
    recipe = one_stage_recipe(
        "m", "d.jsonl", "slime", ["learning_rate=1e-6", "loss_options.exponent=2", "seed=3"]
    )
    assert recipe.stages[0].learning_rate == 1e-6
    assert recipe.stages[0].loss_options == {"exponent": 2}
    assert recipe.seed == 3
    assert recipe.parts == {"preference": 0.99, "heldout": 0.01}
    assert one_stage_recipe("m", "d.jsonl", None, ["loss=dpo"]).stages[0].loss == "dpo"
    assert one_stage_recipe("m", "d.jsonl", None).stages[0].loss == "slime"


STAGES = [{"loss": "sft"}, {"loss": "slime", "part": "own"}]
OWN: dict[str, Any] = {
    "model": "m",
    "data": {"path": "x"},
    "tasks": {"train": "tasks.jsonl", "checker": "c:c"},
    "pairs": {"own": {"model": "sft"}},
    "stages": STAGES,
}


def test_a_stage_names_the_pairs_that_the_run_makes() -> None:
    recipe = make_recipe(OWN)
    assert recipe.needs(recipe.stages[1]) == ["sft"]
    # Pairs are no part of the split: all rows are for the one part that is.
    assert recipe.parts == {"sft": 0.99, "heldout": 0.01}
    alone = make_recipe(OWN | {"data": {}, "pairs": {"own": {}}, "stages": STAGES[1:]})
    assert alone.needs(alone.stages[0]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": STAGES[1:]}, "the model 'sft' of its pairs is no stage before it"),
        ({"tasks": None}, "give tasks.train and tasks.checker"),
        ({"tasks": {"checker": "c:c"}, "pairs": {}, "stages": STAGES[:1]}, "tasks: give a file"),
        ({"pairs": {"sft": {}}}, "pairs 'sft' are named like a stage or a part"),
        ({"pairs": {}}, r"no part 'own' in data.parts or pairs \(sft, preference"),
        ({"data": {}}, "stage 'sft' trains on part 'sft' of the data: give data.path"),
        ({"pairs": {"own": {"per_prompt": 1}}}, "per_prompt: Input should be greater than or equal to 2"),
        ({"seeds": [0, 1], "seed": 0}, "give seed or seeds, not both"),
        ({"seeds": [1, 1]}, "one stands there twice"),
        ({"seeds": [-1]}, "seeds"),
    ],
)
def test_wrong_tasks_pairs_and_seeds_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_recipe(OWN | changes)


OF_ITSELF: dict[str, Any] = {
    "model": "m",
    "tasks": {"train": "tasks.jsonl", "checker": "c:c"},
    "pairs": {"own": {}},
    "stages": STAGES[1:],
}
SAMPLING: dict[str, Any] = {"pairs": {}, "stages": [{"loss": "grpo", "rollouts": {"samples": 4}}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data": {"path": "x", "heldout_split": "test"}},
            r"data.heldout_split is of data.heldout, which is not given: give heldout: PATH \(data.path again",
        ),
        ({"data": {"path": "x", "heldout_columns": {"prompt": "q"}}}, "heldout_columns is of data.heldout"),
        ({"data": {"split": "train"}}, "data.split is of data.path, which is not given"),
        ({"data": {"limit": 9, "heldout": "h.jsonl"}}, "data.limit is of data.path, which is not given"),
        ({"data": {"parts": {"sft": 1.0}}}, "data.parts is of data.path"),
        ({"data": {"format": "hh"}}, "data.format is of data.path or data.heldout, and neither is given"),
        ({"data": {"columns": {"prompt": "q"}}}, "data.columns is of data.path or data.heldout"),
        ({"data": {"skip_bad_rows": True}}, "data.skip_bad_rows is of data.path or data.heldout"),
        ({"data": {"heldout_limit": 9}}, "data.heldout_limit is of data.path or data.heldout"),
        (SAMPLING | {"data": {"cut_long_responses": True}}, "data.cut_long_responses is of rows of a file"),
        (
            {"tasks": OF_ITSELF["tasks"] | {"max_new_tokens": 9}},
            "tasks.max_new_tokens is of held-out tasks: give tasks.heldout",
        ),
        (
            SAMPLING | {"tasks": OF_ITSELF["tasks"] | {"batch_rows": 9}},
            "tasks.batch_rows is of held-out tasks and of pairs: give tasks.heldout, or leave it out",
        ),
        (SAMPLING | {"tasks": OF_ITSELF["tasks"] | {"cost": "c:c"}}, "tasks.cost is of held-out tasks"),
        (
            {"stages": [SAMPLING["stages"][0] | {"monitor": {"every": 3}}]},
            "stage 'grpo': the monitor watches held-out pairs where answers are sampled: give data.heldout",
        ),
    ],
)
def test_what_nothing_would_read_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_recipe(OF_ITSELF | changes)


def test_nor_is_what_pairs_read_or_a_run_s_own_recipe_says() -> None:
    tasks = OF_ITSELF["tasks"] | {"batch_rows": 9, "cost": "c:c"}
    recipe = make_recipe(OF_ITSELF | {"tasks": tasks, "data": {"cut_long_responses": True}})
    assert make_recipe(parse_value(dump(recipe))) == recipe
    sampling = make_recipe(OF_ITSELF | SAMPLING)
    assert make_recipe(parse_value(dump(sampling))) == sampling


def test_a_random_model_needs_a_tokenizer() -> None:
    values: dict[str, Any] = {"model": {"init": "random", "architecture": "llama"}, "data": {"path": "x"}}
    with pytest.raises(InputError, match="needs a tokenizer"):
        make_recipe(values | {"stages": [{"loss": "slime"}]})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rat=1", "did you mean 'learning_rate'"),
        ("hard_margin=2", "did you mean 'loss_options.hard_margin'"),
        ("loss=dpo", "--loss slime, and an override that makes it dpo: give it once"),
        ("stages.0.loss=dpo", "--loss slime, and an override that makes it dpo"),
        ("model=n", "--model m, and an override that makes it n"),
        ("data.path=e.jsonl", "--data d.jsonl, and an override that makes it e.jsonl"),
    ],
)
def test_one_stage_refuses_what_it_does_not_know_and_what_is_given_twice(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        one_stage_recipe("m", "d.jsonl", "slime", [override])


def test_a_stage_may_start_from_any_stage_before_it(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["stages.slime.start=sft"]).stages[1].start == "sft"
    with pytest.raises(InputError, match=r"start 'dpo' is no stage before it \(there are: sft\)"):
        load_recipe(recipe_file, ["stages.slime.start=dpo"])
    with pytest.raises(InputError, match="start 'sft' is no stage before it"):
        load_recipe(recipe_file, ["stages.sft.start=sft"])


def test_a_reference_may_be_any_stage_before(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["stages.slime.reference=sft"]).stages[1].reference == "sft"
    named = "reference 'slime' is no stage before it"
    with pytest.raises(InputError, match=rf"stage 'slime': {named} \(there are: sft\)"):
        load_recipe(recipe_file, ["stages.slime.reference=slime"])
    with pytest.raises(InputError, match=rf"stage 'sft': {named} \(there are: none\)"):
        load_recipe(recipe_file, ["stages.sft.reference=slime"])


@pytest.mark.parametrize("name", REFERENCE_SOURCES)
def test_no_stage_is_named_like_a_source_of_the_reference(recipe_file: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' cannot be a stage's name.*reference"):
        load_recipe(recipe_file, [f"stages.sft.name={name}"])


@pytest.mark.parametrize("loss", ["grpo", "ppo", "dpo", "sft"])
def test_a_run_s_own_recipe_with_all_its_defaults_is_a_recipe(loss: str) -> None:
    rollouts = {"loss": loss, "rollouts": {"samples": 4}}
    values = {"model": "m", "tasks": {"train": "t", "checker": "c:f"}, "stages": [rollouts]}
    recipe = make_recipe(values)
    assert make_recipe(parse_value(dump(recipe))) == recipe


def test_an_adapter_is_named_by_a_word_or_by_its_settings(recipe_file: Path) -> None:
    assert (
        load_recipe(recipe_file, ["adapter=lora"]).adapter == load_recipe(recipe_file, ["adapter={}"]).adapter
    )
    assert load_recipe(recipe_file, ["adapter=none"]).adapter is None
    with pytest.raises(InputError, match=r"adapter: 'loar' is none of none, lora, merge, continue .*'lora'"):
        load_recipe(recipe_file, ["adapter=loar"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter=none"], "quantize is for a frozen base: give an adapter"),
        (["adapter=merge"], "quantize would round what adapter: merge has just merged"),
        (["parallel=fsdp2"], "parallel: fsdp2 would cut quantised weights into parts"),
        (["quantize=int3"], "quantize"),
    ],
)
def test_a_base_in_four_bits_is_a_frozen_and_whole_one(
    recipe_file: Path, overrides: list[str], words: str
) -> None:
    assert load_recipe(recipe_file, ["quantize=nf4", "parallel=ddp"]).quantize == "nf4"
    with pytest.raises(InputError, match=words):
        load_recipe(recipe_file, ["quantize=nf4", *overrides])
