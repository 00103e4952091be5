"""Optimistic feasible search, and the thresholds of rewards that it finds."""

import math
from typing import Any

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.losses import find_objective
from slimepo.onpolicy.pairs import preference_rows
from slimepo.onpolicy.settings import Admission, rollout_settings
from slimepo.onpolicy.thresholds import all_tried, ask, next_threshold, no_pulls, tell
from tests.onpolicy.test_rollouts import letters, rollout_of


def pulled(rewards: list[float], residuals: list[float], rounds: int, radius: float = 0.3) -> list[int]:
    """Which arms are pulled when each gives its mean with a little noise."""
    random, arms, taken = np.random.default_rng(0), no_pulls(len(rewards)), []
    for _ in range(rounds):
        arm = ask(arms, radius)
        taken.append(arm)
        noise = random.normal(scale=0.05, size=2)
        arms = tell(arms, arm, rewards[arm] + noise[0], residuals[arm] + noise[1])
    return taken


def test_every_arm_is_pulled_once_and_in_the_end_the_best_feasible_one() -> None:
    """The first has the highest reward and breaks the constraint; of the others the second has more."""
    taken = pulled([0.9, 0.7, 0.5], [0.2, -0.1, -0.3], 600)
    assert taken[:3] == [0, 1, 2]
    assert taken[-100:].count(1) > 90


def test_where_none_is_feasible_the_least_violation_is_taken() -> None:
    taken = pulled([0.9, 0.7, 0.5], [0.5, 0.2, 0.4], 600)
    assert taken[-100:].count(1) > 90


def test_bounds_worked_by_hand() -> None:
    """After 3 and 1 pulls: radius sqrt(ln 4 / n) is 0.68 and 1.18 with a radius of 1."""
    arms = no_pulls(2)
    for _ in range(3):
        arms = tell(arms, 0, 0.5, -1.0)
    arms = tell(arms, 1, 0.1, -1.0)
    near, far = (math.sqrt(math.log(4) / n) for n in (3, 1))
    assert 0.5 + near < 0.1 + far
    assert ask(arms, 1.0) == 1
    assert ask(arms, 0.0) == 0
    # Of equal arms the first.
    assert ask(tell(tell(no_pulls(2), 0, 1.0, 0.0), 1, 1.0, 0.0), 0.1) == 0


def test_a_discount_forgets() -> None:
    arms = tell(tell(no_pulls(2), 0, 1.0, 0.5, discount=0.5), 0, 3.0, 0.0, discount=0.5)
    assert arms.pulls.tolist() == [1.5, 0.0]
    assert (arms.rewards[0] / arms.pulls[0], arms.residuals[0]) == (pytest.approx(3.5 / 1.5), 0.25)


ADMIT = Admission(thresholds=[0.0, 0.5, 1.0], share=0.5, radius=0.0, discount=1.0)


def line(step: int, threshold: float, rewards: list[float | None], pairs: int) -> dict[str, Any]:
    return {"step": step, "threshold": threshold, "rewards": rewards, "pairs": pairs}


def test_a_thresholds_reward_is_what_the_samples_gain_until_the_next_rollout() -> None:
    """Two steps a rollout, a prompt each; gains 0.1, 0.3 and -0.2, and pairs 1, 0.5 and 0 a prompt."""
    lines = [
        line(1, 0.0, [0.2, None], 1), line(2, 0.0, [0.2], 1), line(3, 0.5, [0.3, 0.3], 1), line(4, 0.5, [0.3], 0),
        line(5, 1.0, [0.6], 0), line(6, 1.0, [0.6], 0), line(7, 0.0, [0.4], 1), line(8, 0.0, [0.4], 1),
    ]  # fmt: skip
    history = all_tried(lines, ADMIT, steps=2)
    assert [(each.arm, round(each.reward, 6), each.pairs) for each in history] == [
        (0, 0.2, 1.0), (1, 0.3, 0.5), (2, 0.6, 0.0), (0, 0.4, 1.0),
    ]  # fmt: skip
    # Each once at first; then of the two that give half a pair a prompt the one with the larger gain.
    assert [next_threshold(history[:n], ADMIT) for n in (0, 1, 2, 3, 4)] == [0.0, 0.0, 0.5, 1.0, 0.5]
    # What was not rewarded at all says nothing.
    nothing = [*history[:1], history[1]._replace(reward=math.nan), *history[2:]]
    assert next_threshold(nothing, ADMIT) == 0.0


def test_pairs_below_the_threshold_are_left_out() -> None:
    settings = rollout_settings(
        {"samples": 2, "admit": {"thresholds": [0, 1]}}, "slime", find_objective("slime")
    )
    assert settings is not None
    rollout = rollout_of([["a", "b"], ["c", "d"], ["e", "f"]], [[1.0, 0.0], [0.2, 0.6], [0.5, 0.5]])
    kept = {
        least: [letters(row) for row in preference_rows(rollout, settings, find_objective("slime"), least)]
        for least in (0.0, 0.4, 0.41)
    }
    both = [["a", "b"], ["d", "c"]]
    # 0.6 - 0.2 is a little less than 0.4 as numbers are rounded.
    assert kept == {0.0: both, 0.4: both, 0.41: both[:1]}


@pytest.mark.parametrize(
    ("loss", "admit", "words"),
    [
        ("slime", {"thresholds": [0]}, "admit.thresholds"),
        ("slime", {"thresholds": [0, 0]}, "rising numbers of 0 or more"),
        ("slime", {"thresholds": [-1, 0]}, "rising numbers of 0 or more"),
        ("slime", {}, "admit.thresholds is missing"),
        ("slime", {"thresholds": [0, 1], "share": 0}, "admit.share"),
        ("slime", {"thresholds": [0, 1], "radius": -1}, "admit.radius"),
        ("slime", {"thresholds": [0, 1], "discount": 1.5}, "admit.discount"),
        ("grpo", {"thresholds": [0, 1]}, "admit is for objectives on pairs"),
        ("kto", {"thresholds": [0, 1]}, "leave pairs, admit and against out"),
    ],
)
def test_what_is_refused(loss: str, admit: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        rollout_settings({"admit": admit}, loss, find_objective(loss))
