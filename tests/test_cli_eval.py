"""`slimepo eval` from outside: exit codes, one-line errors, and no key anywhere."""

import json
from pathlib import Path

import pytest
from typer.main import get_command

from slimepo.cli_eval import app
from slimepo.evaluation.settings import Evaluation
from tests.command import Done, slimepo
from tests.evaluation.mock_judge import KEY, Fail, MockJudge, Say


@pytest.fixture
def answered(tmp_path: Path, data_dir: Path) -> list[object]:
    """The arguments of a run whose answers were made elsewhere, so that no model is loaded."""
    questions = (data_dir / "mt_bench" / "question.jsonl").read_text().splitlines()[:2]
    folder = tmp_path / "out" / "mt_bench" / "model_answer"
    folder.mkdir(parents=True)
    rows = [
        {"question_id": json.loads(q)["question_id"], "choices": [{"index": 0, "turns": ["Yes.", "No."]}]}
        for q in questions
    ]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--model",
        "given",
        "--data-dir",
        data_dir,
        "--out",
        tmp_path / "out",
        "--limit",
        2,
        "--attempts",
        1,
        "--key-variable",
        "OPENAI_API_KEY",
    ]


def no_key(result: Done, folder: Path) -> None:
    assert KEY not in result.stdout + result.stderr
    assert not any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_whole_run_and_its_price(mock: MockJudge, answered: list[object], tmp_path: Path) -> None:
    result = slimepo(
        "eval", "mt-bench", *answered, "--judge", mock.judge, "--price-prompt", 1, "--price-completion", 2
    )
    assert result.returncode == 0, result.stderr
    assert "judge: 4 calls, 0 from the cache" in result.stdout
    assert "$" in result.stdout
    assert "overall" in result.stdout
    assert len(mock.calls) == 4
    no_key(result, tmp_path)


def test_exit_code_6_when_too_much_is_unscored(
    mock: MockJudge, answered: list[object], tmp_path: Path
) -> None:
    mock.script += [Say("no verdict from me"), Fail(500, "key {key}")]
    result = slimepo("eval", "mt-bench", *answered, "--judge", mock.judge, "--concurrency", 1)
    assert result.returncode == 6
    assert "2 of 4 items of given have no score (limit 5%)" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    no_key(result, tmp_path)


@pytest.mark.parametrize("debug", [False, True])
def test_a_wrong_key_is_exit_code_2_without_the_key(
    mock: MockJudge, answered: list[object], tmp_path: Path, debug: bool
) -> None:
    mock.script += [Fail(401, "Incorrect API key provided: {key}")] * 20
    start = ["--debug", "eval"] if debug else ["eval"]
    result = slimepo(*start, "mt-bench", *answered, "--judge", mock.judge)
    assert result.returncode != 0
    assert "HTTP 401" in result.stderr
    if not debug:
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
    no_key(result, tmp_path)


def test_a_dry_run_makes_no_call(mock: MockJudge, answered: list[object]) -> None:
    result = slimepo("eval", "mt-bench", "judge", *answered, "--judge", mock.judge, "--dry-run", "--canaries")
    assert result.returncode == 0, result.stderr
    assert "judge: 16 calls, 16 to make" in result.stdout
    assert mock.calls == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mt-bench", "--rules", "v0.1"], "rules is an option of arena-hard only"),
        (["mt-bench", "jugde"], "unknown step 'jugde'"),
        (["arena-hard", "--rules", "v9"], "eval arena-hard: rules"),
        (
            ["alpaca-eval", "--judge", "m@http://u:p@h/v1", "--data-dir", "DATA"],
            "without user, password or query",
        ),
        (["mt-bench", "--data-dir", "/nowhere"], "--data-dir /nowhere: no such folder"),
        (["mt-bench", "--data-dir", "/"], "no mt_bench/question.jsonl in it"),
        (
            ["arena-hard", "--category", "hard", "--data-dir", "DATA"],
            "no category 'hard'; it has hard_prompt, creative_writing",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: str, tmp_path: Path, data_dir: Path) -> None:
    given = [str(data_dir) if a == "DATA" else a for a in arguments]
    result = slimepo("eval", *given, "--model", "m", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("benchmark", ["mt-bench", "arena-hard", "alpaca-eval"])
def test_every_setting_is_an_option_with_its_own_help_and_default(benchmark: str) -> None:
    options = {option.name: option for option in get_command(app).commands[benchmark].params}
    settings = {name: field for name, field in Evaluation.model_fields.items() if name in options}
    assert set(Evaluation.model_fields) - set(settings) == {"benchmark", "stages"}
    assert set(options) - set(settings) == {"steps", "model", "out", "name", "dry_run"}
    for name, field in settings.items():
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
        assert options[name].default == field.default
        assert field.description
        assert options[name].help.startswith(field.description)


def test_help_shows_choices_and_defaults_and_no_option_of_another_benchmark() -> None:
    text = " ".join(slimepo("eval", "mt-bench", "--help").stdout.replace("│", " ").split())
    assert "What runs a local model. (one of auto, hf, vllm; default: auto)" in text
    assert "Seed of sampled answers. (default: 0)" in text
    assert "--references" in text
    assert not any(option in text for option in ("--rules", "--category", "--style-control", "--baseline"))


def test_an_option_on_the_command_line_counts(answered: list[object]) -> None:
    result = slimepo(
        "eval", "mt-bench", *answered[:-2], "--name", "new", "--dry-run", "--max-new-tokens", 7, "--limit", 3
    )
    assert "answers: 3 questions, 3 to answer in 6 turns, at most 42 tokens" in result.stdout
