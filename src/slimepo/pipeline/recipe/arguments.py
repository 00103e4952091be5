"""The training arguments that a stage of a recipe stands for."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import Stage
from slimepo.pipeline.start import exported_model, given_adapter
from slimepo.pipeline.tasks import SMOKE_TOKENS
from slimepo.redaction import REDACTED, redacted
from slimepo.training.config import PreferenceConfig, in_their_types
from slimepo.training.trl_names import TRL_NAMES
from slimepo.words import first_line, nearest

SMOKE_STEPS, SMOKE_BATCH = 5, 8
# Arguments of the trainer that a recipe has keys of its own for.
_HAS_A_KEY = {
    "loss": "loss", "loss_options": "loss_options", "reference": "reference", "learning_rate": "learning_rate",
    "num_train_epochs": "epochs", "max_steps": "max_steps", "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size", "pairs_per_step": "batch_size", "save_steps": "save_every",
    "monitor": "monitor", "seed": "the recipe's seed", "output_dir": "--out", "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length", "cut_long_responses": "data.cut_long_responses",
    "template_options": "the recipe's template_options", "model_init_kwargs": "the recipe's dtype",
    "resume_from_checkpoint": "--out, where a run goes on by itself", "do_train": "max_steps",
    "do_eval": "eval_strategy", "do_predict": "evaluate", "parallel": "the recipe's parallel",
    "fsdp": "the recipe's parallel", "fsdp_config": "the recipe's parallel", "deepspeed": "the recipe's parallel",
    "adapter": "the recipe's adapter", "rollouts": "rollouts",
    "local_rank": "--nproc",
}  # fmt: skip
# Arguments with which a run that was interrupted could not go on to the weights that it would have had.
_NO_WAY_BACK = {
    "save_only_model": "its checkpoints would lack the optimizer: a copy without it is in the stage's folder `model`",
    "ignore_data_skip": "a resumed run would take other rows than the run it goes on with",
    "enable_jit_checkpoint": "SIGTERM has a run write a checkpoint at the end of its step anyway",
}


def stage_arguments(recipe: Recipe, stage: Stage, folder: Path, ranks: int | None = None) -> PreferenceConfig:
    """transformers' training arguments for a stage, on each of `ranks` devices; those that were launched unless given.

    Raises:
        InputError: an argument that does not exist or does not fit, a batch that devices cannot share evenly.
    """
    ranks = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    # A smoke run on many ranks has a pair for each at the least.
    smoke = max(SMOKE_BATCH - SMOKE_BATCH % ranks, ranks)
    batch = min(stage.batch_size, smoke) if recipe.smoke else stage.batch_size
    if batch % ranks:
        raise InputError(
            f"stage {stage.name!r}: batch_size {batch} cannot be shared out over {ranks} devices"
        )
    share = batch // ranks
    of_stage = stage.reference in recipe.before(stage)
    micro = min(stage.micro_batch_size, share)
    checkpointing = stage.activation_checkpointing
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "loss": stage.loss,
        "loss_options": stage.loss_options,
        "reference": str(exported_model(folder.parent / stage.reference)) if of_stage else stage.reference,
        "learning_rate": stage.learning_rate,
        "num_train_epochs": stage.epochs,
        "max_steps": SMOKE_STEPS if recipe.smoke else stage.max_steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": math.ceil(share / micro),
        "pairs_per_step": share,
        "disable_tqdm": True,
        # The key's default must not overrule transformers' and TRL's names for the same in `args`.
        "activation_checkpointing": None if checkpointing == "none" else checkpointing,
        "save_steps": stage.save_every,
        "save_total_limit": 2,
        "seed": recipe.seed,
        "adapter": given_adapter(recipe, stage),
        "template_options": recipe.template_options,
        "parallel": recipe.parallel,
        "report_to": "none",
        "rollouts": _rollouts(recipe, stage),
        "monitor": stage.monitor if isinstance(stage.monitor, bool) else stage.monitor.model_dump(),
    }
    _refuse(stage)
    own = _without_secrets(stage)
    try:
        return PreferenceConfig(**(values | in_their_types(own)))
    except Exception as error:
        # transformers looks at some values only by working with them.
        kind = "" if isinstance(error, InputError) else f"args: {type(error).__name__}: "
        raise InputError(f"stage {stage.name!r}: {kind}{first_line(error)}") from error


def _refuse(stage: Stage) -> None:
    """Refuse keys of a stage's `args` that are no argument, or are given elsewhere.

    Raises:
        InputError: such a key, and what to give instead.
    """
    if stage.activation_checkpointing != "none" and "activation_checkpointing" in stage.args:
        raise InputError(
            f"stage {stage.name!r}: activation_checkpointing is a key and stands in args: give one"
        )
    for key in stage.args:
        if key in _HAS_A_KEY:
            raise InputError(
                f"stage {stage.name!r}: args.{key} is another name of a key: give {_HAS_A_KEY[key]}"
            )
        if key in TRL_NAMES:
            instead = f"give {TRL_NAMES[key].ours}" if TRL_NAMES[key].ours else TRL_NAMES[key].instead
            raise InputError(f"stage {stage.name!r}: args.{key} is a setting of TRL's: {instead}")
        if key in _NO_WAY_BACK and stage.args[key]:
            raise InputError(f"stage {stage.name!r}: leave args.{key} out: {_NO_WAY_BACK[key]}")
    strategy = str(stage.args.get("save_strategy", "steps"))
    if stage.save_every != Stage.model_fields["save_every"].default and strategy != "steps":
        raise InputError(
            f"stage {stage.name!r}: save_every = {stage.save_every:g} is for checkpoints by steps, and "
            f"args.save_strategy is {strategy!r}: leave one of them out"
        )
    for key in ("hub_model_id", "hub_private_repo"):
        if stage.args.get(key) is not None and not stage.args.get("push_to_hub"):
            raise InputError(
                f"stage {stage.name!r}: args.{key} goes with args.push_to_hub: give that, or the recipe's push_to_hub"
            )
    unknown = [key for key in stage.args if key not in PreferenceConfig.__dataclass_fields__]
    if unknown:
        hint = nearest(unknown[0], list(PreferenceConfig.__dataclass_fields__))
        raise InputError(
            f"stage {stage.name!r}: transformers' TrainingArguments have no {unknown[0]!r}{hint}"
        )


def _rollouts(recipe: Recipe, stage: Stage) -> dict[str, Any] | None:
    """What was set of a stage's rollouts, their answers short in a smoke run."""
    if stage.rollouts is None:
        return None
    short = {"max_new_tokens": min(stage.rollouts.max_new_tokens, SMOKE_TOKENS)} if recipe.smoke else {}
    return {**stage.rollouts.model_dump(exclude_unset=True), **short}


def _without_secrets(stage: Stage) -> dict[str, Any]:
    """The stage's `args`; its Hub token goes into the environment instead, for checkpoints keep the arguments they had.

    Raises:
        InputError: another secret stands in them.
    """
    args = dict(stage.args)
    token = args.pop("hub_token", None)
    if token and token != REDACTED:
        os.environ["HF_TOKEN"] = str(token)
    secret = next((key for key, value in args.items() if redacted({key: value}) != {key: value}), None)
    if secret:
        raise InputError(
            f"stage {stage.name!r}: args.{secret} holds a secret, which would end up in files: give it by its "
            "environment variable (HF_TOKEN, WANDB_API_KEY, ...)"
        )
    return args
