"""Words and numbers in messages."""

import pytest

from slimepo.words import nearest, short_number


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1e-4, "1e-4"),
        (2.5e-7, "2.5e-7"),
        (0.1, "0.1"),
        (20.0, "20"),
        (0.0, "0"),
        (-3e-3, "-3e-3"),
        (None, "–"),
    ],
)
def test_numbers_are_written_short(value: float | None, words: str) -> None:
    assert short_number(value) == words


def test_the_nearest_word_is_offered_and_a_far_one_is_not() -> None:
    assert nearest("learning_rat", ["learning_rate", "epochs"]) == " (did you mean 'learning_rate'?)"
    assert nearest("colour", ["learning_rate", "epochs"]) == ""
