"""The data of the built-in world: tasks and noisy demonstrations, each a function of a seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

from slimepo.errors import InputError
from slimepo.playground.families import Task
from slimepo.playground.tasks import FAMILIES, make_task, malformed, slip
from slimepo.types import Message, Preference

_MOST_REDRAWS = 1_000


def make_tasks(count: int, seed: int, exclude: Collection[str] = frozenset()) -> list[Task]:
    """`count` tasks in random order, the families as even as they divide, no problem twice.

    exclude: keys (`Task.key`) of problems that must not appear, whatever their wording: held-out tasks are
    made first, and their keys are excluded from the training tasks. The seed alone decides the result.
    Raises InputError when a family has no more problems to give.
    """
    seen = set(exclude)
    tasks = []
    names = list(FAMILIES)
    rng = Random(f"tasks/{seed}")
    for index in range(count):
        task = _new_task(names[index % len(names)], rng, seen)
        seen.add(task.key)
        tasks.append(task)
    rng.shuffle(tasks)
    return tasks


def _new_task(family: str, rng: Random, seen: set[str]) -> Task:
    for _ in range(_MOST_REDRAWS):
        task = make_task(family, rng)
        if task.key not in seen:
            return task
    raise InputError(f"the playground's family {family!r} has no new problems left: ask for fewer tasks")


def demonstrations(
    tasks: Sequence[Task],
    seed: int,
    *,
    right: float = 0.45,
    slip_share: float = 0.35,
    malformed_share: float = 0.20,
) -> list[Preference]:
    """One demonstration a task, noisy on purpose: right, wrong by a slip, or right in a wrong form.

    The shares are probabilities and sum to 1. With clean demonstrations supervised training leaves nothing
    for a preference objective to teach; a share of typical mistakes is what real demonstrations have too.
    Each demonstration is a function of the seed and its task, whatever else is in the list.
    """
    shares = (right, slip_share, malformed_share)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise InputError(
            f"the shares of demonstrations are {shares}: give three that sum to 1, none negative"
        )
    return [_demonstration(task, Random(f"demonstration/{seed}/{task.prompt}"), shares) for task in tasks]


def _demonstration(task: Task, rng: Random, shares: tuple[float, float, float]) -> Preference:
    (kind,) = rng.choices(("right", "slip", "malformed"), weights=shares)
    answer = task.gold if kind == "right" else (slip if kind == "slip" else malformed)(task, rng)
    return Preference(user_turn(task), assistant_turn(answer), [], source=f"playground:{task.key}:{kind}")


def user_turn(task: Task) -> list[Message]:
    """The task as the prompt of a conversation."""
    return [Message(role="user", content=task.prompt)]


def assistant_turn(answer: str) -> list[Message]:
    """An answer as the response of a conversation."""
    return [Message(role="assistant", content=answer)]
