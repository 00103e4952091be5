"""The sections of a recipe: what each key of its model, data, tasks, pairs and stages means, and its default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from slimepo.monitor.settings import MonitorSettings
from slimepo.onpolicy.settings import Rollouts, rollout_settings
from slimepo.settings import Settings

# What a run folder holds beside its stages and pairs.
RUN_FILES = (
    "recipe.yaml", "status.json", "versions.json", "data.json", "eval", "world", "log.txt", "report.html", "report.md",
    "report.png",
)  # fmt: skip
Seed = Annotated[int, Field(ge=0, lt=2**32)]


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
    Three more functions of the user's own are for answers with hard constraints, in `pairs` and on the held-out tasks.
    `grammar` gives a row's grammar, a text in xgrammar's EBNF that every answer follows (or is the name of an .ebnf
    file, one for all rows). `repair` gets the row and each answer, and returns the one that stands in for it. `cost`
    gets the row and an answer that the checker calls valid, and returns a number above 0, less for a better one.
    """

    train: str | None = None
    heldout: str | None = None
    checker: str | None = None
    grammar: str | None = None
    repair: str | None = None
    cost: str | None = None
    max_new_tokens: int = Field(256, ge=1)
    batch_rows: int = Field(256, ge=1)


class Pairs(Settings):
    """A part that is made by the run: pairs from a model's own samples on the tasks (see `slimepo.pipeline.pairs`).

    `model` is the stage whose model is sampled (none: the recipe's model). By the tasks' checker the most frequent
    right sample is chosen and the most frequent wrong one rejected; with `gold`, a task's own answer is chosen where no
    sample is right; without, such a task gives no pair. With `repair`, a function as that of tasks, such a task first
    tries its samples: one that this function makes right is chosen so, and rejected as it was.
    With a `reward` (as a stage's, or `cost`, the tasks', less it is better) the best sample is set against the worst;
    equal rewards give no pair. `keep` samples of a task, spread evenly from its best to its worst, give a pair each
    with the best. With `most`, and by cost, a task whose lowest cost only one sample has is sampled again, `per_prompt`
    at a time, until another one has it or there are `most`.
    `seed` is that of the run unless given. `engine` writes the samples, as that of rollouts does: transformers, vllm,
    or http://host:port. `dtype` is what the model computes in meanwhile (auto: bfloat16 where a GPU does; on a CPU
    with AMX, vLLM does it three times as fast as float32).
    """

    model: str | None = None
    per_prompt: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    gold: bool = False
    repair: str | None = None
    reward: str | list[str] | dict[str, float] | None = None
    keep: int = Field(2, ge=2)
    most: int | None = Field(None, ge=2)
    engine: str = "transformers"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Seed | None = None

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


def _some_steps(steps: int) -> int:
    if steps == 0:
        raise ValueError("0 steps train nothing: give 1 or more, or leave it out for whole epochs")
    return steps


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

    # A stage whose rows are sampled has no part; a name that cannot be is refused with those that can.
    model_config = ConfigDict(str_min_length=0)

    loss: str = Field(min_length=1)
    name: str = ""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    part: str = ""
    start: str | None = None
    reference: str = Field("auto", min_length=1)
    # As large as a float32 can be: what is absurd ends as what it does to the weights.
    learning_rate: float = Field(gt=0, le=3e38)
    epochs: float = Field(gt=0)
    max_steps: Annotated[int, AfterValidator(_some_steps)] = Field(-1, ge=-1)
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
            from slimepo.losses.composed import sum_name

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
            re.sub(r"[/(]", "-", loss.strip().rpartition("*")[2].rpartition(":")[2]).strip(")")
            for loss in losses
        )
        defaults |= {"part": "" if sampled else "sft" if sft else "preference", "name": name}
        return {**defaults, **values}
