"""The world's data is a function of its seed, even over families, and never leaks a held-out problem."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.playground.tasks import USUAL, check
from slimepo.playground.world import demonstrations, make_tasks


def test_families_are_as_even_as_they_divide() -> None:
    counts = Counter(task.family for task in make_tasks(125, seed=0))
    assert set(counts) == set(USUAL)
    assert max(counts.values()) - min(counts.values()) == 1


def test_tasks_of_one_family_do_not_stand_together() -> None:
    tasks = make_tasks(240, seed=0)
    assert len({task.family for task in tasks[:24]}) > 6


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), other=st.integers(0, 2**32))
def test_held_out_problems_are_in_no_training_prompt(seed: int, other: int) -> None:
    held_out = make_tasks(240, other)
    keys = {task.key for task in held_out}
    training = make_tasks(600, seed, exclude=keys)
    assert not keys & {task.key for task in training}
    assert not {task.prompt for task in held_out} & {task.prompt for task in training}
    assert len({task.prompt for task in training}) == len({task.key for task in training}) == 600


def test_the_seed_alone_decides() -> None:
    assert make_tasks(300, 7) == make_tasks(300, 7)
    assert make_tasks(300, 7) != make_tasks(300, 8)


def test_a_family_that_is_used_up_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no new problems left"):
        make_tasks(1, 0, exclude=[f"add|{a}|{b}" for a in range(1000) for b in range(100)])


def test_demonstrations_are_noisy_in_the_given_shares() -> None:
    tasks = make_tasks(6_000, seed=0)
    rows = demonstrations(tasks, seed=0)
    kinds = Counter(row.source.split(":")[2] for row in rows)
    # Three standard deviations of a binomial share of 6,000 are below 0.02.
    assert kinds["right"] / 6_000 == pytest.approx(0.45, abs=0.02)
    assert kinds["slip"] / 6_000 == pytest.approx(0.35, abs=0.02)
    assert kinds["malformed"] / 6_000 == pytest.approx(0.20, abs=0.02)
    for task, row in zip(tasks, rows, strict=True):
        verdict = check(task, row.chosen[0]["content"])
        kind = "right" if verdict.correct else "slip" if verdict.valid else "malformed"
        assert row.source == f"playground:{task.key}:{kind}"
        assert row.prompt == [{"role": "user", "content": task.prompt}]
        assert row.chosen[0]["role"] == "assistant"
        assert row.rejected == []


def test_clean_demonstrations_are_the_gold_answers() -> None:
    tasks = make_tasks(60, seed=0)
    rows = demonstrations(tasks, 0, right=1.0, slip_share=0.0, malformed_share=0.0)
    assert [row.chosen[0]["content"] for row in rows] == [task.gold for task in tasks]


def test_a_demonstration_does_not_depend_on_the_other_tasks() -> None:
    tasks = make_tasks(120, seed=0)
    assert demonstrations(tasks[::-1], 3)[::-1] == demonstrations(tasks, 3)
    assert demonstrations(tasks, 3) != demonstrations(tasks, 4)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1.2, -0.2, 0.0)])
def test_shares_that_are_no_distribution_are_refused(shares: tuple[float, float, float]) -> None:
    right, slip_share, malformed_share = shares
    with pytest.raises(InputError, match="sum to 1"):
        demonstrations(
            make_tasks(12, 0), 0, right=right, slip_share=slip_share, malformed_share=malformed_share
        )


PRINT_DIGEST = """
import hashlib
from slimepo.playground.world import demonstrations, make_tasks
tasks = make_tasks(500, 11)
print(hashlib.sha256(repr((tasks, demonstrations(tasks, 11))).encode()).hexdigest())
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_makes_the_same_world(hash_seed: str) -> None:
    tasks = make_tasks(500, 11)
    expected = hashlib.sha256(repr((tasks, demonstrations(tasks, 11))).encode()).hexdigest()
    command = [sys.executable, "-c", PRINT_DIGEST]
    output = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == expected
