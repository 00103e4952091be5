"""The quickstart's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from slimepo.errors import InputError
from slimepo.settings import Settings, read_mapping, set_key, validate


class WorldModel(Settings):
    """The model trained from scratch; every further key is a size of transformers' configuration."""

    model_config = ConfigDict(extra="allow", frozen=True)

    architecture: str

    @property
    def sizes(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class World(Settings):
    """How many tasks, and how noisy the demonstrations are (shares that sum to 1)."""

    demonstrations: int = Field(ge=1)
    preference_prompts: int = Field(ge=1)
    heldout_prompts: int = Field(ge=1)
    right: float = Field(ge=0, le=1)
    slip: float = Field(ge=0, le=1)
    malformed: float = Field(ge=0, le=1)


class SFT(Settings):
    """Supervised training from scratch on the demonstrations; `args` are transformers' training arguments."""

    learning_rate: float = Field(gt=0)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    loss_options: dict[str, Any] = Field(default_factory=dict)
    args: dict[str, Any] = Field(default_factory=dict)


class Samples(Settings):
    """How the SFT model is sampled to make pairs."""

    per_prompt: int = Field(ge=1)
    temperature: float = Field(gt=0)
    max_new_tokens: int = Field(ge=1)


class PreferenceRuns(Settings):
    """How every objective trains on the pairs; `sweep` is the longer list of learning rates."""

    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    learning_rates: list[float] = Field(min_length=1)
    sweep: list[float] = Field(min_length=1)


class ObjectiveRuns(Settings):
    """One objective, under a name of its own; its learning rates where they differ from the others'.

    One that is `on_request` runs only when it is asked for by name.
    """

    loss: str
    name: str = ""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    learning_rates: list[float] | None = None
    on_request: bool = False

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return {"name": values.get("loss", ""), **values} if isinstance(values, dict) else values


class QuickstartRecipe(Settings):
    """Everything the quickstart does."""

    seed: int = Field(ge=0)
    model: WorldModel
    world: World
    sft: SFT
    samples: Samples
    preference: PreferenceRuns
    objectives: list[ObjectiveRuns] = Field(min_length=1)


DEFAULT_RECIPE = Path(__file__).with_name("quickstart.yaml")


def load_quickstart(
    overrides: Sequence[str] = (),
    objectives: Sequence[str] = (),
    *,
    sweep: bool = False,
    path: Path = DEFAULT_RECIPE,
) -> QuickstartRecipe:
    """The quickstart's recipe with `key=value` overrides.

    Args:
        overrides: such as `preference.epochs=1` or `objectives.slime.loss_options.hard_margin=2`.
        objectives: names to run instead of the recipe's; one that the recipe does not list runs with its
            defaults. SFT on the chosen answers, the control, is always among them.
        sweep: run every objective over the longer list of learning rates.

    Raises:
        InputError: a key, a value, an objective or a hyperparameter is wrong.
    """
    from slimepo.losses import bind

    values = read_mapping(path, "recipe")
    values["objectives"] = _chosen(values["objectives"], objectives)
    for override in overrides:
        set_key(values, override)
    recipe = validate(QuickstartRecipe, values, "quickstart")
    for objective in recipe.objectives:
        bind(objective.loss, objective.loss_options)
    names = [objective.name for objective in recipe.objectives]
    if len(set(names)) < len(names):
        raise InputError(f"quickstart: two objectives have the same name: {', '.join(names)}")
    if sweep:
        rates = {"learning_rates": recipe.preference.sweep}
        every = [objective.model_copy(update={"learning_rates": None}) for objective in recipe.objectives]
        update = {"preference": recipe.preference.model_copy(update=rates), "objectives": every}
        recipe = recipe.model_copy(update=update)
    return recipe


def _chosen(listed: list[dict[str, Any]], wanted: Sequence[str]) -> list[dict[str, Any]]:
    if not wanted:
        return [entry for entry in listed if not entry.get("on_request")]
    runs = [entry for entry in listed if entry["loss"] == "sft"]
    for name in wanted:
        known = [entry for entry in listed if name in (entry.get("name"), entry["loss"])]
        runs += [entry for entry in known or [{"loss": name}] if entry not in runs]
    return runs
