"""One stage of a pipeline: a base model, an objective and rows in; an exported model and its figures out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from slimepo.data.rows import Row
from slimepo.errors import InputError, NonFiniteLossError
from slimepo.files import is_main_process, write_json, write_text
from slimepo.losses import hyperparameters, slime
from slimepo.model.adapters import PROJECTIONS, lora_config
from slimepo.model.load import load_config, load_model, random_config, random_model, smoke_config
from slimepo.model.modes import computes_in_bf16
from slimepo.model.score import PairScores, chosen_fell, distributions, score_pairs, summary
from slimepo.monitor.callback import DisplacementMonitor
from slimepo.monitor.settings import monitor_settings
from slimepo.pipeline.data import StageRows
from slimepo.pipeline.export import export_model, model_card
from slimepo.pipeline.folder import last_checkpoint, remove_unfinished_checkpoints
from slimepo.pipeline.recipe import Adapter, RandomModel, Recipe, Stage
from slimepo.training.callbacks import MetricsFile, TrainingProgress, peak_memory
from slimepo.training.config import PreferenceConfig
from slimepo.words import nearest

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.trainer import PreferenceTrainer

SMOKE_STEPS, SMOKE_BATCH = 5, 8


def run_stage(
    recipe: Recipe,
    stage: Stage,
    base: str | RandomModel,
    rows: StageRows,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    folder: Path,
    console: Console,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train, export to `folder/model`, write `folder/stage.json` and return what is in it.

    A stage that was interrupted goes on from its last complete checkpoint and ends in the same weights.
    """
    started = time.time()
    progress = TrainingProgress(console, stage.name)
    trainer = stage_trainer(recipe, stage, base, rows, tokenizer, folder, [*callbacks, progress])
    _announce(trainer, stage.name, console)
    if is_main_process():
        remove_unfinished_checkpoints(folder / "checkpoints")
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint is not None:
        console.print(f"{stage.name}: going on from {checkpoint.name}")
    before = _scores(trainer.model, rows.heldout, console, "held-out pairs before")
    _train(trainer, recipe.seed, checkpoint, progress)
    after = _scores(trainer.model, rows.heldout, console, "held-out pairs after")
    result = {
        "name": stage.name,
        "loss": stage.loss,
        "loss_options": stage.loss_options,
        "base": base if isinstance(base, str) else base.model_dump(),
        **_facts(trainer),
        "seconds": round(time.time() - started, 1),
        "resumed_from_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
    }
    if before is not None and after is not None:
        result["heldout"] = _heldout(before, after, stage)
        if trainer.monitor is not None:
            trainer.monitor.conclude(before, after)
    result["monitor"] = trainer.monitor.record.summary(result.get("heldout")) if trainer.monitor else None
    if is_main_process():
        if before is not None and after is not None:
            write_json(folder / "distributions.json", distributions(before, after))
        _export(trainer, recipe, stage, tokenizer, end_token_ids, folder / "model", result)
        # Written last: a stage with this file is done.
        write_json(folder / "stage.json", result)
    trainer.accelerator.wait_for_everyone()
    return result


@contextmanager
def failure_on_record(folder: Path) -> Iterator[None]:
    """A stage that breaks, by whatever error, leaves the reason in `folder/error.json` for the report."""
    if is_main_process():
        (folder / "error.json").unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if is_main_process():
            told = str(error) if isinstance(error, InputError | NonFiniteLossError) else repr(error)
            write_json(folder / "error.json", {"error": told})
        raise


def _announce(trainer: PreferenceTrainer, name: str, console: Console) -> None:
    """Say what was chosen for this model and objective."""
    console.print(f"{name}: layout {trainer.layout} ({trainer.layout_reason})")
    if trainer.reference is not None:
        console.print(f"{name}: reference {trainer.reference.source} ({trainer.reference.reason})")
    if trainer.args.activation_checkpointing:
        console.print(f"{name}: activations {trainer.activations}")


def _train(
    trainer: PreferenceTrainer, seed: int, checkpoint: Path | None, progress: TrainingProgress
) -> None:
    """Train from the checkpoint, or from the start."""
    if trainer.monitor is not None:
        trainer.monitor.record.say = progress.warn
    try:
        # Scoring used no randomness that training needs, but the start must not depend on that.
        set_seed(seed)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()


def _facts(trainer: PreferenceTrainer) -> dict[str, Any]:
    """What the trainer did, and with what."""
    parameters = list(trainer.model.parameters())
    return {
        "steps": trainer.state.global_step,
        "rows": len(trainer.train_dataset),
        "layout": trainer.layout,
        "reference": trainer.reference.source if trainer.reference else None,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "peak_memory": peak_memory(),
    }


def _heldout(before: PairScores, after: PairScores, stage: Stage) -> dict[str, Any]:
    """Figures of the held-out pairs before and after."""
    threshold = stage.loss_options.get("threshold", hyperparameters(slime)["threshold"])
    return {
        "pairs": len(before.chosen),
        "before": summary(before, threshold),
        "after": summary(after, threshold),
        "chosen_fell": chosen_fell(before, after),
    }


def _export(
    trainer: PreferenceTrainer,
    recipe: Recipe,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
    folder: Path,
    result: dict[str, Any],
) -> None:
    """Write the model with its card to `folder`; how far the export is off goes into `result`."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    dtype = getattr(torch, recipe.export_dtype)
    result["export_difference"] = export_model(model, tokenizer, folder, end_token_ids, dtype)
    write_text(folder / "README.md", model_card(recipe, stage, result))
    # What the chat template was given in training, so that generation gives it the same.
    write_json(folder / "slimepo.json", {"template_options": recipe.template_options})


def stage_trainer(
    recipe: Recipe,
    stage: Stage,
    base: str | RandomModel,
    rows: StageRows,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> PreferenceTrainer:
    """The trainer of a stage, its model loaded and its adapter made from the recipe's seed."""
    from slimepo.training.trainer import PreferenceTrainer

    args = stage_arguments(recipe, stage, folder)
    model = stage_model(recipe, base, tokenizer)
    if recipe.adapter is not None and not isinstance(base, str):
        # An adapter's checkpoints are of use only beside the model they were made for.
        model.name_or_path = str((folder / "base").resolve())
        if is_main_process():
            model.save_pretrained(folder / "base")
    settings = monitor_settings(args.monitor)
    watching = [DisplacementMonitor(settings, folder, heldout=rows.heldout)] if settings else []
    set_seed(recipe.seed)
    return PreferenceTrainer(
        model=model,
        args=args,
        train_dataset=list(rows.train),
        processing_class=tokenizer,
        peft_config=lora(recipe.adapter) if recipe.adapter else None,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), *watching, *callbacks],
    )


def stage_model(
    recipe: Recipe, base: str | RandomModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model a stage starts from: loaded, or random, or shrunk for a smoke run."""
    if isinstance(base, RandomModel):
        config = random_config(base.architecture, base.sizes, tokenizer)
        return random_model(smoke_config(config) if recipe.smoke else config, recipe.seed)
    if recipe.smoke and base == recipe.model:
        return random_model(smoke_config(load_config(base)), recipe.seed)
    return load_model(base, dtype=base_dtype(recipe))


def stage_arguments(recipe: Recipe, stage: Stage, folder: Path) -> PreferenceConfig:
    """transformers' training arguments for a stage.

    Raises:
        InputError: an argument that does not exist or does not fit.
    """
    share = device_share(stage, recipe.smoke)
    micro = min(stage.micro_batch_size, share)
    checkpointing = stage.activation_checkpointing
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "loss": stage.loss,
        "loss_options": stage.loss_options,
        "reference": _reference(recipe, stage, folder),
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
        "report_to": "none",
        "monitor": stage.monitor if isinstance(stage.monitor, bool) else stage.monitor.model_dump(),
    }
    unknown = [key for key in stage.args if key not in PreferenceConfig.__dataclass_fields__]
    if unknown:
        hint = nearest(unknown[0], list(PreferenceConfig.__dataclass_fields__))
        raise InputError(
            f"stage {stage.name!r}: transformers' TrainingArguments have no {unknown[0]!r}{hint}"
        )
    try:
        return PreferenceConfig(**(values | stage.args))
    except (TypeError, ValueError) as error:
        raise InputError(f"stage {stage.name!r}: {error}") from error


def _reference(recipe: Recipe, stage: Stage, folder: Path) -> str:
    """What the trainer is told: the model that a stage before exported, or what the recipe says."""
    if stage.reference not in recipe.before(stage):
        return stage.reference
    return str(exported_model(folder.parent / stage.reference))


def exported_model(folder: Path) -> Path:
    """Where a stage with this folder leaves its model; absolute, as adapters name their base."""
    return (folder / "model").resolve()


def device_share(stage: Stage, smoke: bool = False) -> int:
    """Pairs of a step on each device.

    Raises:
        InputError: the batch cannot be shared out evenly over the devices.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = min(stage.batch_size, SMOKE_BATCH) if smoke else stage.batch_size
    if batch % ranks:
        raise InputError(
            f"stage {stage.name!r}: batch_size {batch} cannot be shared out over {ranks} devices"
        )
    return batch // ranks


def lora(adapter: Adapter) -> Any:
    """peft's configuration of the recipe's adapter."""
    return lora_config(
        adapter.r, adapter.alpha, adapter.dropout, adapter.target_modules or PROJECTIONS, adapter.train_head
    )


def base_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that weights are loaded in."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)  # type: ignore[no-any-return]
    # A model that trains whole keeps float32 weights: steps of 5e-7 vanish in bfloat16.
    return torch.bfloat16 if recipe.adapter is not None and computes_in_bf16() else torch.float32


def _scores(model: nn.Module, rows: Sequence[Row], console: Console, what: str) -> PairScores | None:
    if not rows:
        return None
    with console.status(what) as status:
        return score_pairs(model, rows, progress=lambda done, total: status.update(f"{what}: {done}/{total}"))
