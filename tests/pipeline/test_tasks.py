"""Tasks: their files, their checkers, and the figures of answers, worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.tasks import Answer, Task, load_tasks, longest_run, loops, measure, read_tasks
from slimepo.types import Verdict


def task(family: str, gold: str | None) -> Task:
    row = {"family": family} | ({} if gold is None else {"answer": gold})
    return Task(family, [{"role": "user", "content": "?"}], row)


def answer(text: str, correct: bool, valid: bool, finished: bool = True) -> Answer:
    return Answer(text, finished, len(text), Verdict(correct, valid))


RIGHT, SLIP, BROKEN = answer("5", True, True), answer("6", False, True), answer("five", False, False)


def test_figures_are_shares_of_the_tasks() -> None:
    tasks = [task("add", "5"), task("add", "5"), task("sort", "5"), task("sort", "5")]
    assert measure(tasks, [RIGHT, SLIP, RIGHT, BROKEN]) == {
        "exact_match": 0.5,
        "format_valid": 0.75,
        "end_rate": 1.0,
        "repetition": 0.0,
        "exact_match/add": 0.5,
        "exact_match/sort": 0.5,
    }


def test_an_unfinished_answer_is_neither_right_nor_valid() -> None:
    figures = measure([task("add", "5")], [answer("5", True, True, finished=False)])
    assert figures["exact_match"] == figures["format_valid"] == figures["end_rate"] == 0.0


def test_a_looping_answer_counts_as_repetition_where_right_answers_are_known() -> None:
    looping = answer("5, 5, 5, 5, 5", False, False)
    assert measure([task("add", "5")] * 2, [looping, RIGHT])["repetition"] == 0.5
    assert "repetition" not in measure([task("", None)], [looping])


@pytest.mark.parametrize(
    ("text", "copies"),
    [("", 0), ("a", 1), ("ab", 1), ("aa", 2), ("xababab", 3), ("aabaab", 2), ("1111", 4), ("ko-ko-ko", 2)],
)
def test_the_longest_run_of_one_block(text: str, copies: int) -> None:
    assert longest_run(text) == copies


@given(block=st.text("abc", min_size=1, max_size=12), copies=st.integers(1, 6))
def test_a_repeated_block_runs_at_least_as_often_as_it_was_repeated(block: str, copies: int) -> None:
    assert longest_run(block * copies) >= copies


@given(text=st.text("abc 1", max_size=40))
def test_a_right_answer_never_loops(text: str) -> None:
    assert not loops(text, gold=text)


def test_a_right_answer_that_repeats_allows_as_much_and_a_little_more() -> None:
    gold = "ko-ko-ko-ko"
    assert not loops("ko-ko-ko-ko-ko", gold)
    assert loops("-".join(["ko"] * 7), gold)


def test_a_row_has_a_prompt_as_text_or_messages_and_an_id_or_its_place(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rows = [{"id": "a", "prompt": "Add 2 and 3.", "answer": 5}, {"prompt": turns}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_tasks(str(tmp_path / "tasks.jsonl"))
    assert (first.id, first.gold, first.prompt) == ("a", "5", [{"role": "user", "content": "Add 2 and 3."}])
    assert (second.id, second.gold, second.prompt) == (f"{tmp_path}/tasks.jsonl:2", None, turns)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"answer": "b"}\n', r"tasks\.jsonl:2: a task needs a prompt"),
        ('{"prompt": [{"role": "user"}]}\n', r"tasks\.jsonl:1: a task needs .* turn 1 of 'prompt' must have"),
        ('{"prompt": []}\n', "is an empty list"),
        ("\n\n", "there is no row in"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "another task has the id '1' too"),
        ("{broken\n", r"tasks\.jsonl:1: "),
        (None, "there is no file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "tasks.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        read_tasks(str(tmp_path / "tasks.jsonl"))


def recipe(folder: Path, checker: str, **changes: Any) -> Any:
    (folder / "tasks-3.jsonl").write_text('{"prompt": "Add 2 and 3.", "answer": "5"}\n')
    tasks = {"heldout": f"{folder}/tasks-{{seed}}.jsonl", "checker": checker}
    values = {"model": "M", "data": {"path": "pairs.jsonl"}, "stages": [{"loss": "slime"}], "seed": 3}
    return make_recipe(values | {"tasks": tasks} | changes)


def test_a_checker_of_ones_own_gives_a_verdict_or_a_bool(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from slimepo import Verdict\n"
        "def strict(row, answer):\n    return answer == row['answer']\n"
        "def lenient(row, answer):\n    return Verdict(answer == row['answer'], answer.isdigit())\n"
    )
    told = {}
    for name in ("strict", "lenient"):
        tasks = load_tasks(recipe(tmp_path, f"{tmp_path}/own.py:{name}"))
        assert tasks is not None
        told[name] = [tasks.check(tasks.heldout[0], text) for text in ("5", "6")]
    assert told["strict"] == [Verdict(True, True), Verdict(False, False)]
    assert told["lenient"] == [Verdict(True, True), Verdict(False, True)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 0.5", r"must return a bool or a slimepo\.Verdict, not 0\.5"),
        ("return row['nowhere']", r"fails on task .*tasks-3\.jsonl:1: KeyError: 'nowhere'"),
        ("return (", "cannot be imported: SyntaxError"),
    ],
)
def test_a_checker_that_fails_is_named_before_a_model_is_loaded(
    tmp_path: Path, body: str, words: str
) -> None:
    (tmp_path / "own.py").write_text(f"def check(row, answer):\n    {body}\n")
    with pytest.raises(InputError, match=words):
        load_tasks(recipe(tmp_path, f"{tmp_path}/own.py:check"))
