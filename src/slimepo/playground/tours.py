"""Shortest round trips through a few towns: answers with hard constraints, and a cost where one right answer is best.

A prompt gives each town a letter and a place on a grid of ten by ten ("a37" lies at 3, 7); an answer names the towns in
the order of the trip, from a, which it returns to. Beside a checker these tasks have a grammar, a repair and a cost, so
that constrained sampling and `bopo` can be tried on them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from slimepo.playground.families import Family, Problem, Task, one_lost, transposed, wordy

LETTERS = "abcdef"
# Of so many towns the best trip is found by trying them all: 60 of six towns.
TOWNS = (5, 6)
# A problem is one where the wrong trips next to the best are longer by this share of it or more.
_LEAST_GAP = 0.02
_ROUNDING = 1e-9


def length(places: Sequence[int], trip: str) -> float:
    """How long a round trip is: `places` are x and y of each town in turn, `trip` letters with spaces between."""
    at = [LETTERS.index(letter) for letter in trip.split(" ")]
    points = [(places[2 * town], places[2 * town + 1]) for town in at]
    return sum(itertools.starmap(math.dist, zip(points, [*points[1:], points[0]], strict=True)))


def shortest(places: Sequence[int]) -> str:
    """The best trip, by trying all; of its two directions, and of equals, the first in the alphabet."""
    points = [*zip(places[::2], places[1::2], strict=True)]
    apart = [[math.dist(one, other) for other in points] for one in points]
    # One of a trip's two directions has the lower letter first.
    orders = (each for each in itertools.permutations(range(1, len(points))) if each[0] < each[-1])
    trips = [(0, *each) for each in orders]
    lengths = [sum(apart[a][b] for a, b in zip(trip, [*trip[1:], 0], strict=True)) for trip in trips]
    least = min(lengths) + _ROUNDING
    best = next(trip for trip, long in zip(trips, lengths, strict=True) if long <= least)
    return " ".join(LETTERS[town] for town in best)


def grammar(row: Mapping[str, Any]) -> str:
    """A recipe's `tasks.grammar`: as many towns as there are, from home. That each is named once, no grammar says."""
    towns = len(row["numbers"]) // 2
    return f'root ::= "a" (" " [b-{LETTERS[towns - 1]}]){{{towns - 1}}}'


def repair(row: Mapping[str, Any], answer: str) -> str:
    """A recipe's `tasks.repair`: any text becomes a trip, and a trip stays as it is.

    Of a town that is named again the first time counts; those that are missing come last, in the order of the alphabet.
    (Where they lengthen the trip least, they would make a good trip of no answer at all, and hide what a model knows.)
    """
    towns = LETTERS[: len(row["numbers"]) // 2]
    return " ".join(dict.fromkeys(["a", *re.findall(rf"\b[{towns}]\b", answer), *towns]))


def cost(row: Mapping[str, Any], answer: str) -> float:
    """A recipe's `tasks.cost`: the length of a valid trip, over that of the shortest."""
    places = row["numbers"]
    return length(places, answer) / length(places, row["answer"])


def _draw(rng: Random) -> Problem:
    while True:
        towns = rng.choice(TOWNS)
        spots = rng.sample([(x, y) for x in range(10) for y in range(10)], towns)
        places = tuple(itertools.chain(*spots))
        best = shortest(places)
        if min(length(places, trip) for trip in _exchanged(best)) > (1 + _LEAST_GAP) * length(places, best):
            break
    named = " ".join(f"{letter}{x}{y}" for letter, (x, y) in zip(LETTERS, spots, strict=False))
    return Problem({"towns": named}, best, numbers=places)


def _exchanged(trip: str) -> list[str]:
    """The trips with two neighbours exchanged, home left where it is."""
    towns = trip.split(" ")
    return [
        " ".join([*towns[:at], towns[at + 1], towns[at], *towns[at + 2 :]]) for at in range(1, len(towns) - 1)
    ]


def _valid(task: Task, answer: str) -> bool:
    towns = LETTERS[: len(task.numbers) // 2]
    return answer[:1] == "a" and sorted(answer.split(" ")) == list(towns)


def _right(task: Task, answer: str) -> bool:
    return length(task.numbers, answer) <= length(task.numbers, task.gold) + _ROUNDING


def _slips(task: Task, rng: Random) -> list[str]:
    return _exchanged(task.gold)


def _malformed(task: Task, rng: Random) -> list[str]:
    gold = task.gold
    again = gold[:-1] + gold[rng.randrange(2, len(gold) - 2, 2)]
    return [*wordy(gold), gold.replace(" ", ""), gold[:-2], again, one_lost(gold, rng), transposed(gold, rng)]


TOURS = Family("tours", ("Tour {towns}",), _draw, _valid, _slips, _malformed, _right)
