"""Rewards of a user's own: what they are given, their weighted sum, and every way in which they fail."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from slimepo.errors import InputError
from slimepo.onpolicy.rewards import Prompt, Rewarder, named_rewards
from slimepo.types import Message

PROMPT = Prompt("7", [Message(role="user", content="two?")], {"prompt": "two?", "answer": "2"}, [5, 6])


def exact(prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]) -> list[float]:
    return [float(text == row["answer"]) for text in completions]


def length(prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]) -> list[float]:
    return [len(text) for text in completions]


def test_a_reward_sees_the_prompt_the_completions_and_the_row() -> None:
    seen: list[Any] = []

    def spy(*given: Any) -> list[float]:
        seen.append(given)
        return [0.0, 1.0]

    Rewarder({"spy": (spy, 1.0)})(PROMPT, ["a", "b"])
    assert seen == [([{"role": "user", "content": "two?"}], ["a", "b"], {"prompt": "two?", "answer": "2"})]


def test_what_a_reward_does_to_what_it_was_given_stays_with_it() -> None:
    def rude(prompt: list[Message], completions: list[str], row: dict[str, Any]) -> list[float]:
        prompt.clear(), row.clear()
        return [float(len(completions.pop())), 0.0]

    totals, _, _ = Rewarder({"rude": (rude, 1.0), "exact": (exact, 1.0)})(PROMPT, ["2", "bbb"])
    assert totals == [3.0 + 1.0, 0.0]
    assert PROMPT.messages
    assert PROMPT.row


def test_several_are_added_up_by_their_weights() -> None:
    rewarder = Rewarder({"exact": (exact, 2.0), "length": (length, -0.1)})
    totals, parts, why = rewarder(PROMPT, ["2", "three"])
    # 2 * 1 - .1 * 1, and 2 * 0 - .1 * 5.
    assert totals == pytest.approx([1.9, -0.5])
    assert parts == {"exact": [1, 0], "length": [1, 5]}
    assert why == ""


@pytest.mark.parametrize("values", [(True, False), np.array([1, 0]), iter([1.0, 0.0])])
def test_numbers_of_any_kind_will_do(values: Any) -> None:
    assert Rewarder({"own": (lambda *_: values, 1.0)})(PROMPT, ["a", "b"])[0] == [1.0, 0.0]


class Ahead:
    """Works on all prompts at once, and knows no other."""

    def __init__(self, fails: bool = False) -> None:
        self.seen: list[Any] = []
        self.fails = fails

    def look_ahead(self, prompts: Any, completions: Any) -> None:
        if self.fails:
            raise OSError("no connection")
        self.seen.append(
            [(turns[0]["content"], list(texts)) for turns, texts in zip(prompts, completions, strict=True)]
        )

    def __call__(self, prompt: Any, completions: Any, row: Any) -> list[float]:
        ((_, texts),) = [each for each in self.seen[-1] if each[0] == prompt[0]["content"]]
        return [float(texts.index(text)) for text in completions]


def test_a_reward_that_looks_ahead_sees_all_prompts_before_it_is_asked_for_each() -> None:
    ahead = Ahead()
    prompts = [replace(PROMPT, id=str(n), messages=[Message(role="user", content=f"p{n}")]) for n in range(2)]
    found = Rewarder({"ahead": (ahead, 1.0), "length": (length, 10.0)}).of_all(prompts, [["a", "bb"], ["c"]])
    assert ahead.seen == [[("p0", ["a", "bb"]), ("p1", ["c"])]]
    assert [totals for totals, _, _ in found] == [[10.0, 21.0], [10.0]]


def test_one_that_fails_at_that_stops_the_run_or_is_asked_for_each() -> None:
    with pytest.raises(InputError, match="reward 'ahead' fails: OSError: no connection"):
        Rewarder({"ahead": (Ahead(fails=True), 1.0)}).of_all([PROMPT], [["a"]])
    ((_, _, why),) = Rewarder({"ahead": (Ahead(fails=True), 1.0)}, "skip").of_all([PROMPT], [["a"]])
    assert "on row 7" in why


def test_looking_ahead_has_the_time_of_all_its_prompts() -> None:
    class Slow(Ahead):
        def look_ahead(self, prompts: Any, completions: Any) -> None:
            super().look_ahead(prompts, completions)
            time.sleep(0.3)

    prompts, texts = [PROMPT, PROMPT], [["a"], ["b"]]
    words = r"reward 'ahead' took more than 0.1 s on 2 prompts; rollouts: {on_error: skip}"
    with pytest.raises(InputError, match=words):
        Rewarder({"ahead": (Slow(), 1.0)}, timeout=0.05).of_all(prompts, texts)
    assert Rewarder({"ahead": (Slow(), 1.0)}, timeout=30).of_all([PROMPT], [["a"]])[0][0] == [0.0]
    assert Rewarder({"ahead": (Slow(), 1.0)}, "skip", timeout=0.05).of_all([PROMPT], [["a"]])[0][0] == [0.0]


def raises(*_: Any) -> list[float]:
    raise KeyError("gold")


def slow(*_: Any) -> list[float]:
    time.sleep(0.5)
    return [0.0, 0.0]


def fails_while_it_is_read(*_: Any) -> Iterator[float]:
    yield 1.0
    raise KeyError("gold")


def slow_while_it_is_read(*_: Any) -> Iterator[float]:
    yield 1.0
    time.sleep(0.5)
    yield 0.0


FAILURES = [
    (raises, "reward 'own' fails on row 7: KeyError: 'gold'"),
    (lambda *_: [1.0], "gave 1 numbers for 2 completions on row 7"),
    (lambda *_: [1.0, math.nan], r"gave \[1.0, nan\] on row 7: every reward is a finite number"),
    (lambda *_: [1.0, math.inf], "every reward is a finite number"),
    (lambda *_: 1.0, "gave no list of numbers on row 7: 1.0"),
    (lambda *_: None, "gave no list of numbers on row 7: None"),
    (lambda *_: ["good", "bad"], "gave no list of numbers"),
    (lambda *_: [None, 1.0], "gave no list of numbers"),
    (lambda *_: "10", "gave no list of numbers on row 7: '10'"),
    (lambda *_: {1.0: "a", 0.0: "b"}, "gave no list of numbers"),
    (lambda *_: {1.0, 0.0}, "gave no list of numbers"),
    (lambda *_: torch.zeros(2, 2), "gave no list of numbers"),
    (fails_while_it_is_read, "reward 'own' fails on row 7: KeyError: 'gold'"),
    (slow_while_it_is_read, "reward 'own' took more than 0.05 s on row 7"),
    (slow, "reward 'own' took more than 0.05 s on row 7"),
]


@pytest.mark.parametrize(("function", "message"), FAILURES)
def test_a_failure_names_the_reward_and_the_row_and_the_way_out(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"{message}.*; rollouts: {{on_error: skip}}"):
        Rewarder({"own": (function, 1.0)}, timeout=0.05)(PROMPT, ["a", "b"])


@pytest.mark.parametrize(("function", "message"), FAILURES)
def test_or_leaves_the_prompt_out_and_says_why(function: Any, message: str) -> None:
    rewarder = Rewarder({"exact": (exact, 1.0), "own": (function, 1.0)}, on_error="skip", timeout=0.05)
    totals, parts, why = rewarder(PROMPT, ["2", "b"])
    assert all(map(math.isnan, [*totals, *parts["exact"], *parts["own"]]))
    assert why.startswith("reward 'own'")
    assert "skip" not in why


def test_what_is_quick_enough_has_its_value() -> None:
    assert Rewarder({"exact": (exact, 1.0)}, timeout=30)(PROMPT, ["2"])[0] == [1.0]


def test_a_timeout_does_not_wait_for_what_is_too_slow() -> None:
    started = time.perf_counter()
    Rewarder({"own": (slow, 1.0)}, on_error="skip", timeout=0.01)(PROMPT, ["a", "b"])
    assert time.perf_counter() - started < 0.4


@pytest.mark.parametrize(
    ("function", "weight", "message"),
    [
        (lambda prompt, completions: [0.0], 1.0, r"called with \(prompt, completions, row\): too many"),
        (lambda completions, **columns: [0.0], 1.0, "too many positional"),
        (lambda prompt, completions, row, judge: [0.0], 1.0, "missing a required argument: 'judge'"),
        (exact, math.nan, "the weight of reward 'own' = nan is out of range"),
        (1.0, 1.0, "not a function"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_before_anything_is_sampled(
    function: Any, weight: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        named_rewards({"own": (function, weight)})
