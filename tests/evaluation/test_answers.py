"""Answers to a benchmark: in its format, resumable, and the same wherever a run was interrupted."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimepo.errors import InputError
from slimepo.evaluation.answerers import Ask, Turn
from slimepo.evaluation.answers import (
    OURS,
    Question,
    answer_questions,
    facts,
    question_seed,
    summary_line,
)
from slimepo.evaluation.benchmarks import mt_bench

QUESTIONS = [
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

    def answer(self, asks: Sequence[Ask], advance: Callable[[int], None]) -> list[Turn]:
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


def row_of(question: Question, turns: Sequence[Turn], how: Mapping[str, Any]) -> dict[str, Any]:
    ours = {OURS: facts(question, turns, how)}
    texts = [turn.text for turn in turns]
    return mt_bench.answer_row(question.row, texts, "parrot", answer_id="x", tstamp=0.0, **ours)


def answered(path: Path, parrot: Parrot, console: Console, **options: Any) -> list[dict[str, Any]]:
    return answer_questions(
        QUESTIONS, parrot, path, row_of, lambda row: str(row["question_id"]), console, **options
    )


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
    assert rows == [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]


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
    assert path.read_text() == "".join(lines)


def test_nothing_is_asked_when_all_is_there(tmp_path: Path, console: Console) -> None:
    answered(tmp_path / "a.jsonl", Parrot(), console)
    idle = Parrot()
    answered(tmp_path / "a.jsonl", idle, console)
    assert idle.asked == []


def test_failed_answers_are_not_written_and_paid_ones_not_asked_again(
    tmp_path: Path, console: Console
) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=r"2 answers could not be had \(failed: down\).*run again"):
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
    questions = [Question(q.id, q.row, q.turns, q.temperature, 60) for q in QUESTIONS]
    with pytest.raises(InputError, match="max_new_tokens 50, now it is 60"):
        answer_questions(
            questions, Parrot(), tmp_path / "a.jsonl", row_of, lambda row: str(row["question_id"]), console
        )


def test_seeds_differ_by_question_turn_and_run() -> None:
    seeds = {question_seed(run, question, turn) for run in (0, 1) for question in "abc" for turn in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
