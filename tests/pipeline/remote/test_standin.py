"""Recipes that name models and data of the Hub start without it, as smoke runs, and say what stands in."""

import io
import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from slimepo.data.chat import chat_format
from slimepo.errors import InputError
from slimepo.pipeline.certify import certify_recipe
from slimepo.pipeline.recipe.read import load_recipe
from slimepo.pipeline.remote.standin import byte_tokenizer, family_of, made_up_pairs, with_stand_ins
from slimepo.pipeline.run import run_recipe
from slimepo.terminal import make_console

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
# Without the monitor, whose answers a byte at a time take most of a smoke run, and with one checkpoint a stage.
QUICK = [
    "data.heldout_limit=4",
    *(f"stages.{stage}.{key}" for stage in ("sft", "slime") for key in ("monitor=false", "save_every=5")),
]
PAPER = {"llama-3.2-3b": "llama", "qwen3-4b": "qwen3", "gemma-3-4b": "gemma3_text"}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_start_without_the_hub(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "paper" / f"{name}.yaml", QUICK, smoke=True)
    told = io.StringIO()
    results = run_recipe(recipe, tmp_path / "run", make_console(file=told))
    assert [(result["loss"], result["steps"]) for result in results] == [("sft", 5), ("slime", 5)]
    # The same architecture, an adapter and a trained head, as in the paper's run.
    config = AutoConfig.from_pretrained(tmp_path / "run" / "slime" / "model")
    assert config.model_type == PAPER[name]
    assert 0 < results[1]["trained_parameters"] < results[1]["parameters"]
    for stage in ("sft", "slime"):
        assert json.loads((tmp_path / "run" / stage / "certificate.json").read_text())["agrees"]
    words = " ".join(told.getvalue().split())
    assert f"smoke: {recipe.model}, {recipe.chat_template} cannot be reached: a tiny" in words
    assert f"smoke: {recipe.data.path} cannot be reached: 200 made-up pairs stand in" in words
    # The same stand-ins again: nothing is left to do.
    assert run_recipe(recipe, tmp_path / "run", make_console(quiet=True)) == results


def test_certify_takes_the_same_stand_ins(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "paper" / "qwen3-4b.yaml", QUICK, smoke=True)
    found = certify_recipe(recipe, tmp_path / "run", make_console(quiet=True))
    assert all(each["agrees"] for each in found.values())


def test_nothing_stands_in_for_what_is_there_or_in_a_run_that_counts(tmp_path: Path) -> None:
    file = RECIPES / "paper" / "qwen3-4b.yaml"
    with pytest.raises(InputError, match=r"no tokenizer can be loaded|cannot be|HuggingFaceH4"):
        run_recipe(load_recipe(file), tmp_path / "run", make_console(quiet=True))
    assert with_stand_ins(load_recipe(file), make_console(quiet=True)).model == "Qwen/Qwen3-4B-Base"
    byte_tokenizer().save_pretrained(tmp_path / "model")
    own = [
        f"model={tmp_path / 'model'}",
        f"chat_template={tmp_path / 'model'}",
        f"data.path={tmp_path}/pairs.jsonl",
    ]
    recipe = load_recipe(file, [*own, "data.heldout=null"], smoke=True)
    assert with_stand_ins(recipe, make_console(quiet=True)) == recipe


def test_a_model_whose_name_says_no_architecture_is_an_error_as_ever(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "paper" / "qwen3-4b.yaml", ["model=someone/thing-7b"], smoke=True)
    with pytest.raises(InputError, match="someone/thing-7b"):
        run_recipe(recipe, tmp_path / "run", make_console(quiet=True))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", "llama"),
        ("meta-llama/Meta-Llama-3-8B", "llama"),
        ("Qwen/Qwen3-4B-Base", "qwen3"),
        ("Qwen/Qwen2.5-7B", "qwen2"),
        ("google/gemma-3-4b-pt", "gemma3"),
        ("google/gemma-2-9b", "gemma2"),
        ("mistralai/Mistral-7B-v0.3", "mistral"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral"),
        ("allenai/OLMo-2-1124-7B", "olmo2"),
        ("HuggingFaceTB/thing", None),
    ],
)
def test_the_architecture_is_read_off_a_name(name: str, family: str | None) -> None:
    assert family_of(name) == family


def test_the_tokenizer_of_bytes_has_tokens_for_any_text() -> None:
    tokenizer = byte_tokenizer()
    for text in ("plain", "naïve 日本語 🙂", "a\n\tb", "\u200b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert chat_format(tokenizer).end_id == tokenizer.eos_token_id


def test_made_up_pairs_are_all_different_and_no_ties() -> None:
    rows = made_up_pairs(200)
    assert len({row["prompt"] for row in rows}) == 200
    assert all(row["chosen"] != row["rejected"] for row in rows)
