"""Answers to a benchmark: in its format, the same wherever a run was interrupted, never of two models in one file."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimepo.errors import InputError
from slimepo.evaluation.answerers import Ask, Turn
from slimepo.evaluation.answers import answer_questions, question_seed, summary_line
from slimepo.evaluation.benchmarks import mt_bench
from slimepo.evaluation.benchmarks.base import OURS, Benchmark, Question
from slimepo.evaluation.job import Job
from slimepo.evaluation.rows import read_rows
from slimepo.evaluation.run import load_benchmark, run_benchmark
from tests.evaluation.conftest import QUESTIONS, one_file, printed

ASKED = [
    Question(str(n), {"question_id": n}, [f"first {n}", f"second {n}"], 0.7 if n % 2 else 0.0, 50)
    for n in range(7)
]


class Parrot:
    """Repeats its last message and seed; fails where it is told to, or stops after so many answers."""

    def __init__(
        self, chunk: int = 3, backend: str = "transformers", fails: Sequence[str] = (), stops: int = 99
    ):
        self.chunk, self.fails, self.stops = chunk, fails, stops
        self.identity = {"backend": backend, "weights": "abc"}
        self.asked: list[Ask] = []

    def answer(self, asks: Sequence[Ask]) -> list[Turn]:
        self.asked += [Ask(list(ask.messages), ask.temperature, ask.max_new_tokens, ask.seed) for ask in asks]
        if len(self.asked) > self.stops:
            raise KeyboardInterrupt
        texts = [ask.messages[-1]["content"] for ask in asks]
        return [
            Turn("", None, "failed: down")
            if text in self.fails
            else Turn(f"{text}! {ask.seed}", 5, "stop", 9)
            for text, ask in zip(texts, asks, strict=True)
        ]


TOY = Benchmark("toy", ASKED, (), mt_bench.answer_row, id_of=lambda row: str(row["question_id"]))


def answered(
    path: Path, parrot: Parrot, console: Console, benchmark: Benchmark = TOY, **options: Any
) -> list[dict[str, Any]]:
    rows = answer_questions(benchmark, "parrot", parrot, path, console, **options)
    return [{key: value for key, value in row.items() if key != "tstamp"} for row in rows]


def test_second_turns_follow_first_answers(tmp_path: Path, console: Console) -> None:
    parrot = Parrot()
    rows = answered(tmp_path / "a.jsonl", parrot, console, system="Be brief.")
    seeds = [question_seed(0, "2", turn) for turn in (0, 1)]
    second = next(ask for ask in parrot.asked if ask.messages[-1]["content"] == "second 2")
    assert second.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first 2"},
        {"role": "assistant", "content": f"first 2! {seeds[0]}"},
        {"role": "user", "content": "second 2"},
    ]
    assert rows[2]["choices"] == [{"index": 0, "turns": [f"first 2! {seeds[0]}", f"second 2! {seeds[1]}"]}]
    assert [row | {"tstamp": 0} for row in rows] == [
        json.loads(line) | {"tstamp": 0} for line in (tmp_path / "a.jsonl").read_text().splitlines()
    ]


def test_every_row_says_how_it_was_made(tmp_path: Path, console: Console) -> None:
    rows = answered(tmp_path / "a.jsonl", Parrot(), console, seed=4)
    assert rows[1][OURS] == {
        "turns": [{"tokens": 5, "prompt_tokens": 9, "stop": "stop"}] * 2,
        "temperature": 0.7,
        "max_new_tokens": 50,
        "backend": "transformers",
        "weights": "abc",
        "system": None,
        "seed": 4,
    }
    assert summary_line(rows) == "answers: 7 questions, ended by: 14 stop, 5 tokens on average"


@pytest.mark.parametrize("stops", [0, 5, 6, 11])
def test_an_interrupted_run_ends_in_the_same_rows(tmp_path: Path, console: Console, stops: int) -> None:
    whole = answered(tmp_path / "whole.jsonl", Parrot(), console)
    path = tmp_path / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answered(path, Parrot(stops=stops), console)
    rest = Parrot()
    assert answered(path, rest, console) == whole
    # Chunks of three with two turns: what was finished is not asked again.
    assert len(rest.asked) == 14 - 6 * (stops // 6)


def test_a_cut_chunk_is_answered_as_a_whole_but_written_once(tmp_path: Path, console: Console) -> None:
    path = tmp_path / "a.jsonl"
    whole = answered(path, Parrot(), console)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:25])
    again = Parrot()
    assert answered(path, again, console) == whole
    assert [ask.messages[-1]["content"] for ask in again.asked[:3]] == ["first 3", "first 4", "first 5"]
    assert path.read_text().startswith("".join(lines[:4]))
    assert len(path.read_text().splitlines()) == 7


def test_nothing_is_asked_when_all_is_there(tmp_path: Path, console: Console) -> None:
    answered(tmp_path / "a.jsonl", Parrot(), console)
    idle = Parrot()
    answered(tmp_path / "a.jsonl", idle, console)
    assert idle.asked == []


def test_failed_answers_are_not_written_and_paid_ones_not_asked_again(
    tmp_path: Path, console: Console
) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=r"2 answers could not be had: down \(2\).*run again"):
        answered(path, Parrot(backend="endpoint", fails=("first 1", "second 5")), console)
    assert len(path.read_text().splitlines()) == 5
    rest = Parrot(backend="endpoint")
    rows = answered(path, rest, console)
    assert [row["question_id"] for row in rows] == list(range(7))
    assert len(rest.asked) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "made with seed 0, now it is 1"),
        ({"system": "x"}, "made with system None, now it is 'x'"),
    ],
)
def test_answers_made_in_another_way_are_not_mixed(
    tmp_path: Path, console: Console, change: dict[str, Any], words: str
) -> None:
    answered(tmp_path / "a.jsonl", Parrot(), console)
    with pytest.raises(InputError, match=words):
        answered(tmp_path / "a.jsonl", Parrot(), console, **change)


def test_another_model_under_the_same_name_is_refused(tmp_path: Path, console: Console) -> None:
    answered(tmp_path / "a.jsonl", Parrot(), console)
    other = Parrot()
    other.identity["weights"] = "def"
    with pytest.raises(InputError, match="made with weights 'abc', now it is 'def'"):
        answered(tmp_path / "a.jsonl", other, console)


def test_another_limit_is_refused(tmp_path: Path, console: Console) -> None:
    answered(tmp_path / "a.jsonl", Parrot(), console)
    more = replace(TOY, questions=[replace(question, max_new_tokens=60) for question in ASKED])
    with pytest.raises(InputError, match="max_new_tokens 50, now it is 60"):
        answered(tmp_path / "a.jsonl", Parrot(), console, more)


def test_seeds_differ_by_question_turn_and_run() -> None:
    seeds = {question_seed(run, question, turn) for run in (0, 1) for question in "abc" for turn in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_answers_file_of_mt_bench_is_fastchats(job: Callable[..., Job], console: Console) -> None:
    this = job("mt-bench")
    run_benchmark(this, console, ["answer"])
    rows = read_rows(this.out / "mt_bench" / "model_answer" / "tiny-llama.jsonl")
    assert [list(row)[:4] for row in rows] == [
        ["question_id", "answer_id", "model_id", "choices"]
    ] * QUESTIONS
    for row in rows:
        assert len(row["choices"][0]["turns"]) == 2
        assert {turn["stop"] for turn in row[OURS]["turns"]} <= {"stop", "length", "context"}
        assert row[OURS]["temperature"] == mt_bench.TEMPERATURES["writing"] == 0.7


def test_alpaca_evals_list_without_our_journal_is_no_answer_of_others(
    job: Callable[..., Job], loads: list[str], console: Console
) -> None:
    this = job("alpaca-eval")
    run_benchmark(this, console, ["answer"])
    folder = this.out / "alpaca_eval" / "tiny-llama"
    (folder / "model_outputs.jsonl").unlink()
    loads.clear()
    run_benchmark(job("alpaca-eval", max_new_tokens=13), console, ["answer"])
    assert len(loads) == 1
    assert read_rows(folder / "model_outputs.jsonl")[0][OURS]["max_new_tokens"] == 13


@pytest.mark.parametrize("benchmark", ["mt-bench", "alpaca-eval"])
def test_answers_of_others_are_neither_replaced_nor_filled_up(
    job: Callable[..., Job], loads: list[str], console: Console, benchmark: str
) -> None:
    this = job(benchmark, "theirs")
    if benchmark == "mt-bench":
        path = this.out / "mt_bench" / "model_answer" / "theirs.jsonl"
        rows = [{"question_id": 81, "choices": [{"index": 0, "turns": ["Yes.", "No."]}]}]
        text = json.dumps(rows[0]) + "\n"
    else:
        path = this.out / "alpaca_eval" / "theirs" / "model_outputs.json"
        first = load_benchmark(this.settings, this.out).questions[0]
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
