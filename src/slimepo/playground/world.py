"""The data of the built-in world: tasks and noisy demonstrations, each a function of a seed, and their files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field, field_validator

from slimepo.errors import InputError
from slimepo.files import write_json_lines
from slimepo.playground.families import Task
from slimepo.playground.tasks import FAMILIES, USUAL, make_task, malformed, slip
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.settings import Settings
from slimepo.types import Message, Preference

_MOST_REDRAWS = 1_000
# Held-out tasks are drawn with another seed than those trained on.
_HELDOUT_SEED = 1_000_003


class WorldSettings(Settings):
    """How many tasks of which families, and how noisy the demonstrations are (shares that sum to 1)."""

    demonstrations: int = Field(ge=1)
    preference_prompts: int = Field(ge=1)
    heldout_prompts: int = Field(ge=1)
    right: float = Field(0.45, ge=0, le=1)
    slip: float = Field(0.35, ge=0, le=1)
    malformed: float = Field(0.20, ge=0, le=1)
    families: tuple[str, ...] = Field(USUAL, min_length=1)

    @field_validator("families")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in FAMILIES:
                raise ValueError(f"there is no family {name!r}: {', '.join(FAMILIES)}")
        return tuple(dict.fromkeys(names))


def write_world(settings: WorldSettings, seed: int, folder: Path) -> None:
    """The world of a seed as files: a tokenizer, demonstrations.jsonl, and the tasks tasks.jsonl and heldout.jsonl.

    No held-out problem is among those trained on, whatever its wording.
    """
    families = settings.families
    heldout = make_tasks(settings.heldout_prompts, seed + _HELDOUT_SEED, families=families)
    total = settings.demonstrations + settings.preference_prompts
    tasks = make_tasks(total, seed, exclude={task.key for task in heldout}, families=families)
    demonstrated, compared = tasks[: settings.demonstrations], tasks[settings.demonstrations :]
    shares = {"right": settings.right, "slip_share": settings.slip, "malformed_share": settings.malformed}
    rows = demonstrations(demonstrated, seed, **shares)
    build_tokenizer().save_pretrained(folder / "tokenizer")
    shown = ({"prompt": row.prompt[0]["content"], "completion": row.chosen[0]["content"]} for row in rows)
    write_json_lines(folder / "demonstrations.jsonl", shown)
    write_json_lines(folder / "tasks.jsonl", map(task_row, compared))
    write_json_lines(folder / "heldout.jsonl", map(task_row, heldout))


def task_row(task: Task) -> dict[str, Any]:
    """A task as a row of a recipe's `tasks` file, which `slimepo.playground.tasks.judge` is called with."""
    return {
        "id": task.key,
        "family": task.family,
        "prompt": task.prompt,
        "answer": task.gold,
        "numbers": task.numbers,
        "words": task.words,
    }


def make_tasks(
    count: int, seed: int, exclude: Collection[str] = frozenset(), families: Sequence[str] = USUAL
) -> list[Task]:
    """`count` tasks in random order, the families as even as they divide, no problem twice.

    exclude: keys (`Task.key`) of problems that must not appear, whatever their wording: held-out tasks are
    made first, and their keys are excluded from the training tasks. The seed alone decides the result.
    Raises InputError when a family has no more problems to give.
    """
    seen = set(exclude)
    tasks = []
    rng = Random(f"tasks/{seed}")
    for index in range(count):
        family = families[index % len(families)]
        drawn = (make_task(family, rng) for _ in range(_MOST_REDRAWS))
        task = next((task for task in drawn if task.key not in seen), None)
        if task is None:
            raise InputError(
                f"the playground's family {family!r} has no new problems left: ask for fewer tasks"
            )
        seen.add(task.key)
        tasks.append(task)
    rng.shuffle(tasks)
    return tasks


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
    rows = []
    for task in tasks:
        rng = Random(f"demonstration/{seed}/{task.prompt}")
        (kind,) = rng.choices(("right", "slip", "malformed"), weights=shares)
        answer = task.gold if kind == "right" else (slip if kind == "slip" else malformed)(task, rng)
        asked, said = Message(role="user", content=task.prompt), Message(role="assistant", content=answer)
        rows.append(Preference([asked], [said], [], source=f"playground:{task.key}:{kind}"))
    return rows
