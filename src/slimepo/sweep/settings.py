"""What a sweep's file says: arms, points of a grid or of a search, and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from slimepo.errors import InputError
from slimepo.settings import Settings, read_mapping, set_key, validate
from slimepo.words import nearest, short_number

# Words for a recipe that stand for the built-in world: pairs made beforehand, or answers sampled while it trains.
WORLDS = ("world", "world/online")

Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
# Keys of a recipe or a stage, `loss_options.beta` among them, with their values.
Keys = dict[str, Any]


class Search(Settings):
    """What is tried out for every arm before its seeds are run: the same points for each, on seeds of their own.

    `grid` lists values of keys, all combinations of which are tried; or `range` gives the lowest and the highest value
    of each, and optuna chooses `trials` points there (by powers of ten where the bounds are a factor of ten apart).
    The point with the best mean of the figure `by` is taken: the largest, or the smallest with `smallest`.
    """

    by: str
    seeds: Seeds
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    range: dict[str, tuple[float, float]] = Field(default_factory=dict)
    trials: int = Field(0, ge=0)
    smallest: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Search:
        if bool(self.grid) == bool(self.range) or bool(self.range) != bool(self.trials):
            raise ValueError("give grid, or range and trials")
        for key, (low, high) in self.range.items():
            if low >= high:
                raise ValueError(f"range.{key}: {low:g} is not below {high:g}")
        return self


class Sweep(Settings):
    """A comparison: every arm sets keys of one stage of a recipe, and is run with every seed.

    `recipe` is a recipe's file, seen from this file, or `world` or `world/online`, the built-in world; `overrides` are
    set in it first. `stage` is the stage compared (the last one unless given). Keys of an arm are those of the stage,
    or of the recipe (`data.limit`). `grid` multiplies the arms by all combinations of its values. Stages before the
    compared one, and pairs, are made once for all arms that have the same. `against` names the arm that the others are
    compared with, seed by seed; the first one unless given. `measures` are the figures that the table shows.
    """

    recipe: str
    overrides: Keys = Field(default_factory=dict)
    stage: str | None = None
    arms: dict[str, Keys] = Field(min_length=1)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    search: Search | None = None
    seeds: Seeds
    against: str | None = None
    measures: list[str] = Field(default_factory=list)


def load_sweep(path: Path, overrides: Sequence[str] = (), *, world: bool = False) -> Sweep:
    """Read a sweep's file and set `key=value` overrides. Its key `world` holds what differs in the built-in world.

    Raises:
        InputError: the file, a key or a value is wrong.
    """
    values = read_mapping(path, "sweep")
    in_world = values.pop("world", None)
    if world:
        if in_world is None and values.get("recipe") not in WORLDS:
            raise InputError(f"sweep {path}: it has no key `world`, which says what the arms are there")
        if values.get("recipe") not in WORLDS:
            values |= {"recipe": "world", "overrides": {}, "stage": None} | (in_world or {})
    for override in overrides:
        set_key(values, override)
    sweep = validate(Sweep, values, f"sweep {path}")
    names = list(arms_of(sweep))
    if sweep.against is not None and sweep.against not in names:
        hint = nearest(sweep.against, names)
        raise InputError(
            f"sweep {path}: against {sweep.against!r} is no arm{hint}; there are: {', '.join(names)}"
        )
    if sweep.search is not None and set(sweep.search.seeds) & set(sweep.seeds):
        raise InputError(
            f"sweep {path}: a seed that chose the settings cannot judge them: give search.seeds others"
        )
    if sweep.recipe not in WORLDS:
        sweep = sweep.model_copy(update={"recipe": str(path.parent / sweep.recipe)})
    return sweep


def arms_of(sweep: Sweep) -> dict[str, Keys]:
    """The keys that each arm sets, by its name; an arm stands there once for every point of the grid."""
    return {
        f"{name}-{label(point)}" if point else name: keys | point
        for name, keys in sweep.arms.items()
        for point in points_of(sweep.grid)
    }


def points_of(grid: Mapping[str, Sequence[Any]]) -> Iterable[Keys]:
    """All combinations of the values; one empty point without any."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def label(point: Keys) -> str:
    """A point in a name: `1e-4`; of several keys `learning_rate=1e-4-beta=0.1`."""
    words = {
        key.rpartition(".")[2]: short_number(value) if isinstance(value, int | float) else str(value)
        for key, value in point.items()
    }
    return "-".join(words.values() if len(words) == 1 else [f"{key}={word}" for key, word in words.items()])
