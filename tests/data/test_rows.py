"""Answers judged one by one."""

from dataclasses import replace

import numpy as np
import pytest

from slimepo.data.batch import StepCollator, collate, collate_packed
from slimepo.data.rows import Row, as_preference, judged_rows, with_mismatched
from slimepo.errors import InputError
from slimepo.types import Unpaired


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


NONE = ids()
PAIR = Row(
    ids(5, 6), (ids(7, 8, 9), ids(10, 1)), {"weight": 2.0, "reference": (np.ones(3), np.zeros(2))}, "pair"
)
DESIRABLE = Row(ids(5, 4), (ids(2, 1),), id="good")
UNDESIRABLE = Row(ids(3), (NONE, ids(11, 12, 1)), id="bad")


def test_a_judged_answer_is_a_row_with_one_side() -> None:
    prompt, response = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    good = as_preference(Unpaired(prompt, response, True, "f:1"))
    bad = as_preference(Unpaired(prompt, response, False, "f:2"))
    assert (good.chosen, good.rejected, good.source) == (response, [], "f:1")
    assert (bad.chosen, bad.rejected, bad.source) == ([], response, "f:2")


def test_a_pair_becomes_two_rows_and_judged_answers_stay() -> None:
    rows = judged_rows([PAIR, DESIRABLE, UNDESIRABLE])
    assert [row.id for row in rows] == ["pair (chosen)", "pair (rejected)", "good", "bad"]
    assert [(len(row.response(0)), len(row.response(1))) for row in rows] == [(3, 0), (0, 2), (2, 0), (0, 3)]
    for row, tokens in zip(rows, ([3, 0], [0, 2]), strict=False):
        assert row.values["weight"] == 2.0
        assert [len(logps) for logps in row.values["reference"]] == tokens, (
            "each keeps its own response's numbers"
        )
    assert [row.id for row in judged_rows(rows)] == [row.id for row in rows]


def test_every_row_gets_the_answer_of_another_prompt() -> None:
    random = np.random.default_rng(0)
    rows = judged_rows(
        [
            Row(ids(i % 5, 2), (ids(100 + i), ids(200 + i, *random.integers(0, 9, 2))), id=f"{i}")
            for i in range(20)
        ]
    )
    answers = {tuple(a): tuple(row.prompt_ids) for row in rows for a in row.responses if len(a)}
    mismatched = with_mismatched(rows, seed=0)
    for row in mismatched:
        assert answers[tuple(row.responses[2])] != tuple(row.prompt_ids)
    again = with_mismatched(rows, seed=0)
    assert all(np.array_equal(a.responses[2], b.responses[2]) for a, b in zip(mismatched, again, strict=True))
    other = with_mismatched(rows, seed=1)
    assert not all(
        np.array_equal(a.responses[2], b.responses[2]) for a, b in zip(mismatched, other, strict=True)
    )
    # Nearly every answer goes round once, so that the same answers are judged and mismatched.
    assert len({tuple(row.responses[2]) for row in mismatched}) > 0.6 * len(rows)


def test_a_mismatched_answer_makes_no_row_longer_than_the_rows_are() -> None:
    """max_length holds for prompt and answer together; a long prompt meets a long answer only here."""
    rows = judged_rows(
        [
            Row(ids(*range(30)), (ids(7, 8), ids(9)), id="long prompt"),
            Row(ids(4), (ids(*range(31)), ids(*range(1, 31))), id="long answers"),
        ]
    )
    for row in with_mismatched(rows, seed=0)[:2]:
        assert len(row.responses[2]) == 2, "32 tokens, as the longest of the rows has"
        assert row.responses[2][0] in (0, 1), "the beginning of one of the long answers"


def test_one_prompt_alone_has_no_mismatch() -> None:
    with pytest.raises(InputError, match="same prompt"):
        with_mismatched([PAIR, PAIR], seed=0)


@pytest.mark.parametrize("shared", [False, True])
def test_an_answer_that_is_not_there_takes_no_room_in_a_packed_row(shared: bool) -> None:
    batch = collate_packed([DESIRABLE, UNDESIRABLE], shared=shared)
    assert batch["input_ids"].tolist() == [[5, 4, 2, 1, 3, 11, 12, 1]]
    assert batch["predict_at"].tolist() == [1, 2, 4, 5, 6]
    assert batch["targets"].tolist() == [2, 1, 11, 12, 1]
    assert batch["response_tokens"] == [[2, 0], [0, 3]]


def test_an_answer_that_is_not_there_takes_no_padded_row() -> None:
    batch = collate([DESIRABLE, UNDESIRABLE], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[5, 4, 2, 1], [3, 11, 12, 1]]
    assert batch["predict_at"].tolist() == [1, 2, 4, 5, 6]
    assert batch["real_tokens"] == 8


def test_the_token_budget_counts_only_the_answers_that_are_there() -> None:
    rows = [DESIRABLE, UNDESIRABLE]
    for layout in ("padded", "packed", "shared"):
        assert len(StepCollator(1, layout=layout, max_tokens=8)(rows)["batches"]) == 1  # type: ignore[arg-type]
        assert len(StepCollator(1, layout=layout, max_tokens=7)(rows)["batches"]) == 2  # type: ignore[arg-type]


def test_mismatched_answers_come_as_a_batch_of_their_own() -> None:
    rows = with_mismatched([replace(DESIRABLE, responses=(ids(2, 13, 14, 1),)), UNDESIRABLE], seed=0)
    step = StepCollator(2)(rows)
    (batch,), (other,) = step["batches"], step["mismatched"]
    assert batch["targets"].tolist() == [2, 13, 14, 1, 11, 12, 1]
    assert other["positions"] == (2,)
    by_prompt = dict(zip(other["row_ids"], other["response_tokens"][0], strict=True))
    assert by_prompt == {"good": 3, "bad": 4}
