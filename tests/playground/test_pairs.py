"""Which sample is chosen and which is rejected, case by case."""

import pytest

from slimepo.errors import InputError
from slimepo.playground.families import Task
from slimepo.playground.pairs import PairStats, pairs_from_samples

TASK = Task("add", "Add 2 and 3.", "5", (2, 3))


def answers(samples: list[str]) -> tuple[str, str]:
    pairs, _ = pairs_from_samples([TASK], [samples])
    return pairs[0].chosen[0]["content"], pairs[0].rejected[0]["content"]


def test_a_right_sample_is_chosen_and_a_wrong_one_rejected() -> None:
    assert answers(["4", "5"]) == ("5", "4")


def test_the_gold_answer_is_chosen_where_no_sample_is_right() -> None:
    assert answers(["4", "6"]) == ("5", "4")


def test_the_most_frequent_wrong_sample_is_rejected() -> None:
    assert answers(["4", "6", "6", "5"]) == ("5", "6")


def test_a_wrong_sample_of_valid_form_goes_before_a_more_frequent_broken_one() -> None:
    assert answers(["5.", "5.", "5.", "7"]) == ("5", "7")


def test_a_broken_sample_is_rejected_where_there_is_nothing_better() -> None:
    assert answers(["5", "5.", "05", "05"]) == ("5", "05")


def test_the_earlier_sample_wins_a_tie() -> None:
    assert answers(["9", "8", "8", "9"]) == ("5", "9")


def test_empty_samples_are_no_answers() -> None:
    assert answers(["", "", "4"]) == ("5", "4")


def test_another_spelling_of_a_right_answer_is_right() -> None:
    task = Task("json", "Give the pet in JSON: pet ruso.", '{"pet": "ruso"}', (), ("pet", "pet", "ruso"))
    pairs, _ = pairs_from_samples([task], [['{"pet":"ruso"}', '{"pet": "r"}']])
    assert pairs[0].chosen[0]["content"] == '{"pet":"ruso"}'


def test_every_task_is_accounted_for() -> None:
    samples = [["5", "4"], ["4"], ["5.", "5"], ["5", "5"], [], [""]]
    pairs, stats = pairs_from_samples([TASK] * 6, samples)
    assert stats == PairStats(
        tasks=6, pairs=3, gold_chosen=1, invalid_rejected=1, dropped_all_right=1, dropped_no_sample=2
    )
    assert len(pairs) == stats.pairs == stats.tasks - stats.dropped_all_right - stats.dropped_no_sample
    assert stats.gold_share == stats.invalid_share == pytest.approx(1 / 3)


def test_a_pair_is_a_preference_in_messages() -> None:
    pairs, _ = pairs_from_samples([TASK], [["4"]])
    assert pairs[0].prompt == [{"role": "user", "content": "Add 2 and 3."}]
    assert pairs[0].chosen == [{"role": "assistant", "content": "5"}]
    assert pairs[0].rejected == [{"role": "assistant", "content": "4"}]
    assert pairs[0].source == "playground:add|2|3:pair"


def test_samples_that_do_not_match_the_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="1 tasks but samples of 2"):
        pairs_from_samples([TASK], [["5"], ["4"]])
