"""A model's answers on disk: upstream's format, and never two models' or two settings' in one file."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from slimepo.errors import InputError
from slimepo.evaluation.answers import OURS
from slimepo.evaluation.benchmarks import mt_bench
from slimepo.evaluation.job import Job
from slimepo.evaluation.rows import read_rows
from slimepo.evaluation.run import load_benchmark, run_benchmark
from tests.evaluation.conftest import QUESTIONS, one_file, printed


def test_the_answers_file_of_mt_bench_is_fastchats(job: Callable[..., Job], console: Console) -> None:
    this = job("mt-bench")
    run_benchmark(this, console, ["answer"])
    rows = read_rows(this.out / "mt_bench" / "model_answer" / "babyllama-105.jsonl")
    assert [list(row)[:4] for row in rows] == [
        ["question_id", "answer_id", "model_id", "choices"]
    ] * QUESTIONS
    for row in rows:
        assert len(row["choices"][0]["turns"]) == 2
        assert {turn["stop"] for turn in row[OURS]["turns"]} <= {"stop", "length", "context"}
        assert row[OURS]["temperature"] == mt_bench.temperature("writing") == 0.7


def test_alpaca_evals_list_without_our_journal_is_no_answer_of_others(
    job: Callable[..., Job], loads: list[str], console: Console
) -> None:
    this = job("alpaca-eval")
    run_benchmark(this, console, ["answer"])
    folder = this.out / "alpaca_eval" / "babyllama-105"
    (folder / "model_outputs.jsonl").unlink()
    loads.clear()
    run_benchmark(job("alpaca-eval", max_new_tokens=13), console, ["answer"])
    assert len(loads) == 1
    assert read_rows(folder / "model_outputs.jsonl")[0][OURS]["max_new_tokens"] == 13


@pytest.mark.parametrize("benchmark", ["mt-bench", "alpaca-eval"])
def test_answers_of_others_are_neither_replaced_nor_filled_up(
    job: Callable[..., Job], loads: list[str], console: Console, shared_data: Path, benchmark: str
) -> None:
    this = job(benchmark, "theirs")
    if benchmark == "mt-bench":
        path = this.out / "mt_bench" / "model_answer" / "theirs.jsonl"
        rows = [{"question_id": 81, "choices": [{"index": 0, "turns": ["Yes.", "No."]}]}]
        text = json.dumps(rows[0]) + "\n"
    else:
        path = this.out / "alpaca_eval" / "theirs" / "model_outputs.json"
        first = load_benchmark(this.settings, this.out, judged=False).questions[0]
        text = json.dumps([{"instruction": first.id, "output": "Yes.", "generator": "theirs"}])
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError, match="1 of 3 answers are there and were made elsewhere"):
        run_benchmark(this, console)
    assert (path.read_text(), loads) == (text, [])


def test_answers_are_judged_and_scored_with_the_settings_that_made_them(
    job: Callable[..., Job], console: Console
) -> None:
    this = job("mt-bench", "ours")
    run_benchmark(this, console)
    for step in ("judge", "score"):
        with pytest.raises(InputError, match="answered with max_new_tokens 12, now it is 1024"):
            run_benchmark(job("mt-bench", "ours", max_new_tokens=None), console, [step])
    assert one_file(this.out / "scores", "*.json").exists()


def test_a_model_that_is_none_is_named_and_leaves_nothing(
    job: Callable[..., Job], console: Console, tmp_path: Path
) -> None:
    this = job("mt-bench", judge=None)
    (tmp_path / "run" / "sft").mkdir(parents=True)
    for model, words in (
        (tmp_path / "nowhere", "nowhere' cannot be loaded"),
        (tmp_path / "run" / "sft", "sft holds neither a model (config.json) nor an adapter"),
        (tmp_path / "run", f"it is a run: give one of its stages, such as {tmp_path / 'run' / 'sft'}"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            run_benchmark(replace(this, model=str(model)), console)
        (tmp_path / "run" / "sft" / "stage.json").write_text("{}")
    assert not this.out.exists()


def test_where_the_output_is_a_file_each_line_says_something(
    job: Callable[..., Job], console: Console
) -> None:
    run_benchmark(job("mt-bench"), console)
    lines = printed(console).splitlines()
    assert lines[0].startswith("answers: 3 questions")
    assert all(line.strip() for line in lines)
