"""The scores of the world, worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.playground.families import Task
from slimepo.playground.measure import longest_run, loops, measure

ADD = Task("add", "Add 2 and 3.", "5", (2, 3))
SORT = Task("sort", "Sort 3 1 2.", "1 2 3", (3, 1, 2))


def test_scores_are_shares_of_the_tasks() -> None:
    scores = measure([ADD, ADD, SORT, SORT], ["5", "6", "1 2 3", "1, 2, 3"], [True] * 4)
    assert scores == {
        "exact_match": 0.5,
        "format_valid": 0.75,
        "end_rate": 1.0,
        "repetition": 0.0,
        "exact_match/add": 0.5,
        "exact_match/sort": 0.5,
    }


def test_an_unfinished_answer_is_neither_right_nor_valid() -> None:
    scores = measure([ADD], ["5"], [False])
    assert scores["exact_match"] == scores["format_valid"] == scores["end_rate"] == 0.0


def test_a_looping_answer_counts_as_repetition() -> None:
    assert measure([ADD, ADD], ["5, 5, 5, 5, 5", "5"], [True, True])["repetition"] == 0.5


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


@pytest.mark.parametrize(("texts", "finished"), [([], [True]), (["5"], []), (["5", "5"], [True, True])])
def test_lists_of_different_lengths_are_refused(texts: list[str], finished: list[bool]) -> None:
    with pytest.raises(InputError, match="one of each"):
        measure([ADD], texts, finished)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(InputError):
        measure([], [], [])
