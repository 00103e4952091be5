"""The chosen answers that fell most: which they are, how much of them is kept, what their tokens read as."""

import numpy as np
import pytest

from slimepo.data.rows import Row
from slimepo.monitor.displacement import SideScores
from slimepo.monitor.fallen import ANSWERS, TOKENS, fell_most, first_tokens, pieces


def rows(*lengths: int) -> list[Row]:
    return [
        Row(np.array([1, 2]), (np.arange(3, 3 + n), np.array([9])), id=f"r{at}")
        for at, n in enumerate(lengths)
    ]


def scores(*answers: list[float]) -> SideScores:
    arrays = [np.array(each, np.float64) for each in answers]
    return SideScores(arrays, arrays, arrays)


def letters(ids: list[int]) -> str:
    return "".join(chr(96 + each) for each in ids)


def test_the_worst_stand_first_and_those_that_rose_not_at_all() -> None:
    was, now = scores([-1.0, -1.0], [-1.0], [-1.0]), scores([-1.5, -1.0], [-0.5], [-3.0])
    found = fell_most(rows(2, 1, 1), first_tokens(was), now, [-1.0, -1.0, -1.0], letters)
    assert [each["row_id"] for each in found] == ["r2", "r0"]
    assert found[1] == {
        "row_id": "r0", "prompt": "ab", "length": 2, "mean": [-1.0, -1.25], "tokens": ["c", "d"],
        "before": [-1.0, -1.0], "after": [-1.5, -1.0],
    }  # fmt: skip


def test_a_row_without_a_chosen_answer_is_passed_by() -> None:
    was, now = scores([], [-1.0]), scores([], [-2.0])
    found = fell_most(rows(0, 1), first_tokens(was), now, [None, -1.0], letters)
    assert [each["row_id"] for each in found] == ["r1"]


def test_what_is_kept_is_bounded_and_the_mean_is_of_the_whole_answer() -> None:
    many = [scores(*[[-1.0] * (TOKENS + 50)] * 9), scores(*[[-1.0] * TOKENS + [-3.0] * 50] * 9)]
    mean = (-TOKENS - 150) / (TOKENS + 50)
    found = fell_most(rows(*[TOKENS + 50] * 9), first_tokens(many[0]), many[1], [-1.0] * 9, letters)
    assert len(found) == ANSWERS
    assert {len(found[0][key]) for key in ("tokens", "before", "after")} == {TOKENS}
    assert found[0]["mean"][1] == pytest.approx(mean, abs=1e-5)
    assert found[0]["length"] == TOKENS + 50


def test_without_a_tokenizer_there_is_nothing_to_show() -> None:
    assert fell_most(rows(1), [[-1.0]], scores([-2.0]), [-1.0], lambda ids: None) == []


def test_a_letter_of_several_tokens_belongs_to_the_last() -> None:
    data = "aé\u30e6!".encode()
    assert pieces(list(data), lambda ids: bytes(ids).decode(errors="replace")) == [
        "a", "", "é", "", "", "\u30e6", "!",
    ]  # fmt: skip


def test_a_tokenizer_that_mends_what_stood_before_still_names_each() -> None:
    def tidy(ids: list[int]) -> str:
        return " ".join({1: "well", 2: "."}[each] for each in ids).replace(" .", ".")

    assert pieces([1, 2, 1], tidy) == ["well", ".", " well"]
