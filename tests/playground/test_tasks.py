"""Every family: its gold answer is right, its slips are well-formed and wrong, its malformed answers have no form."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimepo.playground.families import Task
from slimepo.playground.tasks import FAMILIES, USUAL, check, make_task, malformed, slip
from slimepo.types import Verdict

seeds = st.integers(min_value=0, max_value=2**32)
families = st.sampled_from(sorted(FAMILIES))


def test_there_are_a_dozen_families_and_the_tours() -> None:
    assert len(USUAL) == 12
    assert set(FAMILIES) == {*USUAL, "tours"}


@settings(max_examples=300, deadline=None)
@given(family=families, seed=seeds)
def test_the_gold_answer_is_correct_and_valid(family: str, seed: int) -> None:
    task = make_task(family, Random(seed))
    assert check(task, task.gold) == Verdict(correct=True, valid=True)


@settings(max_examples=300, deadline=None)
@given(family=families, seed=seeds)
def test_a_slip_is_well_formed_and_wrong(family: str, seed: int) -> None:
    rng = Random(seed)
    task = make_task(family, rng)
    answer = slip(task, rng)
    assert answer != task.gold
    assert check(task, answer) == Verdict(correct=False, valid=True)


@settings(max_examples=300, deadline=None)
@given(family=families, seed=seeds)
def test_a_malformed_answer_is_neither_valid_nor_correct(family: str, seed: int) -> None:
    rng = Random(seed)
    task = make_task(family, rng)
    assert check(task, malformed(task, rng)) == Verdict(correct=False, valid=False)


@settings(max_examples=200, deadline=None)
@given(family=families, seed=seeds, answer=st.text(max_size=30))
def test_any_text_can_be_judged_and_correct_implies_valid(family: str, seed: int, answer: str) -> None:
    verdict = check(make_task(family, Random(seed)), answer)
    assert verdict.valid or not verdict.correct


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_whole_of_a_family_always_has_a_slip_and_a_malformed_answer(family: str) -> None:
    rng = Random(1)
    for _ in range(1_000):
        task = make_task(family, rng)
        assert slip(task, rng) != malformed(task, rng)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_task_is_a_function_of_the_generator(family: str) -> None:
    assert make_task(family, Random(5)) == make_task(family, Random(5))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_wording_occurs(family: str) -> None:
    rng = Random(0)
    openings = {make_task(family, rng).prompt.split()[0] for _ in range(100)}
    assert openings == {template.split()[0] for template in FAMILIES[family].templates}


@pytest.mark.parametrize(
    ("task", "answer", "verdict"),
    [
        (Task("add", "Add 58 and 47.", "105", (58, 47)), "105", Verdict(True, True)),
        (Task("add", "Add 58 and 47.", "105", (58, 47)), "95", Verdict(False, True)),
        (Task("add", "Add 58 and 47.", "105", (58, 47)), "0105", Verdict(False, False)),
        (Task("add", "Add 58 and 47.", "105", (58, 47)), "١٠٥", Verdict(False, False)),
        (Task("add", "Add 58 and 47.", "105", (58, 47)), "105\n", Verdict(False, False)),
        (Task("sort", "Sort 3 1 2.", "1 2 3", (3, 1, 2)), "1 3 2", Verdict(False, True)),
        (Task("sort", "Sort 3 1 2.", "1 2 3", (3, 1, 2)), "1  2 3", Verdict(False, False)),
        (Task("sort", "Sort 3 1 2.", "1 2 3", (3, 1, 2)), "1, 2, 3", Verdict(False, False)),
        (Task("upper", "Give abe in capitals.", "ABE", (), ("abe",)), "ABe", Verdict(False, False)),
        (
            Task("repeat", "Repeat ko 2 times with -.", "ko-ko", (2,), ("ko", "-")),
            "ko",
            Verdict(False, False),
        ),
        (
            Task("repeat", "Repeat ko 2 times with -.", "ko-ko", (2,), ("ko", "-")),
            "ko-ko-",
            Verdict(False, False),
        ),
        (
            Task("repeat", "Repeat ko 2 times with -.", "ko-ko", (2,), ("ko", "-")),
            "ko-ko-ko",
            Verdict(False, True),
        ),
    ],
)
def test_verdicts_worked_by_hand(task: Task, answer: str, verdict: Verdict) -> None:
    assert check(task, answer) == verdict


JSON_TASK = Task(
    "json", "Give the pet in JSON: pet ruso, city lima.", '{"pet": "ruso"}', (), ("pet", "pet", "ruso")
)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"pet":"ruso"}', Verdict(True, True)),
        ('{"pet": "lima"}', Verdict(False, True)),
        ('{"city": "lima"}', Verdict(False, False)),
        ('{"pet": 3}', Verdict(False, False)),
        ('{"pet": "ruso"', Verdict(False, False)),
        ('{"pet": "lima", "pet": "ruso"}', Verdict(False, False)),
        ("[" * 5_000, Verdict(False, False)),
    ],
)
def test_json_is_compared_by_its_value(answer: str, verdict: Verdict) -> None:
    assert check(JSON_TASK, answer) == verdict


def test_forgetting_the_carry_is_a_slip_of_addition() -> None:
    task = Task("add", "Add 58 and 47.", "105", (58, 47))
    assert "95" in {slip(task, Random(seed)) for seed in range(50)}
    assert "95" in FAMILIES["add"].slips(task, Random(0))


def test_forgetting_the_borrow_is_a_slip_of_subtraction() -> None:
    task = Task("subtract", "Subtract 17 from 252.", "235", (252, 17))
    assert "245" in {slip(task, Random(seed)) for seed in range(50)}
