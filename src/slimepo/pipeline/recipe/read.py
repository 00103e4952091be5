"""A recipe from its file, with what the command line sets, checked before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.imports import look_beside
from slimepo.onpolicy.settings import rollout_settings
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import Stage
from slimepo.settings import read_mapping, set_key, validate
from slimepo.words import nearest

# Keys of `data` that are about the file under another key.
_OF_A_PATH = {
    "data.path": ("split", "format", "columns", "heldout", "heldout_split", "heldout_columns"),
    "data.heldout": ("heldout_split", "heldout_columns"),
}
logger = logging.getLogger(__name__)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, smoke: bool = False) -> Recipe:
    """Read a recipe and set the `key=value` overrides (`stages.slime.learning_rate=1e-6`).

    With another `data.path`, or `data.heldout`, what the recipe says of its own is left out, and said.

    Raises:
        InputError: the file, a key (with the nearest valid one) or a value is wrong; nothing is loaded yet.
    """
    values = read_recipe(path)
    given = [override.partition("=")[0] for override in overrides]
    for key, of_it in _OF_A_PATH.items():
        data = values.get("data")
        if key in given and isinstance(data, dict):
            # `data.heldout_limit` says nothing of `heldout`.
            here = {override.removeprefix("data.").split(".")[0] for override in given}
            others = [name for name in of_it if name in data and name not in here]
            values["data"] = {name: value for name, value in data.items() if name not in others}
            if others:
                logger.warning(
                    "note: %s is given, so %s of recipe %s are left out", key, ", ".join(others), path
                )
    for override in overrides:
        set_key(values, override)
    return make_recipe(values | ({"smoke": True} if smoke else {}), f"recipe {path}")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe's file, not checked yet; functions of the user's own may lie beside it.

    Raises:
        InputError: the file is absent, not YAML, or no mapping.
    """
    values = read_mapping(path, "recipe")
    look_beside(path)
    return values


def make_recipe(values: Mapping[str, Any], place: str = "recipe") -> Recipe:
    """Check plain values against the schema, hyperparameters of the objectives included."""
    recipe = validate(Recipe, values, place)
    if recipe.rounds > 1:
        recipe = validate(Recipe, in_rounds(recipe), place)
    from slimepo.losses import bind, find_objective

    for name, made in recipe.pairs.items():
        try:
            _ = made.rollouts
        except InputError as error:
            raise InputError(f"{place}: pairs {name!r}: {error}") from error
    for stage in recipe.stages:
        try:
            bind(stage.loss, stage.loss_options)
            objective = find_objective(stage.loss, stage.loss_options)
            rollout_settings(stage.rollouts, stage.loss, objective)
        except InputError as error:
            raise InputError(f"{place}: stage {stage.name!r}: {error}") from error
    return recipe


def in_rounds(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe whose rounds are stages of their own: NAME, NAME-2, NAME-3, ...

    Each round starts from the model of the one before, and its pairs, NAME-samples-2, ..., are samples of that.
    """
    stages, pairs = [], dict(recipe.pairs)
    for stage in recipe.stages:
        stages.append(stage)
        for number in range(2, recipe.rounds + 1) if stage.part in recipe.pairs else ():
            part, before = f"{stage.name}-samples-{number}", stages[-1].name
            pairs[part] = recipe.pairs[stage.part].model_copy(update={"model": before})
            stages.append(
                stage.model_copy(update={"name": f"{stage.name}-{number}", "start": before, "part": part})
            )
    given = {key: getattr(recipe, key) for key in recipe.model_fields_set if key != "rounds"}
    return {**given, "stages": stages, "pairs": pairs}


def one_stage_recipe(model: str, data: str, loss: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe behind `slimepo train`: one stage on all rows but one in a hundred, which are held out.

    Overrides that name a key of a stage (`learning_rate=1e-6`) set it; others set keys of the recipe.
    """
    from slimepo.losses import find_objective, hyperparameters

    values: dict[str, Any] = {
        "model": model,
        "data": {"path": data},
        "stages": [{"loss": "slime" if loss is None else loss}],
    }
    for override in overrides:
        key = override.split("=")[0].split(".")[0]
        in_stage = key in Stage.model_fields
        if not in_stage and key not in Recipe.model_fields:
            known = [*Stage.model_fields, *Recipe.model_fields]
            options = hyperparameters(find_objective(values["stages"][0]["loss"]).function)
            meant = f" (did you mean 'loss_options.{key}'?)" if key in options else nearest(key, known)
            raise InputError(f"train: unknown key {key!r}{meant}; known here: {', '.join(known)}")
        set_key(values, f"stages.0.{override}" if in_stage else override)
    recipe = make_recipe(values, "train")
    found = {
        "--model": values["model"],
        "--data": values["data"].get("path"),
        "--loss": values["stages"][0]["loss"],
    }
    for option, asked in {"--model": model, "--data": data, "--loss": loss}.items():
        if asked is not None and found[option] != asked:
            raise InputError(
                f"train: {option} {asked}, and an override that makes it {found[option]}: give it once"
            )
    return recipe
