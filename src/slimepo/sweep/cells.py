"""The cells of a sweep: each a whole recipe in a run folder of its own, and what several of them share."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.evaluation.judge.request import Scores
from slimepo.evaluation.score_files import read_scores
from slimepo.evaluation.settings import has_option
from slimepo.files import read_json, write_text
from slimepo.pipeline.evaluate import evaluations_of
from slimepo.pipeline.folder import EVAL_FOLDER, check_folder, made_from, mark_folder
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.schema import ALSO_OF_PAIRS, Recipe
from slimepo.pipeline.recipe.sections import Stage
from slimepo.settings import dump, set_value, validate
from slimepo.sweep.settings import Keys, Sweep, arms_of
from slimepo.words import nearest


@dataclass(frozen=True)
class Cell:
    """One run: of an arm, at a point of the search, with a seed. The last stage of its recipe is the one compared."""

    arm: str
    point: Keys
    recipe: Recipe
    folder: Path

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[-1]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name} seed {self.recipe.seed}"

    @property
    def scores(self) -> list[Scores]:
        """What benchmarks say of the compared stage's model."""
        return stage_scores(self.folder, self.stage.name)

    @property
    def done(self) -> bool:
        """Whether it is trained and scored, as `is_done`."""
        return is_done(self.recipe, self.folder, self.stage.name)


def stage_scores(folder: Path, stage: str) -> list[Scores]:
    """What benchmarks say of the model of a stage in a run folder."""
    of_all = [scores for file in read_scores(folder / EVAL_FOLDER) for scores in file.scores]
    return [scores for scores in of_all if scores.model == f"{folder.name}-{stage}"]


def is_done(recipe: Recipe, folder: Path, stage: str) -> bool:
    """Whether a stage in a run folder is trained, and scored by every benchmark that its recipe asks for."""
    if read_json(folder / stage / "stage.json") is None:
        return False
    entries = [] if recipe.smoke else evaluations_of(recipe, stage)
    # Where a benchmark has no judge that it needs, answers are all that it writes.
    asked = {each.benchmark for each in entries if each.judge or not has_option(each.benchmark, "judge")}
    # A score names the version too: arena-hard-v0.1.
    scored = {scores.identity.benchmark for scores in stage_scores(folder, stage)}
    return all(any(name.startswith(each) for name in scored) for each in asked)


def cell_recipe(base: Keys, compared: str | None, name: str, keys: Keys, seed: int) -> Recipe:
    """A recipe cut down to one stage and what that needs; it is called `name`, comes last, and has the arm's keys.

    base: the recipe's keys. compared: the stage's name there; its last stage where that is None.

    Raises:
        InputError: a key of the arm is no key, or its value is wrong.
    """
    place = f"sweep: arm {name!r}"
    # What a run's own recipe says of them, one seed of 0, is what every recipe without a word does.
    own = next((key for key in ("seed", "seeds") if base.get(key)), None)
    if own is not None:
        raise InputError(
            f"sweep: its recipe has {own} = {base[own]}, and every arm runs with the sweep's own: give seeds there, "
            f"and leave {own} out (overrides: {{{own}: null}})"
        )
    values = copy.deepcopy({key: value for key, value in base.items() if key != "seeds"}) | {"seed": seed}
    plain = make_recipe(values, "sweep: its recipe")
    if plain.push_to_hub is not None:
        raise InputError(
            "sweep: push_to_hub would send every run to one name: push the one you want, `slimepo push`"
        )
    compared = compared or validate(Stage, values["stages"][-1], place).name
    stage = next((stage for stage in plain.stages if stage.name == compared), None)
    if stage is None:
        names = [stage.name for stage in plain.stages]
        raise InputError(
            f"sweep: there is no stage {compared!r}{nearest(compared, names)}; there are: {', '.join(names)}"
        )
    entry = next(each for each in values["stages"] if validate(Stage, each, place).name == compared)
    # What is cut away before it must not move its start.
    entry |= {"name": name, "start": plain.start_of(stage)}
    for key, value in keys.items():
        first = key.partition(".")[0]
        if first not in Stage.model_fields and first not in Recipe.model_fields:
            hint = nearest(first, [*Stage.model_fields, *Recipe.model_fields])
            raise InputError(f"{place}: {key!r} is no key of a stage or of a recipe{hint}")
        # A section of an arm may be another arm's too (an alias in the file), and a later key writes into it.
        set_value(entry if first in Stage.model_fields else values, key, copy.deepcopy(value))
    for entry in values.get("evaluate") or ():
        entry["stages"] = [name if each == compared else each for each in entry.get("stages") or [compared]]
    whole = make_recipe(values, place)
    # In rounds it is the last one that counts.
    last_round = f"{name}-{values.get('rounds', 1)}"
    last = last_round if last_round in [each.name for each in whole.stages] else name
    return make_recipe(_cut_down(whole, name, last, plain.parts), place)


def _cut_down(whole: Recipe, name: str, last: str, parts: Mapping[str, float]) -> dict[str, Any]:
    """The keys of a recipe with stage `last` and what that needs alone; what is for `name` is for `last`.

    parts: the split, that of the recipe as it was, whatever is cut away.
    """
    kept = needed_by(whole, [last])
    cut = whole.model_dump()
    cut["stages"] = [
        {**of_stage, "start": whole.start_of(stage)}
        for of_stage, stage in zip(cut["stages"], whole.stages, strict=True)
        if stage.name in kept
    ]
    named = {of_stage["part"] for of_stage in cut["stages"]}
    cut["pairs"] = {part: made for part, made in cut["pairs"].items() if part in named}
    if not cut["pairs"]:
        # What was for other arms' pairs would be refused as read by nothing.
        for section, idle in ALSO_OF_PAIRS.items():
            asked = cut[section]
            if asked and not (asked.get("path") or asked["heldout"]):
                cut[section] = {key: value for key, value in asked.items() if key not in idle}
    if whole.data.path is not None and whole.data.parts is None:
        cut["data"]["parts"] = parts
    for entry in cut["evaluate"]:
        entry["stages"] = [
            last if each == name else each for each in entry["stages"] if each in {name, *kept}
        ]
    cut["evaluate"] = [entry for entry in cut["evaluate"] if entry["stages"]]
    return cut


def cell_at(sweep: Sweep, base: Keys, arm: str, point: Keys, seed: int, folder: Path) -> Cell:
    """The cell of an arm at a point of the grid with a seed, in `folder/seed-N`."""
    recipe = cell_recipe(base, sweep.stage, arm, arms_of(sweep)[arm] | point, seed)
    return Cell(arm, point, recipe, folder / f"seed-{seed}")


def needed_by(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """These stages and all that they need, and that needs, in the recipe's order."""
    found = set(names)
    for stage in reversed(recipe.stages):
        found |= set(recipe.needs(stage)) if stage.name in found else set()
    return [stage.name for stage in recipe.stages if stage.name in found]


def shared_parts(cell: Cell) -> tuple[list[str], list[str]]:
    """The stages before the compared one, and the pairs that are samples of those or of the recipe's own model."""
    # In rounds the compared stage is the last of several: NAME, NAME-2, ...
    rounds = int(cell.stage.name.removeprefix(f"{cell.arm}-")) if cell.stage.name != cell.arm else 1
    own = [cell.arm, *(f"{cell.arm}-{number}" for number in range(2, rounds + 1))]
    stages = [stage.name for stage in cell.recipe.stages if stage.name not in own]
    pairs = cell.recipe.pairs.items()
    return stages, [name for name, made in pairs if made.model is None or made.model in stages]


def shared_recipe(cell: Cell) -> Recipe:
    """The recipe of what a cell has in common with others; its own, where that is pairs of the recipe's model alone."""
    stages, pairs = shared_parts(cell)
    kept = {
        "stages": [stage for stage in cell.recipe.stages if stage.name in stages] or cell.recipe.stages,
        "pairs": {name: cell.recipe.pairs[name] for name in pairs},
        "evaluate": [entry for entry in cell.recipe.evaluate if set(entry.stages) <= set(stages)],
    }
    return cell.recipe.model_copy(update=kept)


def by_shared(cells: Sequence[Cell], out: Path) -> dict[Path, list[Cell]]:
    """Folders for what cells have in common, each with those cells; a cell that has nothing so is in none."""
    found: dict[Path, list[Cell]] = {}
    for cell in cells:
        stages, pairs = shared_parts(cell)
        if stages or pairs:
            settings = json.dumps(
                [made_from(cell.recipe, name) for name in (*stages, *pairs)], sort_keys=True
            )
            digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
            found.setdefault(out / f"seed-{cell.recipe.seed}-{digest}", []).append(cell)
    return found


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    """Put a recipe into its run folder, for an ordinary `slimepo run`; its file there.

    Raises:
        InputError: the folder holds another run.
    """
    check_folder(recipe, folder, restart=False)
    folder.mkdir(parents=True, exist_ok=True)
    mark_folder(folder)
    write_text(folder / "recipe.yaml", dump(recipe))
    return folder / "recipe.yaml"


def link_shared(cell: Cell, shared: Path) -> None:
    """Let the cell's folder hold what was made for several: its run finds these stages done."""
    stages, pairs = shared_parts(cell)
    for name in (*stages, *pairs):
        link = cell.folder / name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(shared / name, cell.folder), target_is_directory=True)
