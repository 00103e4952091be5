"""What the judge is asked and what is written of it: upstream's files, the canaries apart."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from slimepo.errors import UnscoredError
from slimepo.evaluation.job import Job
from slimepo.evaluation.rows import read_rows
from slimepo.evaluation.run import load_benchmark, run_benchmark
from tests.evaluation.conftest import QUESTIONS, one_file, printed
from tests.evaluation.mock_judge import MockJudge, Say


def test_the_judgments_of_mt_bench_are_fastchats(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("mt-bench")
    run_benchmark(this, console)
    run_benchmark(job("mt-bench", "other"), console)
    rows = read_rows(one_file(this.out / "mt_bench" / "model_judgment", "*_single.jsonl"))
    # One file a judge, with all its models; a model's rows stand there once.
    assert [row["model"] for row in rows] == ["babyllama-105"] * 6 + ["other"] * 6
    run_benchmark(this, console)
    assert len(read_rows(one_file(this.out / "mt_bench" / "model_judgment", "*_single.jsonl"))) == 12
    assert {call["messages"][0]["role"] for call in mock.calls} == {"system"}
    assert {(call["temperature"], call["max_tokens"]) for call in mock.calls} == {(0.0, 2048)}


def test_v01_asks_once_more_where_there_is_no_verdict(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    mock.script += [
        Say("let me think"),
        *[Say("[[A>B]]"), Say("[[B>A]]")] * 2,
        Say("[[B>A]]"),
        Say("[[A=B]]"),
    ]
    this = job("arena-hard", rules="v0.1", concurrency=1)
    run_benchmark(this, console)
    assert len(mock.calls) == 7
    assert [message["role"] for message in mock.calls[6]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    rows = read_rows(one_file(this.out / "arena-hard-v0.1" / "model_judgment", "*/babyllama-105.jsonl"))
    assert rows[0]["games"][0]["judgment"] == "\nlet me think\n[[A=B]]"


def test_answers_made_elsewhere_are_judged_as_they_are(
    job: Callable[..., Job], mock: MockJudge, loads: list[str], console: Console, shared_data: Path
) -> None:
    this = job("mt-bench", "llama2_7b", limit=None, max_new_tokens=None)
    folder = this.out / "mt_bench" / "model_answer"
    folder.mkdir(parents=True)
    given = read_rows(shared_data / "eval" / "mt_bench" / "model_answer" / "llama2_7b.jsonl.gz")
    (folder / "llama2_7b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    (scores,) = run_benchmark(this, console)
    assert (scores.scored, len(mock.calls), loads) == (160, 160, [])
    assert scores.official
    # The prompts that went over the wire are those of the published judgments.
    published = read_rows(shared_data / "eval" / "mt_bench" / "judgments" / "gpt-4_single.jsonl.gz")
    recorded = {row["user_prompt"] for row in published if row["model"] == "llama2_7b"}
    assert {call["messages"][-1]["content"] for call in mock.calls} == recorded


def test_a_local_model_judges_greedily(
    job: Callable[..., Job], mock: MockJudge, console: Console, shared_data: Path
) -> None:
    # Its context is far too small for these prompts: every item is unscored and says so.
    this = job("alpaca-eval", judge=f"hf:{shared_data / 'models' / 'babyllama-105'}", limit=2)
    with pytest.raises(UnscoredError):
        run_benchmark(this, console)
    (annotations,) = (this.out / "alpaca_eval" / "babyllama-105").glob("hf-babyllama-105@*/annotations.json")
    assert "fills its context" in json.loads(annotations.read_text())[0]["unscored"]
    assert mock.calls == []


def test_the_baseline_itself_needs_no_judge(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("alpaca-eval", "gpt4_1106_preview")
    path = this.out / "alpaca_eval" / "gpt4_1106_preview" / "model_outputs.json"
    path.parent.mkdir(parents=True)
    kind = load_benchmark(this.settings, this.out, judged=False)
    path.write_text(json.dumps([dict(question.row) for question in kind.questions]))
    (scores,) = run_benchmark(this, console)
    assert (scores.measures["win_rate"].value, mock.calls) == (50.0, [])


def test_canaries_are_judged_apart_and_reported(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("mt-bench", canaries=True)
    (scores,) = run_benchmark(this, console)
    assert len(mock.calls) == 2 * QUESTIONS * 4
    record = json.loads(one_file(this.out / "scores", "*.json").read_text())
    assert set(record["canaries"]) == {"canary-null", "canary-order", "canary-forged"}
    assert all(result["scored"] == 6 and 1 <= result["mean"] <= 10 for result in record["canaries"].values())
    assert "canary-null: " in printed(console)
    official = read_rows(one_file(this.out / "mt_bench" / "model_judgment", "*.jsonl"))
    assert {row["model"] for row in official} == {"babyllama-105"}
    assert scores.scored == 6
