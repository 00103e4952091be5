"""What a sweep's file says: arms, points of a grid or of a search, and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from slimepo.errors import InputError
from slimepo.evaluation.settings import BENCHMARKS
from slimepo.imports import look_beside
from slimepo.settings import Settings, parse_value, read_mapping, set_key, validate
from slimepo.words import nearest, short_number

# Words for a recipe that stand for the built-in world: pairs made beforehand, answers sampled while it trains, and
# shortest round trips with a grammar, a repair and a cost.
WORLDS = ("world", "world/online", "world/tours")

# Folders beside those of the arms: what these have in common, the runs of the search, the built-in worlds.
SHARED, SEARCH, WORLD = "shared", "search", "world"


def _once(values: list[Any]) -> list[Any]:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} stands there twice")
    return values


# The same run counted twice would look like certainty.
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_once)]
Values = Annotated[list[Any], Field(min_length=1), AfterValidator(_once)]
# Keys of a recipe or a stage, `loss_options.beta` among them, with their values.
Keys = dict[str, Any]
# Keys of a recipe or a stage that are the sweep's own.
_NOT_OF_ARMS = {
    "name": "an arm's stage is called after it",
    "seed": "every arm runs with the sweep's seeds",
    "seeds": "every arm runs with the sweep's seeds",
    "stages": "name one stage and a key of it (stages.sft.epochs)",
}


class Search(Settings):
    """What is tried out for every arm before its seeds are run: the same points for each, on seeds of their own.

    `grid` lists values of keys, all combinations of which are tried; or `range` gives the lowest and the highest value
    of each, and optuna chooses `trials` points there (by powers of ten where the bounds are a factor of ten apart).
    The point with the best mean of the figure `by` is taken: the largest, or the smallest with `smallest`.
    """

    by: str
    seeds: Seeds
    grid: dict[str, Values] = Field(default_factory=dict)
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

    `recipe` is a recipe's file, seen from this file, or `world`, `world/online` or `world/tours`, the built-in world;
    `overrides` are set in it first. `stage` is the stage compared (the last one unless given). Keys of an arm are those
    of the stage, or of the recipe (`data.limit`). `grid` multiplies the arms by all combinations of its values. Stages
    before the compared one, and pairs, are made once for all arms that have the same. `against` names the arm that the
    others are compared with, seed by seed; the first one unless given. `measures` are the figures that the table shows.
    """

    recipe: str
    overrides: Keys = Field(default_factory=dict)
    stage: str | None = None
    arms: dict[str, Keys] = Field(min_length=1)
    grid: dict[str, Values] = Field(default_factory=dict)
    search: Search | None = None
    seeds: Seeds
    against: str | None = None
    measures: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _keys_are_set_once(self) -> Sweep:
        searched = [*self.search.grid, *self.search.range] if self.search else []
        for name, keys in self.arms.items():
            given = [*keys, *self.grid, *searched]
            for key in given:
                if key in _NOT_OF_ARMS:
                    raise ValueError(f"arm {name!r} cannot set {key!r}: {_NOT_OF_ARMS[key]}")
                if given.count(key) > 1:
                    raise ValueError(f"{key!r} is set twice, by arm {name!r}, the grid or the search")
            _refuse_lost(given, f"arm {name!r}, the grid or the search")
        _refuse_lost([*self.overrides], "overrides")
        return self

    @model_validator(mode="after")
    def _arms_have_folders(self) -> Sweep:
        names = [name for name, _ in _named(self)]
        for name in names:
            if name in (SHARED, SEARCH, WORLD) or not name or "/" in name or name.startswith("."):
                raise ValueError(f"{name!r} cannot be an arm's name: it names a folder of the sweep's")
            if names.count(name) > 1:
                raise ValueError(f"two arms are called {name!r}")
        return self


def _refuse_lost(keys: Sequence[str], place: str) -> None:
    """ValueError for a key that a later one replaces with its whole section."""
    for at, key in enumerate(keys):
        section = next((later for later in keys[at + 1 :] if key.startswith(f"{later}.")), None)
        if section is not None:
            raise ValueError(
                f"{place}: {section!r} replaces all of {section} and with it {key!r}, set before: put {section!r} first"
            )


def load_sweep(path: Path, overrides: Sequence[str] = (), *, world: bool = False) -> Sweep:
    """Read a sweep's file and set `key=value` overrides. Its key `world` holds what differs in the built-in world;
    functions of the user's own may lie beside it.

    Raises:
        InputError: the file, a key or a value is wrong.
    """
    values = read_mapping(path, "sweep")
    look_beside(path)
    in_world = values.pop("world", None)
    if not isinstance(in_world, dict | None):
        raise InputError(f"sweep {path}: world: it must be a mapping of keys")
    if world:
        if values.get("recipe") not in WORLDS:
            if in_world is None:
                raise InputError(f"sweep {path}: it has no key `world`, which says what the arms are there")
            values |= {"recipe": "world", "overrides": {}, "stage": None}
        values |= in_world or {}
    for override in overrides:
        _override(values, override)
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


def _override(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` of a sweep. Below a mapping whose keys are a recipe's, the rest of the key is one of them.

    `overrides.data.path=x` sets the recipe's `data.path`, and does not put `{path: x}` in place of its `data`.
    """
    key, _, text = override.partition("=")
    arms = values.get("arms")
    # The longest name first: an arm `dpo-0` is not the beginning of an arm `dpo-0.1`.
    names = sorted(arms if isinstance(arms, Mapping) else (), key=len, reverse=True)
    of_recipe = (
        ("overrides",),
        ("grid",),
        ("search", "grid"),
        ("search", "range"),
        *(("arms", n) for n in names),
    )
    above = next((parts for parts in of_recipe if key.startswith(f"{'.'.join(parts)}.")), None)
    if above is None:
        set_key(values, override)
        return
    keys: Any = values
    for part in above:
        # A key without a value is null in YAML.
        keys[part] = {} if keys.get(part) is None else keys[part]
        keys = keys[part]
        if not isinstance(keys, dict):
            raise InputError(f"{override}: {part} is no mapping of keys")
    keys[key.removeprefix(f"{'.'.join(above)}.")] = parse_value(text)


def arms_of(sweep: Sweep) -> dict[str, Keys]:
    """The keys that each arm sets, by its name; an arm stands there once for every point of the grid."""
    return dict(_named(sweep))


def _named(sweep: Sweep) -> list[tuple[str, Keys]]:
    return [
        (f"{name}-{label(point)}" if point else name, keys | point)
        for name, keys in sweep.arms.items()
        for point in points_of(sweep.grid)
    ]


def of_benchmark(figure: str) -> str | None:
    """The benchmark that a figure is of (`ifeval/prompt_strict`); None for held-out figures and training's."""
    head, slash, _ = figure.partition("/")
    # A score names the version too: arena-hard-v0.1/win_rate.
    return next((name for name in BENCHMARKS if slash and head.startswith(name)), None)


def points_of(grid: Mapping[str, Sequence[Any]]) -> Iterable[Keys]:
    """All combinations of the values; one empty point without any."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def ends_of(search: Search) -> list[Keys]:
    """The lowest and the highest point of a range; none without one."""
    return [{key: ends[at] for key, ends in search.range.items()} for at in (0, 1) if search.range]


def label(point: Keys) -> str:
    """A point in a name, which a folder may have: `1e-4`; of several keys `learning_rate=1e-4-beta=0.1`."""
    words = [
        (key, short_number(value) if type(value) in (int, float) else str(value).replace("/", "-"))
        for key, value in point.items()
    ]
    last = [key.rpartition(".")[2] for key in point]
    named = last if len(set(last)) == len(last) else list(point)
    return (
        words[0][1]
        if len(words) == 1
        else "-".join(f"{key}={word}" for key, (_, word) in zip(named, words, strict=True))
    )
