"""A recipe's `evaluate:` list: checked before training, run after its stages."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimepo.errors import InputError, UnscoredError
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.run import run_recipe
from slimepo.playground.tokenizer import CHAT_TEMPLATE, build_tokenizer
from tests.evaluation.conftest import printed
from tests.evaluation.mock_judge import Fail, MockJudge

HARD = {"benchmark": "arena-hard", "category": "hard_prompt"}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def recipe(tmp_path: Path, data_dir: Path, mock: MockJudge) -> Callable[..., Recipe]:
    """Two stages of one step each, and MT-Bench's first two questions after the ones that are named."""
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": str(i + 3)} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {
        "benchmark": "mt-bench",
        "judge": mock.judge,
        "key_variable": "OPENAI_API_KEY",
        "data_dir": str(data_dir),
        "limit": 2,
        "max_new_tokens": 4,
        "attempts": 1,
    }

    def make(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"init": "random", "architecture": "llama", **SIZES},
            "tokenizer": str(tmp_path / "tokenizer"),
            "data": {"path": str(tmp_path / "pairs.jsonl")},
            "stages": [{"loss": "sft", "max_steps": 1}, {"loss": "slime", "max_steps": 1}],
            "evaluate": [entry | changes],
        }
        return make_recipe(values)

    return make


def test_the_last_stage_is_scored(
    recipe: Callable[..., Recipe], mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    out = tmp_path / "run"
    run_recipe(recipe(), out, console)
    (score,) = (out / "eval" / "scores").glob("*.json")
    assert json.loads(score.read_text())["scores"][0]["model"] == "run-slime"
    assert len(mock.calls) == 4
    # Run again, nothing is trained, answered or asked.
    run_recipe(recipe(), out, console)
    assert len(mock.calls) == 4


def test_restarting_answers_again_but_asks_only_what_is_new(
    recipe: Callable[..., Recipe], mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    out = tmp_path / "run"
    run_recipe(recipe(), out, console)
    answers = out / "eval" / "mt_bench" / "model_answer" / "run-slime.jsonl"
    before = answers.stat().st_mtime_ns
    # As `slimepo report RUN/eval` leaves it.
    (out / "eval" / "report.html").write_text("a page of what is thrown away")
    run_recipe(recipe(), out, console, restart=True)
    assert not (out / "eval" / "report.html").exists()
    assert answers.stat().st_mtime_ns > before
    # The same seed trains the same model, which says the same: every verdict is in the cache.
    assert len(mock.calls) == 4


def test_stages_can_be_named(
    recipe: Callable[..., Recipe], mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    run_recipe(recipe(stages=["sft", "slime"]), tmp_path / "run", console)
    names = {path.name.split("--")[1] for path in (tmp_path / "run" / "eval" / "scores").glob("*.json")}
    assert names == {"run-sft", "run-slime"}
    with pytest.raises(InputError, match="evaluate: there is no stage 'dpo'"):
        recipe(stages=["dpo"])


def test_what_is_missing_shows_before_training(
    recipe: Callable[..., Recipe], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no mt_bench/question\.jsonl"):
        run_recipe(recipe(data_dir=str(tmp_path)), tmp_path / "run", console)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="environment variable OPENAI_API_KEY"):
        run_recipe(recipe(judge="gpt-4"), tmp_path / "run", console)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": ""}, "judge is empty: give a value"),
        ({"judge": "hf:"}, "the judge hf: names no model"),
        ({"judge": "hf:no/where"}, "mt-bench: model 'no/where' cannot be loaded"),
        ({"judge": "hf:EMPTY"}, "empty holds neither a model (config.json) nor an adapter"),
        ({"judge": "hf:WEIGHTLESS"}, "weightless: no weights in"),
        ({"judge": "hf:RUN/slime", "stages": ["sft", "slime"]}, "run/slime' cannot be loaded"),
        ({"judge": "m@localhost:8000/v1"}, "an endpoint's URL begins with http:// or https://"),
        ({"judge": "m@http://localhost:8000/v1", "key_variable": "NO_KEY"}, "environment variable NO_KEY"),
        ({"model_key_variable": "KEY"}, "model_key_variable is for a model behind an endpoint"),
        ({"system": "Be brief."}, "the playground knows the roles user and assistant, not system"),
        ({"judge": "hf:SYSTEMLESS"}, "the playground knows the roles user and assistant, not system"),
        ({"baseline": "nobody", **HARD}, "--baseline nobody: neither a file nor a model with answers in"),
        ({"baseline": "run-sft", "stages": ["sft"], **HARD}, "--baseline run-sft: neither"),
        ({"baseline": "PAIRS", **HARD}, "its rows must name one model"),
    ],
)
def test_a_judge_or_baseline_that_is_none_shows_before_training(
    recipe: Callable[..., Recipe], tmp_path: Path, console: Console, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    build_tokenizer().save_pretrained(tmp_path / "weightless")
    (tmp_path / "weightless" / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(tmp_path / "weightless", tmp_path / "systemless")
    (tmp_path / "systemless" / "model.safetensors").write_bytes(b"")
    places = {
        "SYSTEMLESS": "systemless",
        "EMPTY": "empty",
        "WEIGHTLESS": "weightless",
        "RUN": "run",
        "PAIRS": "pairs.jsonl",
    }
    for name, place in places.items():
        for key in ("judge", "baseline"):
            if key in changes:
                changes = {**changes, key: changes[key].replace(name, str(tmp_path / place))}
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        run_recipe(recipe(**changes), tmp_path / "run", console)
    assert "evaluate" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_judges_file_shows_before_training_also_where_the_baseline_is_ones_own(
    recipe: Callable[..., Recipe], tmp_path: Path, console: Console, data_dir: Path
) -> None:
    folder = tmp_path / "data" / "arena_hard" / "v2.0"
    folder.mkdir(parents=True)
    shutil.copy(data_dir / "arena_hard" / "v2.0" / "question.jsonl", folder)
    made = recipe(baseline="run-sft", data_dir=str(tmp_path / "data"), **HARD)
    answers = made.evaluate[0].model_copy(update={"judge": None, "baseline": None, "stages": ["sft"]})
    made = made.model_copy(update={"evaluate": [answers, *made.evaluate]})
    with pytest.raises(InputError, match=r"arena-hard: .*no arena_hard/config/judge_utils\.py"):
        run_recipe(made, tmp_path / "run", console)


def test_a_stage_of_the_run_may_be_the_baseline_and_the_judge(
    recipe: Callable[..., Recipe], mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    own_judge = recipe(baseline="run-sft", judge=f"hf:{tmp_path / 'run' / 'sft'}", max_unscored=1, **HARD)
    mocked = recipe(baseline="run-sft", max_unscored=1, **HARD)
    answers = mocked.evaluate[0].model_copy(update={"judge": None, "baseline": None, "stages": ["sft"]})
    made = mocked.model_copy(update={"evaluate": [answers, *mocked.evaluate, *own_judge.evaluate]})
    # A judge is given a system message, which the world's own template refuses.
    with pytest.raises(InputError, match="not system"):
        run_recipe(made, tmp_path / "run", console)
    assert not (tmp_path / "run").exists()
    template = tmp_path / "any-role.jinja"
    template.write_text(CHAT_TEMPLATE.replace("message['role'] == 'user'", "message['role'] != 'assistant'"))
    made = made.model_copy(update={"chat_template": str(template)})
    # Both were found; this judge's context holds no such prompt.
    with pytest.raises(UnscoredError, match=r"hf:run-sft@\w+: the prompt of \d+ tokens fills its context"):
        run_recipe(made, tmp_path / "run", console)
    scored = [json.loads(path.read_text()) for path in (tmp_path / "run" / "eval" / "scores").iterdir()]
    assert {score["scores"][0]["identity"]["baseline"] for score in scored} == {"run-sft"}
    assert mock.calls


@pytest.mark.parametrize(
    ("library", "changes", "words"),
    [
        ("openai", {}, "needs the openai library, which is not installed: pip install 'slimepo[eval]'"),
        ("sklearn", {"benchmark": "alpaca-eval", "limit": None}, "needs scikit-learn"),
        ("langdetect", {"benchmark": "ifeval", "judge": None, "key_variable": None}, "slimepo[ifeval]"),
        ("tiktoken", {"benchmark": "arena-hard", "style_control": True}, "pip install tiktoken"),
        ("vllm", {"backend": "vllm"}, "pip install vllm"),
    ],
)
def test_a_missing_library_shows_before_training(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=re.escape(words)):
        run_recipe(recipe(**changes), tmp_path / "run", console)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_fails_does_not_stop_the_training(
    recipe: Callable[..., Recipe], mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.script += [Fail(401, "no such key")] * 8
    with pytest.raises(InputError, match="no such key"):
        run_recipe(recipe(stages=["sft"]), tmp_path / "run", console)
    assert (tmp_path / "run" / "slime" / "stage.json").exists()
    assert "sft: mt-bench failed: the judge refuses" in printed(console)


def test_no_error_of_a_benchmark_stops_the_stages_that_follow(
    recipe: Callable[..., Recipe], tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("out of the blue")

    monkeypatch.setattr("slimepo.evaluation.run.run_benchmark", fail)
    with pytest.raises(ZeroDivisionError):
        run_recipe(recipe(stages=["sft"]), tmp_path / "run", console)
    assert (tmp_path / "run" / "slime" / "stage.json").exists()
    assert "sft: mt-bench failed: ZeroDivisionError('out of the blue')" in printed(console)


def test_another_judge_after_training_judges_what_is_there(
    recipe: Callable[..., Recipe], mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    out = tmp_path / "run"
    run_recipe(recipe(), out, console)
    trained = (out / "slime" / "stage.json").stat().st_mtime_ns
    run_recipe(recipe(judge=f"other@{mock.url}"), out, console)
    assert (out / "slime" / "stage.json").stat().st_mtime_ns == trained
    assert [call["model"] for call in mock.calls] == ["mock"] * 4 + ["other"] * 4
    assert len(list((out / "eval" / "scores").glob("*.json"))) == 2
    assert "other@" in (out / "recipe.yaml").read_text()


def test_a_stage_that_is_its_own_baseline_shows_before_training(
    recipe: Callable[..., Recipe], tmp_path: Path, console: Console
) -> None:
    made = recipe(**HARD, baseline="run-sft", stages=["sft", "slime"])
    answers = made.evaluate[0].model_copy(update={"judge": None, "baseline": None, "stages": ["sft"]})
    made = made.model_copy(update={"evaluate": [answers, *made.evaluate]})
    with pytest.raises(InputError, match="run-sft is its own baseline"):
        run_recipe(made, tmp_path / "run", console)
    assert not (tmp_path / "run").exists()


def test_a_smoke_run_asks_no_judge(
    recipe: Callable[..., Recipe], mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    smoke = recipe().model_copy(update={"smoke": True})
    run_recipe(smoke, tmp_path / "run", console)
    assert mock.calls == []
    assert "evaluate is left out (a smoke run)" in printed(console)
