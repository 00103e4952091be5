"""Recipes: what a run does, as one YAML file; what of one section must fit another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from slimepo.evaluation.settings import Evaluation
from slimepo.monitor.settings import monitor_settings
from slimepo.pipeline.recipe.sections import RUN_FILES, Adapter, Data, Pairs, RandomModel, Seed, Stage, Tasks
from slimepo.settings import Settings
from slimepo.types import REFERENCE_SOURCES, Engine
from slimepo.words import nearest

_NEITHER = "of data.path or data.heldout, and neither is given: leave it out"
# Why a key of a section, changed from its default, is read by nothing, by what would read it.
_OF_A_PATH = dict.fromkeys(("split", "limit", "parts"), "of data.path, which is not given: leave it out")
_OF_HELDOUT = dict.fromkeys(
    ("heldout_split", "heldout_columns"),
    "of data.heldout, which is not given: give heldout: PATH (data.path again, for another split of it)",
)
_OF_FILES = dict.fromkeys(("format", "columns", "skip_bad_rows", "heldout_limit"), _NEITHER)
_OF_ANSWERS = {
    "max_new_tokens": "of held-out tasks: give tasks.heldout, or leave it out (pairs have one of their own)"
}
# What of a section is of use to pairs too, made by the run.
ALSO_OF_PAIRS = {
    "data": {"cut_long_responses": "of rows of a file and of pairs, and there are none: leave it out"},
    "tasks": dict.fromkeys(
        ("batch_rows", "cost"), "of held-out tasks and of pairs: give tasks.heldout, or leave it out"
    ),
}


def _is_folder_name(name: str) -> bool:
    """Whether a name can be that of a folder in a run folder, on any file system, and is not taken there."""
    plain = name.isprintable() and not set(name) & set("/\\") and len(name.encode("utf-8", "replace")) <= 100
    return bool(name) and plain and name[0] != "." and name[-1] not in ". " and name.lower() not in RUN_FILES


def _adapter_of_word(given: Any) -> Any:
    """The words that stand for settings, `continue` aside, which is one. Raises ValueError for another word."""
    words = {"none": None, "lora": {}, "merge": {"merge": True}, "continue": "continue"}
    if not isinstance(given, str):
        return given
    if given not in words:
        raise ValueError(
            f"{given!r} is none of {', '.join(words)}{nearest(given, words)}; {{r: 16}} changes the LoRA"
        )
    return words[given]


def _refuse_idle(name: str, section: Settings, why: Mapping[str, str]) -> None:
    """ValueError for a key that nothing reads; at its default it may stand there, as in a run's own recipe.yaml."""
    usual = type(section).model_validate({})
    for key, reason in why.items():
        if getattr(section, key) != getattr(usual, key):
            raise ValueError(f"{name}.{key} is {reason}")


class Recipe(Settings):
    """A pipeline: one model, one data set, stages that each start from what the one before made.

    `adapter` is LoRA for a pretrained model and nothing (full fine-tuning) for a random one, unless given; the word
    `lora` means LoRA as it is without settings, `none` full fine-tuning. Where the model is an adapter itself,
    `continue` (without a word in a local folder) trains it on, and later stages train new ones of its
    configuration; `merge`, or `merge: true` among the settings, folds it into its model first. `between_stages`
    says what becomes of a stage's adapter in the stage that starts from it: `merge` (it is part of that stage's
    base, under a new one) or `continue` (it trains on). `dtype` is that of the frozen weights (auto: bfloat16 under
    an adapter where the device computes in it), `export_dtype` that of exported models: a bfloat16 export rounds
    away most of what a small learning rate has changed. With `quantize: nf4` the
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
    seed: Seed = 0
    seeds: list[Seed] = Field(default_factory=list)
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
                if stage.rollouts.cost is not None and not stage.rollouts.cost.of:
                    raise ValueError(
                        f"stage {stage.name!r}: rollouts.cost.of names no cost: give one as a reward is given, "
                        "file.py:function or model:FOLDER"
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

    def _pairs_fit(self, name: str, made: Pairs) -> None:
        if made.reward is None and made.keep > 2:
            raise ValueError(f"pairs {name!r}: keep ranks samples by a reward: give reward")
        for key in ("gold", "repair"):
            if getattr(made, key) and made.reward is not None:
                raise ValueError(
                    f"pairs {name!r}: {key} is for answers that are right or wrong, and a reward compares samples"
                )
        if made.keep > (made.most or made.per_prompt):
            raise ValueError(
                f"pairs {name!r}: keep = {made.keep} samples of {made.most or made.per_prompt}: lower keep, or raise "
                "per_prompt"
            )
        lots, rest = divmod(made.most or 2 * made.per_prompt, made.per_prompt)
        if made.most is not None and (made.reward != "cost" or lots < 2 or rest):
            raise ValueError(
                f"pairs {name!r}: most = {made.most} samples, drawn per_prompt = {made.per_prompt} at a time until two "
                "have the lowest cost: give reward: cost, and a multiple of per_prompt"
            )
        if made.reward == "cost" and not (self.tasks and self.tasks.cost and self.tasks.checker):
            raise ValueError(
                f"pairs {name!r}: reward 'cost' is the tasks', of answers that their checker calls valid: give "
                "tasks.cost and tasks.checker"
            )
        if self.tasks and self.tasks.grammar and made.engine != "transformers":
            raise ValueError(
                f"pairs {name!r}: tasks.grammar works with engine: transformers, and this is {made.engine!r}"
            )

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
            self._pairs_fit(name, made)
        for stage in self.stages:
            shaped = self.tasks and (self.tasks.grammar or self.tasks.repair)
            if stage.rollouts is not None and shaped:
                raise ValueError(
                    f"stage {stage.name!r}: rollouts learn from answers as the model gives them, and tasks.grammar or "
                    "tasks.repair would change these: leave them out, or train on pairs"
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
    def _everything_is_read(self) -> Recipe:
        data, tasks = self.data, self.tasks
        idle = {} if data.path else dict(_OF_A_PATH)
        idle |= {} if data.heldout else _OF_HELDOUT
        if not data.path and not data.heldout:
            idle |= _OF_FILES | ({} if self.pairs else ALSO_OF_PAIRS["data"])
        _refuse_idle("data", data, idle)
        if tasks is not None and tasks.heldout is None:
            _refuse_idle("tasks", tasks, _OF_ANSWERS | ({} if self.pairs else ALSO_OF_PAIRS["tasks"]))
        held_out = data.heldout or (data.path and self.parts.get("heldout"))
        for stage in self.stages:
            asked = stage.monitor not in (True, False, monitor_settings(True))
            if stage.rollouts is not None and asked and not held_out:
                raise ValueError(
                    f"stage {stage.name!r}: the monitor watches held-out pairs where answers are sampled: give "
                    "data.heldout, or leave its settings out"
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
