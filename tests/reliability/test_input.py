"""Bad rows, recipes and folders, as a shell sees them: an exit code, and one line that names the place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from slimepo.errors import InputError
from tests.command import Done, slimepo
from tests.reliability.fuzz import read_yaml, write_yaml

TRAIN = (
    "train",
    "--model",
    "model",
    "--data",
    "pairs.jsonl",
    "--out",
    "out",
    "batch_size=4",
    "max_steps=1",
    "adapter.r=2",
)


def refused(done: Done, code: int, *words: str) -> None:
    """One line of error with these words, and this exit code."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for each in words:
        assert each in done.stderr


def change(number: int, **values: Any) -> None:
    """Change the row of this number, from 1, in pairs.jsonl; a value that is None takes its column away."""
    path = Path("pairs.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number - 1] = {key: value for key, value in (rows[number - 1] | values).items() if value is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("slimepo.pipeline.stage.stage_model", load)


@pytest.mark.case(15, "a malformed line of JSONL: file and line are named before a model loads, exit 2")
def test_a_malformed_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    lines = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join([*lines[:6], '{"prompt": "a", "chosen\n', *lines[7:]]))
    refused(slimepo(*TRAIN), 2, "pairs.jsonl:7: not valid JSON", "--skip-bad-rows")


@pytest.mark.case(
    16, "a missing column, a wrong type, an unknown role, an answer that comes first: exit 2 with the row"
)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rejected": None}, "rejected"),
        ({"chosen": 5}, "a number"),
        ({"prompt": [{"role": "narrator", "content": "x"}]}, "the unknown role 'narrator'"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends in an assistant turn"),
    ],
    ids=["column", "type", "role", "assistant-first"],
)
def test_rows_that_are_no_pairs(
    here: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], words: str
) -> None:
    no_model(monkeypatch)
    change(7, **values)
    refused(slimepo(*TRAIN), 2, "pairs.jsonl:7", words)


@pytest.mark.case(17, "an empty answer is dropped and counted with its reason; the run continues")
def test_an_empty_response(here: Path) -> None:
    change(7, chosen="")
    done = slimepo("data", "check", "pairs.jsonl", "--model", "model")
    assert done.returncode == 0, done.stderr
    assert "empty response" in done.stdout


@pytest.mark.case(
    18, "a pair with identical answers is dropped and counted with its reason; the run continues"
)
def test_chosen_equals_rejected(here: Path) -> None:
    change(7, chosen="same", rejected="same")
    done = slimepo("data", "check", "pairs.jsonl", "--model", "model")
    assert done.returncode == 0, done.stderr
    assert "identical responses" in done.stdout


@pytest.mark.case(
    19, "a prompt longer than max_length is dropped and counted with its reason; the run continues"
)
def test_a_prompt_that_is_too_long(here: Path) -> None:
    change(7, prompt="x" * 100)
    done = slimepo("data", "check", "pairs.jsonl", "--model", "model", "--max-length", "60")
    assert done.returncode == 0, done.stderr
    assert "prompt too long" in done.stdout


@pytest.mark.case(
    20, "no row is left, or a file is empty: the reasons are given before a model loads, exit 2"
)
def test_no_rows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    refused(slimepo(*TRAIN, "data.max_length=3"), 2, "no row of part", "prompt too long")
    Path("pairs.jsonl").write_text("")
    refused(slimepo(*TRAIN), 2, "pairs.jsonl is empty")


@pytest.mark.case(21, "pairs whose two prompts differ are refused, with their row: exit 2")
def test_prompts_of_the_answers_differ(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    answer = {"role": "assistant", "content": "x"}
    change(
        7,
        prompt=None,
        chosen=[{"role": "user", "content": "a"}, answer],
        rejected=[{"role": "user", "content": "b"}, answer],
    )
    refused(slimepo(*TRAIN), 2, "pairs.jsonl:7")


@pytest.mark.case(
    21,
    "without a chat template contents are joined as plain text, and an end token equal to padding is trained on",
)
def test_no_chat_template(here: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    assert tokenizer.pad_token == tokenizer.eos_token
    tokenizer.chat_template = None
    tokenizer.save_pretrained("plain")
    done = slimepo("data", "check", "pairs.jsonl", "--model", "plain", "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "<end>" in done.stdout
    assert "no chat template" in done.stdout


def bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    ["a: " + "[" * 5000, "a: " + "9" * 5000, bomb(), "a: &a [*a]", "a: 2024-13-45", "x" * 2_000_000,
     "a: !!python/name:os.x"],
    ids=["deep", "digits", "bomb", "itself", "date", "long", "tag"],
)  # fmt: skip
def test_text_that_is_no_recipe(here: Path, text: str) -> None:
    Path("recipe.yaml").write_text(text)
    refused(slimepo("run", "recipe.yaml"), 2, "recipe recipe.yaml:")


@pytest.mark.parametrize(
    "size",
    ["num_hidden_layers=-1", "num_hidden_layers=100000", "hidden_size=0", "hidden_size=text", "hidden_size=1e9",
     "num_attention_heads=3", "num_key_value_heads=0", "head_dim=7", "vocab_size=-5", "rms_norm_eps=nan",
     "initializer_range=-1", "hidden_act=nope", "pad_token_id=1000000", "rope_parameters=5", "num_hidden_layers=true"],
)  # fmt: skip
def test_sizes_that_no_model_has(here: Path, size: str) -> None:
    model = {"init": "random", "architecture": "llama", "hidden_size": 16, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    write_yaml(
        Path("recipe.yaml"),
        {**read_yaml("recipe.yaml"), "model": model, "tokenizer": "model", "adapter": None},
    )
    refused(slimepo("plan", "recipe.yaml", f"model.{size}"), 2, "model")
    refused(slimepo("run", "recipe.yaml", f"model.{size}"), 2, "model")


def test_a_model_too_large_for_the_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimepo.model.sizes.memory", lambda: 1000)
    model = {"init": "random", "architecture": "llama", "hidden_size": 16, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    write_yaml(
        Path("recipe.yaml"),
        {**read_yaml("recipe.yaml"), "model": model, "tokenizer": "model", "adapter": None},
    )
    refused(slimepo("run", "recipe.yaml"), 5, "GiB of memory")


@pytest.mark.parametrize(
    ("argument", "words"),
    [("max_grad_norm=-1", "a number from 0"), ("warmup_steps=-5", "a number from 0"),
     ("weight_decay=.nan", "a number from 0"), ("optim_args=5", "valid string"),
     ("lr_scheduler_kwargs=5", "valid dict"), ("label_names=5", "valid list"),
     ("dataloader_num_workers=-1", "a number from 0"), ("data_seed=1e30", "")],
)  # fmt: skip
def test_arguments_of_wrong_type_or_range(
    here: Path, monkeypatch: pytest.MonkeyPatch, argument: str, words: str
) -> None:
    no_model(monkeypatch)
    name = argument.partition("=")[0]
    refused(slimepo("run", "recipe.yaml", "--out", "out", f"stages.slime.args.{argument}"), 2, name, words)


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "eval", "a/b", "..", "a\x00b", "é" * 100, "status.json", "world"]
)
def test_names_that_no_stage_can_have(here: Path, name: str) -> None:
    recipe = read_yaml("recipe.yaml")
    recipe["stages"][0]["name"] = name
    write_yaml(Path("recipe.yaml"), recipe)
    refused(slimepo("plan", "recipe.yaml"), 2, "cannot be a stage's name")


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ range(10**9) }}",
     "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ 1 / 0 }}"],
    ids=["loop", "range", "recursion", "zero"],
)  # fmt: skip
def test_templates_that_fail_or_never_end(here: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr("slimepo.data.render.SECONDS", 0.5)
    Path("t.jinja").write_text(template)
    refused(
        slimepo("data", "check", "pairs.jsonl", "--model", "model", "--chat-template", "t.jinja"),
        2,
        "template",
    )


def damaged(change: Callable[[Any], Any], file: str) -> None:
    path = Path(file)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("file", "change"),
    [("config.json", lambda _: []), ("config.json", lambda c: c | {"hidden_size": "x"}),
     ("tokenizer.json", lambda _: {}), ("config.json", lambda c: c | {"num_hidden_layers": 100_000}),
     ("tokenizer_config.json", lambda _: [])],
)  # fmt: skip
def test_a_model_folder_with_damaged_files(here: Path, file: str, change: Callable[[Any], Any]) -> None:
    damaged(change, f"model/{file}")
    done = slimepo("run", "recipe.yaml", "--out", "out")
    refused(done, done.returncode, "model")
    assert done.returncode in (2, 3)


def test_a_run_folder_with_damaged_files(here: Path) -> None:
    damaged(lambda _: [], "run/slime/stage.json")
    refused(slimepo("run", "run/recipe.yaml", "--out", "run"), 3, "stage.json is damaged; delete")


@pytest.mark.parametrize(
    "option", ["--temperature=nan", "--seed=99999999999999999999", "--top-p=2", "--prompts=model"]
)
def test_generate_with_odd_values(here: Path, option: str) -> None:
    refused(slimepo("generate", "--model", "model", option), 2)


def test_wrong_options_and_no_command() -> None:
    refused(slimepo("run", "--unknown"), 2, "--unknown", "slimepo run --help")
    refused(slimepo("eval", "mt-bench"), 2, "slimepo eval mt-bench --help")
    assert slimepo().returncode == 0
    assert "Usage" in slimepo().stdout


def test_an_error_that_nobody_foresaw_is_one_line_and_debug_shows_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("hidden")

    monkeypatch.setattr("slimepo.pipeline.recipe.read.load_recipe", broken)
    refused(slimepo("plan", "recipe.yaml"), 1, "KeyError: 'hidden'", "--debug shows the traceback")
    shown = slimepo("plan", "recipe.yaml", "--debug")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("error: KeyError")


def test_input_errors_keep_their_code_when_debugged() -> None:
    assert issubclass(InputError, ValueError)
    assert slimepo("--debug", "run", "absent.yaml").returncode == 2
