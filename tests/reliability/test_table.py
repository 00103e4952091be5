"""docs/reliability.md says what the tests hold."""

from tests.reliability.table import PAGE, marked, with_table


def test_the_page_is_that_of_the_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text), "run python -m tests.reliability.table"


def test_every_case_is_one_sentence() -> None:
    for number, words, place in marked():
        assert words == words.strip().removesuffix("."), (number, place)
