"""What a family of tasks is made of. Plain data and functions; the families are in `tasks_*.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Problem:
    """What a family draws: the texts for the template's slots, the right answer, and the facts behind it."""

    slots: dict[str, str]
    gold: str
    numbers: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A prompt with its right answer and the facts that a checker needs, so that no prompt is ever parsed."""

    family: str
    prompt: str
    gold: str
    numbers: tuple[int, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The problem whatever its wording: two tasks with one key differ in phrasing only."""
        return "|".join([self.family, *map(str, self.numbers), *self.words])


@dataclass(frozen=True)
class Family:
    """One kind of task.

    `draw` makes a problem. `valid` says whether an answer has the form that the task asks for. `slips` lists
    well-formed wrong answers that are typical here, and `malformed` answers in a wrong form; both may list
    too much (`slimepo.playground.tasks` keeps what fits), but always something that fits. `right` says whether a
    valid answer is a right one; by default only the gold answer's own text is.
    """

    name: str
    templates: tuple[str, ...]
    draw: Callable[[Random], Problem]
    valid: Callable[[Task, str], bool]
    slips: Callable[[Task, Random], list[str]]
    malformed: Callable[[Task, Random], list[str]]
    right: Callable[[Task, str], bool] = lambda task, answer: answer == task.gold


def matches(pattern: str) -> Callable[[Task, str], bool]:
    """Whether the whole answer is of this form, whatever the task."""
    return lambda _, answer: re.fullmatch(pattern, answer) is not None


def joined(numbers: Sequence[int]) -> str:
    """Numbers as the world writes a list of them: one space between."""
    return " ".join(map(str, numbers))


def without(items: Sequence[int], index: int) -> list[int]:
    """The items but for the one at `index`."""
    return [item for at, item in enumerate(items) if at != index]


def transposed(text: str, rng: Random) -> str:
    """The text with two neighbours swapped, somewhere."""
    at = rng.randrange(len(text) - 1)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def one_lost(text: str, rng: Random) -> str:
    """The text with one character missing, somewhere."""
    at = rng.randrange(len(text))
    return text[:at] + text[at + 1 :]


def wordy(answer: str) -> list[str]:
    """Wrong forms that any answer can take: a sentence around it, a full stop, the answer again and again."""
    return [f"The answer is {answer}", f"{answer}.", answer + f", {answer}" * 2]
