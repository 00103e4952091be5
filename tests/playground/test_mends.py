"""Answers that code mends: each mend makes its kind hold, and says what the model said."""

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimepo.playground.constraints import KINDS, check, holds, words
from slimepo.playground.instructions import TEXTS, Texts, make_instructions
from slimepo.playground.mends import MENDS, repair, sentence_list
from slimepo.settings import read_mapping, validate

# Breaks nearly every kind of constraint, and has what each mend needs.
SAID = (
    "Kites are very good toys, and many people fly them in 2 or 3 colours. They rise with the wind. "
    "A tail keeps them steady. Hold the line in red gloves. Never fly one in a storm. Great days are windy days."
)


def constraint(kind: str, seed: int = 0) -> dict[str, Any]:
    return {"kind": kind, **KINDS[kind].draw(Random(seed), "Write about kites.")}


@pytest.mark.parametrize("kind", sorted(MENDS))
def test_each_mend_makes_its_kind_hold(kind: str) -> None:
    for seed in range(40):
        asked = constraint(kind, seed)
        row = {"constraints": [asked], "topic": "kites" if KINDS[kind].about else None}
        if kind == "one_option" and "red" not in asked["options"]:
            continue
        if kind == "words_between" and asked["low"] > len(words(SAID)):
            continue
        mended = repair(row, SAID)
        assert holds(asked, mended), (asked, mended)
        assert check(row, mended).correct, (asked, mended)
        assert repair(row, mended) == mended


def test_kinds_that_need_new_content_have_no_mend() -> None:
    assert set(KINDS) - set(MENDS) == {
        "words_at_least", "some_digits", "no_letter", "with_words", "word_times", "two_versions",
    }  # fmt: skip


def test_what_cannot_be_mended_stays_as_it_was() -> None:
    assert (
        repair({"constraints": [constraint("words_at_least")], "topic": "kites"}, "Kites fly.")
        == "Kites fly."
    )


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), said=st.text(max_size=200) | st.just(SAID))
def test_any_text_can_be_tried_and_what_comes_is_right_or_the_text_itself(seed: int, said: str) -> None:
    texts = validate(Texts, read_mapping(TEXTS, "instructions"), "t")
    (row,) = make_instructions(1, str(seed), texts, ["kites"])
    mended = repair(row, said)
    assert mended == said or check(row, mended).correct


def test_sentences_come_without_the_marks_of_a_list() -> None:
    assert sentence_list("1. Fly kites.\n- Hold the line!  And run") == [
        "Fly kites.",
        "Hold the line!",
        "And run",
    ]
