"""Shortest round trips: the optimum by hand, and a repair that makes any text a trip and leaves trips alone."""

import itertools
import math
import re
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.playground.tasks import check, make_task
from slimepo.playground.tours import LETTERS, cost, grammar, length, repair, shortest
from slimepo.playground.world import task_row
from slimepo.types import Verdict

# A rectangle of 3 by 4, its corners in the order of the letters.
RECTANGLE = [0, 0, 3, 0, 3, 4, 0, 4]


def row(seed: int) -> dict[str, Any]:
    return task_row(make_task("tours", Random(seed)))


def test_round_the_rectangle_is_shortest() -> None:
    assert length(RECTANGLE, "a b c d") == 14
    assert length(RECTANGLE, "a c b d") == 2 * 5 + 2 * 4
    assert shortest(RECTANGLE) == "a b c d"


@given(seed=st.integers(0, 10_000))
def test_no_trip_is_shorter_than_the_gold_one(seed: int) -> None:
    task = make_task("tours", Random(seed))
    towns = LETTERS[1 : len(task.numbers) // 2]
    trips = [" ".join(["a", *order]) for order in itertools.permutations(towns)]
    best = min(length(task.numbers, trip) for trip in trips)
    assert math.isclose(length(task.numbers, task.gold), best)
    # Both directions are right.
    home, *others = task.gold.split(" ")
    assert check(task, " ".join([home, *others[::-1]])) == Verdict(correct=True, valid=True)


@given(seed=st.integers(0, 10_000), text=st.text("abcdefgx ,.", max_size=30))
def test_a_repair_makes_any_text_a_trip_and_a_trip_stays(seed: int, text: str) -> None:
    task, asked = make_task("tours", Random(seed)), row(seed)
    mended = repair(asked, text)
    assert check(task, mended).valid
    assert repair(asked, mended) == mended
    assert cost(asked, mended) >= 1 - 1e-9


def test_a_missing_town_comes_last_and_one_that_is_named_again_counts_once() -> None:
    asked = {"numbers": RECTANGLE, "answer": "a b c d"}
    assert repair(asked, "The trip: d a b, cab") == "a d b c"
    assert repair(asked, "a c c b b") == "a c b d"
    assert cost(asked, "a c b d") == pytest.approx(18 / 14)


@given(seed=st.integers(0, 10_000))
def test_the_grammar_takes_every_trip(seed: int) -> None:
    """As a regular expression, which this grammar is."""
    asked = row(seed)
    pattern = re.sub(r'"([^"]*)"|\s', r"\1", grammar(asked).removeprefix("root ::= "))
    assert re.fullmatch(pattern, asked["answer"])
    assert not re.fullmatch(pattern, asked["answer"] + " b")
