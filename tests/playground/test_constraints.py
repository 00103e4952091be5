"""Constraints on answers: each kind on answers that hold it and answers that do not; checker and reward."""

from random import Random
from typing import Any

import pytest

from slimepo.playground.constraints import KINDS, check, holds, sentences, share_held, speaks
from slimepo.types import Verdict

# Of each kind: options, answers that hold the constraint, answers that do not.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("words_at_most", {"count": 4}, ["It's a well-known kite.", ""], ["One two three four five."]),
    ("words_at_least", {"count": 4}, ["One two three four."], ["It's well-known."]),
    ("words_between", {"low": 2, "high": 3}, ["One two.", "One, two, three."], ["One.", "a b c d"]),
    ("sentences_exactly", {"count": 2}, ["Hi. Go!", 'He said "Go." Then rain came'], ["One.", "A. B. C."]),
    ("one_sentence", {}, ["It costs 1.5 euros, or more.", "No end"], ["Two. Here.", ""]),
    ("sentences_at_most", {"count": 2}, ["One.", "One. Two?!"], ["One. Two. Three."]),
    ("paragraphs_exactly", {"count": 2}, ["One\nstill one\n \nTwo\n\n"], ["One\nTwo", "1\n\n2\n\n3"]),
    (
        "bullets_exactly",
        {"count": 2},
        ["Here:\n- one\n  * two", "• a\n• b"],
        ["- one", "-one\n-two", "- a\n- b\n- c"],
    ),
    (
        "numbered_exactly",
        {"count": 2},
        ["Steps:\n1. Dig\n2) Plant"],
        ["1. Dig", "1. Dig\n3. Eat", "1. a\n2. b\n3. c"],
    ),
    ("lines_exactly", {"count": 2}, ["one\n\ntwo\n"], ["one", "one\ntwo\nthree"]),
    (
        "parts",
        {"label": "Day", "count": 2},
        ["**Day 1**: rain\nDay 2\nsun"],
        ["Day 1 rain", "Day 2\nDay 1", "on Day 1\non Day 2"],
    ),
    ("lower_case", {}, ["all small, 7."], ["One capital"]),
    ("upper_case", {}, ["ALL BIG, 7."], ["ALMOST ALL BIg"]),
    ("shouted_words", {"count": 2}, ["It is VERY, VERY far."], ["I am A bit LOUD."]),
    ("no_commas", {}, ["Well then; go."], ["Well, go."]),
    ("exclamations", {"count": 2}, ["Yes! No!", "Ha!!!"], ["Yes! No."]),
    ("no_digits", {}, ["seven"], ["7"]),
    ("some_digits", {"count": 2}, ["3 of 4", "1,000 in 1999"], ["three of 4", "1,000"]),
    ("no_letter", {"letter": "k"}, ["A stone."], ["A Kite."]),
    ("bold_words", {"count": 2}, ["**One** and **the other**"], ["*one* and **two**", "**one\n** two**"]),
    ("hashtags", {"count": 2}, ["Nice #sea #Sun1"], ["# heading #sea", "#1 #sea"]),
    ("blanks", {"count": 2}, ["Dear {name}, on {date}"], ["Dear {name}, on {}", "{two {in one}"]),
    (
        "with_words",
        {"wanted": ["warm", "friend"]},
        ["A Warm, warm friend."],
        ["A warm friendship.", "A friend."],
    ),
    ("without_words", {"wanted": ["very", "also"]}, ["Everyday fun"], ["Very far", "also!"]),
    ("word_times", {"word": "warm", "count": 2}, ["Warm and warm."], ["warm and warmer"]),
    ("opening", {"phrase": "In short"}, ["in  short, yes", "In short: no"], ["So in short"]),
    ("closing", {"phrase": "That is all."}, ["Yes. that is all. ", "That is all."], ["That is all. Bye."]),
    ("quoted", {}, ['"Yes."', ' "Yes" and "no" '], ['"Yes', '"', "'Yes'"]),
    ("bracketed", {}, ["[Yes]\n"], ["[Yes", "[", "(Yes)"]),
    ("question_last", {}, ["So. Or not? "], ["Or not? So."]),
    ("headline", {}, ["# Kites\nThey fly."], ["## Kites", "Kites\n# No", "#tag"]),
    (
        "last_line",
        {"label": "Fun fact"},
        ["They fly.\n\nfun fact: high."],
        ["Fun fact: high.", "Fun fact: a\nb"],
    ),
    (
        "two_versions",
        {},
        ["One.\n---\nTwo.", "One.\n\n ----- \n\nTwo."],
        ["One.\n---\none.", "One.\nTwo.", "a\n---\nb\n---\nc"],
    ),
    (
        "json_object",
        {"keys": ["place", "cost"]},
        ['{"cost": 1, "place": "x"}', '```json\n{"place": 1, "cost": 2}\n```'],
        ['{"cost": 1}', '["place", "cost"]', 'Sure: {"cost": 1, "place": "x"}'],
    ),
    ("one_option", {"options": ["tea", "milk"]}, ["Tea.", "milk"], ["tea, please", "water", ""]),
    (
        "request_first",
        {"request": "Describe kites."},
        ["Describe kites.\nThey fly."],
        ["Describe kites.", "They fly.\nDescribe kites."],
    ),
]


@pytest.mark.parametrize(("kind", "options", "held", "broken"), CASES, ids=[case[0] for case in CASES])
def test_a_kind(kind: str, options: dict[str, Any], held: list[str], broken: list[str]) -> None:
    # What a case gives is what the generator draws.
    assert set(KINDS[kind].draw(Random(0), "Describe kites.")) == set(options)
    constraint = {"kind": kind, **options}
    assert [holds(constraint, answer) for answer in held] == [True] * len(held)
    assert [holds(constraint, answer) for answer in broken] == [False] * len(broken)


def test_every_kind_has_a_case() -> None:
    assert [case[0] for case in CASES] == list(KINDS)
    assert len(KINDS) >= 20


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("No end", 1),
        ("Really?! Yes.", 2),
        ("At 3.50 it is cheap.", 1),
        ("(So.) Yes.", 2),
    ],
)
def test_sentences_are_stretches_of_words_that_end(text: str, count: int) -> None:
    assert sentences(text) == count


def test_an_answer_has_to_speak_of_its_topic_in_some_words_and_without_loops() -> None:
    row = {"topic": "tide pools"}
    assert speaks(row, "A Pool holds crabs and snails.")
    assert not speaks(row, "I love to sit in the sun.")
    assert not speaks(row, "Tide pools!")
    assert not speaks(row, "Tide pools are fun. " * 5)
    # A choice is one word.
    assert speaks({}, "tea")
    assert not speaks({}, " ")


def test_checker_and_graded_reward() -> None:
    row = {
        "topic": "kites",
        "constraints": [{"kind": "no_commas"}, {"kind": "words_at_most", "count": 6}],
    }
    both, one, none = "A kite needs a good wind.", "A kite needs wind, and string, and you.", "Wind is all."
    assert [check(row, answer) for answer in (both, one, none)] == [
        Verdict(True, True), Verdict(False, True), Verdict(False, False),
    ]  # fmt: skip
    assert share_held([], [both, one, none], row) == [1.0, 0.0, 0.0]
    assert share_held([], ["A kite needs wind and string and nothing else."], row) == [0.5]
