"""Rows with a list of answers: the best against the worst, by scores or ranks; wrong lists."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimepo.data.columns import renamed
from slimepo.data.messages import MalformedRow
from slimepo.data.read import read_rows
from slimepo.data.winners import Tie
from slimepo.errors import InputError


def pair(row: dict[str, Any], columns: dict[str, str | None] | None = None) -> tuple[Any, ...]:
    """Chosen, rejected and their scores, as a row is read."""
    found = renamed(row, columns or {})
    return tuple(found.get(key) for key in ("chosen", "rejected", "score_chosen", "score_rejected"))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        # UltraFeedback as it was published, before anybody made pairs of it.
        (
            {"instruction": "q", "completions": [
                {"model": "a", "response": "worst", "overall_score": 2.5},
                {"model": "b", "response": "best", "overall_score": 8},
                {"model": "c", "response": "middle", "overall_score": 7.5},
            ]},
            ("best", "worst", 8.0, 2.5),
        ),
        # Nectar's ranks: 1 is the best, and a rank is no reward.
        (
            {"prompt": "q", "answers": [{"answer": "third", "rank": 3.0}, {"answer": "first", "rank": 1.0}]},
            ("first", "third", None, None),
        ),
        ({"prompt": "q", "responses": ["bad", "good"], "scores": [1, 5]}, ("good", "bad", 5.0, 1.0)),
        ({"prompt": "q", "generations": ["bad", "good"], "ratings": ["1", "5"]}, ("good", "bad", 5.0, 1.0)),
        ({"prompt": "q", "responses": ["good", "bad"], "ranks": [1, 2]}, ("good", "bad", None, None)),
        # A table has lists as text.
        (
            {"prompt": "q", "answers": '[{"text": "bad", "stars": 1}, {"text": "good", "stars": 5}]'},
            ("good", "bad", 5.0, 1.0),
        ),
        # And a cell for every key that any row has.
        (
            {"prompt": "q",
             "answers": [{"text": "bad", "stars": 1, "score": None}, {"text": "good", "stars": 2, "score": None}]},
            ("good", "bad", 2.0, 1.0),
        ),
        # pandas reads the lists of a table as arrays.
        (
            {"prompt": "q", "responses": np.array(["bad", "good"]), "scores": np.array([1.0, 5.0])},
            ("good", "bad", 5.0, 1.0),
        ),
        # Of equals the first one counts, at both ends.
        ({"prompt": "q", "answers": ["a", "b", "c", "d"], "scores": [5, 5, 1, 1]}, ("a", "c", 5.0, 1.0)),
        (
            {"prompt": "q",
             "answers": [{"content": "good", "score": 2, "rank": 1}, {"content": "bad", "score": 1, "rank": 2}]},
            ("good", "bad", 2.0, 1.0),
        ),
        (
            {"prompt": "q", "rewards": [-1, 0.5],
             "answers": [[{"role": "assistant", "content": "bad"}], [{"role": "assistant", "content": "good"}]]},
            ([{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}], 0.5, -1.0),
        ),
    ],
)  # fmt: skip
def test_the_best_answer_is_chosen_and_the_worst_rejected(
    row: dict[str, Any], found: tuple[Any, ...]
) -> None:
    assert pair(row) == found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"], "ratings": [1, 5]},
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "q", "answers": ["one"], "scores": [1]},
        {"prompt": "q", "completion": "a", "scores": [1, 2]},
    ],
)
def test_other_rows_are_left_as_they_are(row: dict[str, Any]) -> None:
    assert renamed(row, {}) == row


def test_the_file_s_own_names_are_mapped_and_what_is_not_read_is_said(tmp_path: Path) -> None:
    items = [
        {"reply": "a", "text": "good", "stars": 5},
        {"text": "bad", "stars": 1},
        {"text": "so so", "stars": 3},
    ]
    file = tmp_path / "tickets.jsonl"
    file.write_text(json.dumps({"ticket": "q", "replies": items}) + "\n")
    rows = read_rows(file, columns={"prompt": "ticket", "answers": "replies"})
    (row,) = rows.preferences
    assert (row.chosen, row.scores) == ([{"role": "assistant", "content": "good"}], (5.0, 1.0))
    assert dict(rows.unread) == {"replies.reply": 1, "replies between the best and the worst": 1}


def test_answers_that_are_all_equally_good_are_a_tie() -> None:
    row = {"prompt": "q", "answers": ["a", "b", "c"], "scores": [3, 3, 3]}
    with pytest.raises(Tie) as tie:
        renamed(row, {})
    assert (tie.value.row["chosen"], tie.value.row["rejected"], tie.value.blank) == ("a", "c", False)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answers": [{"text": "a", "stars": 5}, {"text": "b", "stars": None}]},
         "answer 2 of 'answers' has no 'stars'"),
        ({"answers": [{"text": "a", "score": "N/A"}, {"text": "b", "score": 1}]},
         "answer 1 of 'answers' has no 'score'"),
        ({"answers": [{"text": "a", "score": True}, {"text": "b", "score": 1}]},
         "answer 1 of 'answers' has no 'score'"),
        ({"answers": ["a", "b", "c"], "scores": [1, 2]}, "'scores' has 2 numbers for 3 'answers'"),
        ({"answers": ["a", "b"], "scores": [1]}, "'scores' has 1 number for 2 'answers'"),
        ({"answers": [{"text": "a", "score": 2, "rank": 2}, {"text": "b", "score": 1, "rank": 1}]},
         "score and rank of"),
        ({"answers": [{"txt": "a", "score": 2}, {"text": "b", "score": 1}]},
         "answer 1 of 'answers' has no text: one of"),
        ({"answers": [{"text": "a", "response": "c", "score": 2}, {"text": "b", "score": 1}]},
         "has response and text"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_read_names_the_answer(row: dict[str, Any], words: str) -> None:
    with pytest.raises(MalformedRow, match=words):
        renamed({"prompt": "q"} | row, {})


def test_a_list_without_scores_is_told_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "answers": [{"text": "a"}, {"text": "b"}]}\n')
    with pytest.raises(InputError, match="nothing says how good each answer in 'answers' is"):
        read_rows(file)
