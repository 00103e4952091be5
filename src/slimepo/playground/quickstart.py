"""The quickstart as an ordinary recipe: the built-in world's files, SFT from scratch, objectives from its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from slimepo.errors import InputError
from slimepo.files import read_json, write_json
from slimepo.losses import find_objective
from slimepo.pipeline.folder import begun, mark_folder
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.playground.tasks import USUAL
from slimepo.playground.world import WorldSettings, write_world
from slimepo.settings import Settings, read_mapping, set_key, set_value, validate
from slimepo.words import short_number

RECIPE = Path(__file__).with_name("quickstart.yaml")
WORLD = "world"
# Keys of the file that say which stages there are, and with which seed.
_OF_OBJECTIVES = ("seed", "learning_rates", "objectives")
# Keys whose own keys replace those above, in a world of that kind.
ONLINE, TOURS = "online", "tours"


class Objective(Settings):
    """One objective, under a name of its own (else its loss); its learning rates where they differ from the others'.

    `keys`: further keys of its stage. One that is `on_request` runs only when it is asked for by name.
    """

    loss: str
    name: str = ""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    learning_rates: list[float] | None = None
    keys: dict[str, Any] = Field(default_factory=dict)
    on_request: bool = False


class Quickstart(Settings):
    """What quickstart.yaml holds: the world, what is compared, and parts of a recipe as they are."""

    world: WorldSettings
    seed: int = Field(ge=0)
    model: dict[str, Any]
    tasks: dict[str, Any]
    pairs: dict[str, Any]
    sft: dict[str, Any]
    preference: dict[str, Any]
    learning_rates: list[float] = Field(min_length=1)
    objectives: list[Objective] = Field(min_length=1)


@dataclass(frozen=True)
class WorldRun:
    """A recipe, and the settings of the world whose files it names; these lie in each run's folder."""

    recipe: Recipe
    world: WorldSettings

    def write(self, recipe: Recipe, folder: Path) -> None:
        """Write the world of one seed's recipe to its run folder, unless it is there; see `write_seed`."""
        write_seed(self.world, recipe.seed, folder)


def write_seed(world: WorldSettings, seed: int, folder: Path, *, keep: bool = False) -> None:
    """Write the world of a seed to its run folder, unless it is there.

    keep: another one that is there stays, whether or not a run has begun in this folder.

    Raises:
        InputError: another world is there, and is to stay, or a run in it has begun.
    """
    asked = {"seed": seed, **world.model_dump(mode="json")}
    kept = read_json(folder / WORLD / "world.json")
    # A world of an earlier version had no families to choose from.
    if kept is not None and {"families": list(USUAL), **kept} == asked:
        return
    if kept is not None and (keep or any(begun(made) for made in folder.iterdir())):
        raise InputError(
            f"{folder} holds a run in another world; give another --out{'' if keep else ', or --restart'}"
        )
    mark_folder(folder)
    write_world(world, seed, folder / WORLD)
    write_json(folder / WORLD / "world.json", asked)


def load_quickstart(
    out: Path,
    overrides: Sequence[str] = (),
    objectives: Sequence[str] = (),
    *,
    seeds: int = 1,
    online: bool = False,
    path: Path = RECIPE,
) -> WorldRun:
    """The quickstart's recipe for the folder `out`, with `key=value` overrides.

    Args:
        out: the run folder; with several seeds, the folder of theirs.
        overrides: such as `preference.epochs=1` or `objectives.slime.loss_options.hard_margin=2`.
        objectives: names to run instead of the listed ones; one that is not listed runs with its defaults. SFT on
            the chosen answers, the control, is always among them.
        seeds: so many, from `seed` on. Another seed is another world, SFT model and set of pairs.
        online: sample while training, in place of pairs that are made beforehand.

    Raises:
        InputError: a key, a value, an objective or a hyperparameter is wrong.
    """
    given = [override.partition("=")[0] for override in overrides]
    _refuse_pairs(given, online, "quickstart")
    values = _read(path, ONLINE if online else "")
    listed = values["objectives"]
    values["objectives"] = [entry for entry in listed if not entry.get("on_request")]
    if objectives:
        chosen = [entry for entry in listed if entry["loss"] == "sft"]
        for name in objectives:
            known = [entry for entry in listed if name in (entry.get("name"), entry["loss"])]
            chosen += [entry for entry in known or [{"loss": name}] if entry not in chosen]
        values["objectives"] = chosen
    for override in overrides:
        set_key(values, override)
    settings = validate(Quickstart, values, "quickstart")
    if "learning_rates" in given and all(objective.learning_rates for objective in settings.objectives):
        raise InputError(
            "quickstart: 'learning_rates' is of no use here, for every objective has its own: give "
            f"objectives.{settings.objectives[-1].name or settings.objectives[-1].loss}.learning_rates"
        )
    stages: list[dict[str, Any]] = [{"loss": "sft", "name": "sft", **settings.sft}]
    for objective in settings.objectives:
        name = objective.name or objective.loss.replace("/", "-")
        # A pair is two judged answers, so that every objective takes the same number of steps.
        answers = 2 if find_objective(objective.loss).judged else 1
        batches = {
            key: answers * size
            for key, size in settings.preference.items()
            if key in ("batch_size", "micro_batch_size")
        }
        stages += [
            {
                **settings.preference,
                **batches,
                "loss": objective.loss,
                "name": f"{name}-{short_number(rate)}",
                "loss_options": objective.loss_options,
                "learning_rate": rate,
                "start": "sft",
                **({} if online else {"part": "samples"}),
                **objective.keys,
            }
            for rate in objective.learning_rates or settings.learning_rates
        ]
    names = [stage["name"] for stage in stages]
    if len(set(names)) < len(names):
        raise InputError(f"quickstart: two objectives have the same name: {', '.join(names[1:])}")
    # Each seed's world lies in its own run folder.
    recipe = _in_world(settings, out / "seed-{seed}" if seeds > 1 else out, stages, online)
    recipe["seeds"] = list(range(settings.seed, settings.seed + seeds))
    return WorldRun(make_recipe(recipe, "quickstart"), settings.world)


def sweep_base(
    out: Path, overrides: Mapping[str, Any], *, kind: str = "", path: Path = RECIPE
) -> tuple[dict[str, Any], Callable[[int], None]]:
    """For a sweep in the world: the keys of a recipe with one stage after SFT, and what writes the world of a seed.

    overrides: keys of the quickstart's file; kind: "", online or tours. Worlds lie in `out/world`; runs that go by them
    in folders beside it.

    Raises:
        InputError: a key or a value is wrong, or of no use here.
    """
    online, left_out = kind == ONLINE, (*_OF_OBJECTIVES, ONLINE, TOURS)
    unused = next((key for key in overrides if key.partition(".")[0] in left_out), None)
    if unused is not None:
        raise InputError(f"sweep: overrides: {unused!r} is of no use here: arms, seeds and search say that")
    _refuse_pairs(overrides, online, "sweep: overrides")
    values = _read(path, kind)
    for key, value in overrides.items():
        set_value(values, key, value)
    settings = validate(Quickstart, values, "quickstart")
    part = {} if online else {"part": "samples"}
    compared = {"loss": "slime", "learning_rate": settings.learning_rates[0], **settings.preference, **part}
    stages = [{"loss": "sft", "name": "sft", **settings.sft}, compared]
    folder = out / WORLD / "seed-{seed}"
    recipe = _in_world(settings, folder, stages, online)
    return recipe, lambda seed: write_seed(
        settings.world, seed, Path(str(folder).replace("{seed}", str(seed))), keep=True
    )


def _read(path: Path, kind: str) -> dict[str, Any]:
    """The quickstart's keys, those of a `kind` of world set among them where one is asked for."""
    values = read_mapping(path, "recipe")
    kinds = {name: values.pop(name) for name in (ONLINE, TOURS)}
    for key, value in kinds.get(kind, {}).items():
        set_value(values, key, value)
    return values


def _refuse_pairs(keys: Iterable[str], online: bool, place: str) -> None:
    """InputError for a key of pairs that are made beforehand, where stages sample while they train."""
    unread = next((key for key in keys if online and key.partition(".")[0] == "pairs"), None)
    if unread is not None:
        raise InputError(
            f"{place}: {unread!r} is of no use online: preference.rollouts says how answers are sampled"
        )


def _in_world(
    settings: Quickstart, folder: Path, stages: list[dict[str, Any]], online: bool
) -> dict[str, Any]:
    world = str(folder / WORLD)
    # Without pairs that are made beforehand, it is the likelihood of the right answers that is watched.
    right = {"heldout": f"{world}/heldout.jsonl", "heldout_columns": {"completion": "answer"}}
    return {
        "model": settings.model,
        "tokenizer": f"{world}/tokenizer",
        "data": {"path": f"{world}/demonstrations.jsonl", "parts": {"sft": 1.0}, **(right if online else {})},
        "tasks": {
            "train": f"{world}/tasks.jsonl",
            "heldout": f"{world}/heldout.jsonl",
            "checker": "slimepo.playground.tasks:judge",
            **settings.tasks,
        },
        "pairs": {} if online else {"samples": {"model": "sft", **settings.pairs}},
        "stages": stages,
    }
