"""Recipes: what a run does, as one YAML file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from slimepo.errors import InputError
from slimepo.evaluation.settings import Evaluation
from slimepo.monitor.settings import MonitorSettings
from slimepo.onpolicy.settings import Rollouts, rollout_settings
from slimepo.settings import Settings, read_mapping, set_key, validate
from slimepo.types import REFERENCE_SOURCES, Engine
from slimepo.words import nearest

# What a run folder holds beside its stages and pairs.
RUN_FILES = (
    "recipe.yaml", "status.json", "versions.json", "data.json", "eval", "world", "log.txt", "report.html", "report.md",
    "report.png",
)  # fmt: skip
# Keys of `data` that are about the file under another key.
_OF_A_PATH = {
    "data.path": ("split", "format", "columns", "heldout", "heldout_split", "heldout_columns"),
    "data.heldout": ("heldout_split", "heldout_columns"),
}
logger = logging.getLogger(__name__)
_Seed = Annotated[int, Field(ge=0, lt=2**32)]


class RandomModel(Settings):
    """A new model with random weights; every further key is a size of transformers' configuration."""

    model_config = ConfigDict(extra="allow", frozen=True)

    init: Literal["random"]
    architecture: str

    @property
    def sizes(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Adapter(Settings):
    """LoRA with the paper's table as defaults (see `slimepo.model.adapters.lora_config`).

    `merge`: the recipe's model is an adapter, which is folded into its model first.
    """

    r: int = Field(64, ge=1)
    alpha: float = Field(128, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str | None = None
    train_head: bool = True
    merge: bool = False


class Data(Settings):
    """Where the pairs come from and how they are split.

    `path` is a file, a folder or a Hub id; `heldout` another one whose rows are only scored. Without it the
    part named heldout is held out. A recipe whose stages all train on `pairs` of its own needs no path. In a path,
    here and in `tasks`, {seed} stands for the run's seed. `columns` says which of the file's columns is ours
    ({prompt: question}), or that one is left out ({label: null}); `heldout_columns` those of `heldout`, where they
    differ.
    """

    path: str | None = None
    split: str | None = None
    format: str = "auto"
    columns: dict[str, str | None] = Field(default_factory=dict)
    limit: int | None = Field(None, ge=1)
    skip_bad_rows: bool = False
    heldout: str | None = None
    heldout_split: str | None = None
    heldout_columns: dict[str, str | None] | None = None
    heldout_limit: int | None = Field(1000, ge=1)
    parts: dict[str, float] | None = None
    max_length: int = Field(2048, ge=2)
    max_prompt_length: int | None = Field(None, ge=1)
    cut_long_responses: bool = False


class Tasks(Settings):
    """Prompts with answers that a function checks (see `slimepo.pipeline.tasks`).

    `train` and `heldout` are files, a task a row: its `prompt`, where there is one its right `answer`, an `id`, a
    `family`, and whatever else the checker reads. `checker` is package.module:function or file.py:function, called with
    the row and an answer; it returns a `slimepo.Verdict` or a bool. Rollouts with another reward need none. Every stage
    answers the held-out tasks greedily, with at most `max_new_tokens`, before and after. `batch_rows`: answers written
    side by side.
    """

    train: str | None = None
    heldout: str | None = None
    checker: str | None = None
    max_new_tokens: int = Field(256, ge=1)
    batch_rows: int = Field(256, ge=1)


class Pairs(Settings):
    """A part that is made by the run: pairs from a model's own samples on the tasks (see `slimepo.pipeline.pairs`).

    `model` is the stage whose model is sampled (none: the recipe's model). By the tasks' checker the most frequent
    right sample is chosen and the most frequent wrong one rejected; with `gold`, a task's own answer is chosen where no
    sample is right; without, such a task gives no pair. With a `reward` (as a stage's) the best sample is set against
    the worst; equal rewards give no pair. `seed` is that of the run unless given. `engine` writes the samples, as that
    of rollouts does: transformers, vllm, or http://host:port.
    """

    model: str | None = None
    per_prompt: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    gold: bool = False
    reward: str | list[str] | dict[str, float] | None = None
    engine: str = "transformers"
    seed: _Seed | None = None

    @property
    def rollouts(self) -> Rollouts:
        """How the samples are asked for, in the words of a stage that samples while it trains.

        Raises:
            InputError: the engine is none, or is not installed.
        """
        from slimepo.losses import find_objective

        given = {"samples": self.per_prompt, "engine": self.engine, "max_new_tokens": self.max_new_tokens}
        given |= {"temperature": self.temperature, "top_p": self.top_p}
        asked = rollout_settings(given, "dpo", find_objective("dpo"))
        assert asked is not None
        return asked


class Stage(Settings):
    """One objective trained on one part: of the data, or one of `pairs`.

    It starts from the model that the stage before it exported, or the one named by `start`, so that several
    objectives can be compared from one. `reference` says where the log-probs of the reference model come from, for an
    objective that reads such: auto, adapters-off, copy, cache, or another model, which is a stage before this one, a
    folder or a Hub id. `batch_size` is pairs a step over all devices (judged answers for an objective that takes
    those), `micro_batch_size` pairs in memory at once on each. `activation_checkpointing`: with `layers` a layer's
    activations are computed again in the backward pass, with `offload` its input waits in CPU memory meanwhile.
    With `rollouts` it trains on answers that it samples to `tasks.train` (`batch_size` and `micro_batch_size` are
    prompts then), and `reward` says what they are worth: checker (the tasks', 1 for right), math (math-verify against
    `answer`), model:FOLDER (a reward model), judge:ENDPOINT, or a function of (prompt, completions, row),
    package.module:function or file.py:function; several, or several with weights, are added up.
    `save_every` and `answer_every` are steps, or below 1 a share of all steps, from one checkpoint to the next, and
    from one time to the next that the held-out tasks are answered while it trains.
    `monitor` is true, false, or settings of the displacement monitor. `args` takes any other argument of transformers'
    TrainingArguments.
    """

    loss: str
    name: str = ""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    part: str = ""
    start: str | None = None
    reference: str = "auto"
    # As large as a float32 can be: what is absurd ends as what it does to the weights.
    learning_rate: float = Field(gt=0, le=3e38)
    epochs: float = Field(gt=0)
    max_steps: int = Field(-1, ge=-1)
    batch_size: int = Field(64, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    activation_checkpointing: Literal["none", "layers", "offload"] = "none"
    save_every: float = Field(0.1, gt=0)
    answer_every: float | None = Field(None, gt=0)
    rollouts: Rollouts | None = None
    reward: str | list[str] | dict[str, float] | None = None
    monitor: bool | MonitorSettings = True
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _papers_optimisation(cls, values: Any) -> Any:
        """SFT: 2e-4, 3 epochs, on the SFT part; preferences: 5e-7, 1 epoch, on the preference part; rollouts: 1e-6."""
        if not isinstance(values, Mapping):
            return values
        if isinstance(values.get("loss"), Mapping):
            from slimepo.losses.weighted_sum import sum_name

            # A sum goes by its name from here on.
            values = {**values, "loss": sum_name(values["loss"])}
        sft = values.get("loss") == "sft"
        sampled = values.get("rollouts") is not None
        rate = 2e-4 if sft else 1e-6 if sampled else 5e-7
        defaults: dict[str, Any] = {"learning_rate": rate, "epochs": 3 if sft else 1}
        # A user's own objective, package.module:function, lends its stage the function's name; a preset both names,
        # and a sum those of its parts.
        loss = str(values.get("loss", ""))
        losses = loss.split("+") if "*" in loss else [loss]
        name = "-".join(
            loss.strip().rpartition("*")[2].rpartition(":")[2].replace("/", "-") for loss in losses
        )
        defaults |= {"part": "" if sampled else "sft" if sft else "preference", "name": name}
        return {**defaults, **values}


def _is_folder_name(name: str) -> bool:
    """Whether a name can be that of a folder in a run folder, on any file system, and is not taken there."""
    plain = name.isprintable() and not set(name) & set("/\\") and len(name.encode("utf-8", "replace")) <= 100
    return bool(name) and plain and name[0] != "." and name[-1] not in ". " and name.lower() not in RUN_FILES


def _adapter_of_word(given: Any) -> Any:
    """`none` and `merge` stand for settings."""
    words = {"none": None, "merge": {"merge": True}}
    return words.get(given, given) if isinstance(given, str) else given


class Recipe(Settings):
    """A pipeline: one model, one data set, stages that each start from what the one before made.

    `adapter` is LoRA for a pretrained model and nothing (full fine-tuning) for a random one, unless given; the word
    `none` means full fine-tuning. Where the model is an adapter itself, `continue` (without a word in a local folder)
    trains it on, and later stages train new ones of its configuration; `merge`, or `merge: true` among the settings,
    folds it into its model first. `between_stages` says what becomes of a stage's adapter in the stage that starts from
    it: `merge` (it is part of that stage's base, under a new one) or `continue` (it trains on). `dtype` is that of the
    frozen weights (auto: bfloat16 under an adapter where the device computes in it), `export_dtype` that of exported
    models: a bfloat16 export rounds away most of what a small learning rate has changed. With `quantize: nf4` the
    frozen base under an adapter is in four bits (QLoRA). `parallel` says how several processes share the work: `ddp`
    (each holds the whole model), `fsdp2` or `zero3` (each a part of it) or `zero2` (a part of the optimizer's states),
    the last three also with `-offload` (parts wait in CPU memory); without it ddp, or what `accelerate launch` was set
    up with. `pairs` are parts made by the run, by name.
    With `rounds: 3`, a stage that trains on `pairs` is followed by two more that go on from it with pairs of its own
    samples. `evaluate` lists benchmarks that run after a stage. `push_to_hub: owner/name` sends the last stage's model
    to a private repository of the Hub. `seeds` makes a run of each, in a folder of its own.
    """

    model: str | RandomModel
    data: Data = Data.model_validate({})
    stages: list[Stage] = Field(min_length=1)
    tasks: Tasks | None = None
    pairs: dict[str, Pairs] = Field(default_factory=dict)
    rounds: int = Field(1, ge=1)
    tokenizer: str | None = None
    chat_template: str | None = None
    template_options: dict[str, Any] = Field(default_factory=dict)
    adapter: Annotated[Adapter | Literal["continue"] | None, BeforeValidator(_adapter_of_word)] = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["nf4"] | None = None
    between_stages: Literal["merge", "continue"] = "merge"
    parallel: Engine | None = None
    seed: _Seed = 0
    seeds: list[_Seed] = Field(default_factory=list)
    smoke: bool = False
    push_to_hub: str | None = None
    evaluate: list[Evaluation] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _adapter_by_model(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "adapter" not in values:
            model = values.get("model")
            if isinstance(model, str) and (Path(model) / "adapter_config.json").is_file():
                return {**values, "adapter": "continue"}
            return {**values, "adapter": {} if isinstance(model, str) else None}
        return values

    @model_validator(mode="after")
    def _named_apart(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for name in [*names, *self.pairs]:
            if [*names, *self.pairs, *(self.data.parts or ())].count(name) > 1 and name in self.pairs:
                raise ValueError(
                    f"pairs {name!r} are named like a stage or a part of the data: give another name"
                )
            if names.count(name) > 1:
                raise ValueError(f"two stages are named {name!r}; give each a name of its own")
            if not _is_folder_name(name):
                raise ValueError(
                    f"{name[:100]!r} cannot be a stage's name: it names a folder of the run, where there are "
                    f"{', '.join(RUN_FILES)} as well"
                )
            if name in REFERENCE_SOURCES:
                raise ValueError(f"{name!r} cannot be a stage's name: it is a word for `reference`")
        return self

    @model_validator(mode="after")
    def _stages_have_rows_and_a_start(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for place, stage in enumerate(self.stages):
            # A reference that is no stage's name is another model.
            asked = {"start": stage.start, "reference": stage.reference if stage.reference in names else None}
            if stage.rollouts is not None:
                if self.tasks is None or self.tasks.train is None:
                    raise ValueError(
                        f"stage {stage.name!r} answers prompts: give tasks.train, a file of them"
                    )
                if stage.part:
                    raise ValueError(
                        f"stage {stage.name!r}: part is for rows of a file, and rollouts make their own"
                    )
            elif stage.reward is not None:
                raise ValueError(
                    f"stage {stage.name!r}: a reward is of use where answers are sampled: give rollouts"
                )
            elif stage.part in self.pairs:
                asked["part"] = self.pairs[stage.part].model
            elif stage.part not in self.parts:
                parts = ", ".join([*self.parts, *self.pairs])
                raise ValueError(
                    f"stage {stage.name!r}: no part {stage.part!r} in data.parts or pairs ({parts})"
                )
            elif self.data.path is None:
                raise ValueError(
                    f"stage {stage.name!r} trains on part {stage.part!r} of the data: give data.path"
                )
            for key, wanted in asked.items():
                if wanted is not None and wanted not in names[:place]:
                    before = ", ".join(names[:place]) or "none"
                    what = f"{key} {wanted!r}" if key != "part" else f"the model {wanted!r} of its pairs"
                    raise ValueError(
                        f"stage {stage.name!r}: {what} is no stage before it (there are: {before})"
                    )
        for evaluation in self.evaluate:
            unknown = [name for name in evaluation.stages if name not in names]
            if unknown:
                raise ValueError(f"evaluate: there is no stage {unknown[0]!r}; there are: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _model_tasks_and_pairs_fit(self) -> Recipe:
        if isinstance(self.model, RandomModel) and self.tokenizer is None:
            raise ValueError("a random model needs a tokenizer: give tokenizer: FOLDER-or-Hub-id")
        if self.pairs and (self.tasks is None or self.tasks.train is None):
            raise ValueError("pairs are made from answers to tasks: give tasks.train and tasks.checker")
        if self.tasks is not None and self.tasks.train is None and self.tasks.heldout is None:
            raise ValueError("tasks: give a file: heldout, train, or both")
        unrewarded = any(made.reward is None for made in self.pairs.values())
        if self.tasks is not None and self.tasks.checker is None and (self.tasks.heldout or unrewarded):
            raise ValueError(
                "tasks: held-out tasks, and pairs without a reward, need a checker: give tasks.checker"
            )
        asking = next((stage.name for stage in self.stages if stage.answer_every is not None), None)
        if asking is not None and not (self.tasks and self.tasks.heldout):
            raise ValueError(f"stage {asking!r}: answer_every answers the held-out tasks: give tasks.heldout")
        for name, made in self.pairs.items():
            if made.gold and made.reward is not None:
                raise ValueError(
                    f"pairs {name!r}: gold is for answers that are right or wrong, and a reward compares samples"
                )
        if self.rounds > 1 and not any(stage.part in self.pairs for stage in self.stages):
            raise ValueError("rounds repeat stages that train on pairs of the run's own samples: give pairs")
        if isinstance(self.model, RandomModel) and any(made.model is None for made in self.pairs.values()):
            raise ValueError(
                "pairs of a random model's samples teach nothing: give model, the stage that is sampled"
            )
        if self.seeds and "seed" in self.model_fields_set:
            raise ValueError("give seed or seeds, not both")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands there twice")
        if len(self.seeds) > 1 and self.push_to_hub is not None and "{seed}" not in self.push_to_hub:
            raise ValueError(
                f"push_to_hub: several seeds would share one name: give {self.push_to_hub}-{{seed}}, say"
            )
        return self

    @model_validator(mode="after")
    def _adapters_go_on(self) -> Recipe:
        if self.between_stages == "continue" and self.adapter is None:
            raise ValueError(
                "between_stages: continue is for an adapter, and the model trains whole: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _quantized_base_fits(self) -> Recipe:
        if self.quantize is None:
            return self
        if self.adapter is None:
            raise ValueError(
                "quantize is for a frozen base: give an adapter, such as adapter: {r: 16}, or leave quantize out"
            )
        if isinstance(self.adapter, Adapter) and self.adapter.merge:
            raise ValueError(
                "quantize would round what adapter: merge has just merged: `slimepo export` it and start from that"
            )
        if self.parallel not in (None, "ddp"):
            raise ValueError(
                f"parallel: {self.parallel} would cut quantised weights into parts, which is not supported: give ddp"
            )
        for stage in self.stages:
            if stage.rollouts is not None and stage.rollouts.engine != "transformers":
                raise ValueError(
                    f"stage {stage.name!r}: quantised weights cannot be handed to vLLM: give rollouts: "
                    "{engine: transformers}"
                )
        return self

    def before(self, stage: Stage) -> list[str]:
        """Names of the stages before this one."""
        names = [each.name for each in self.stages]
        return names[: names.index(stage.name)]

    def start_of(self, stage: Stage) -> str | None:
        """The stage whose model this one starts from; None where that is the recipe's own model."""
        return stage.start or next(reversed(self.before(stage)), None)

    def needs(self, stage: Stage) -> list[str]:
        """The stages that must be done before this one."""
        made = self.pairs[stage.part].model if stage.part in self.pairs else None
        wanted = (self.start_of(stage), made, stage.reference)
        return [name for name in dict.fromkeys(wanted) if name in self.before(stage)]

    def path(self, given: str) -> str:
        """A path of the recipe in the run of this seed, the first of several."""
        return given.replace("{seed}", str([*self.seeds, self.seed][0]))

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the split: as given, or the paper's one third to two for `sft` and `preference`.

        A recipe whose stages use one part gives it everything. One row in a hundred is held out, unless other
        rows are.
        """
        if self.data.parts is not None:
            return self.data.parts
        of_data = [stage.part for stage in self.stages if stage.rollouts is None]
        used = [part for part in dict.fromkeys(of_data) if part not in self.pairs]
        heldout = {} if self.data.heldout else {"heldout": 0.01}
        if len(used) < 2:
            return {name: 1 - sum(heldout.values()) for name in used} | heldout
        return (
            {"sft": 0.33, "preference": 0.66, **heldout} if heldout else {"sft": 1 / 3, "preference": 2 / 3}
        )


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
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
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


def one_stage_recipe(model: str, data: str, loss: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe behind `slimepo train`: one stage on all rows but one in a hundred, which are held out.

    Overrides that name a key of a stage (`learning_rate=1e-6`) set it; others set keys of the recipe.
    """
    from slimepo.losses import find_objective, hyperparameters

    values: dict[str, Any] = {"model": model, "data": {"path": data}, "stages": [{"loss": loss}]}
    for override in overrides:
        key = override.split("=")[0].split(".")[0]
        in_stage = key in Stage.model_fields
        if not in_stage and key not in Recipe.model_fields:
            known = [*Stage.model_fields, *Recipe.model_fields]
            options = hyperparameters(find_objective(loss).function)
            meant = f" (did you mean 'loss_options.{key}'?)" if key in options else nearest(key, known)
            raise InputError(f"train: unknown key {key!r}{meant}; known here: {', '.join(known)}")
        set_key(values, f"stages.0.{override}" if in_stage else override)
    return make_recipe(values, "train")
