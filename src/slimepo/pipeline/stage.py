"""One stage of a pipeline: a base model, an objective and rows in; an exported model and its figures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from slimepo.checkpoints.store import step_of
from slimepo.data.render import ChatFormat
from slimepo.data.rows import Row
from slimepo.errors import InputError, Preempted
from slimepo.files import is_main_process, write_json, write_text
from slimepo.losses import hyperparameters, slime
from slimepo.model.adapters import OF_ADAPTERS, refuse_unmergeable
from slimepo.model.logps import causal_lm
from slimepo.model.quantize import four_bit_kind, four_bit_weights
from slimepo.monitor.callback import DisplacementMonitor
from slimepo.monitor.settings import monitor_settings
from slimepo.parallel.engines import weights_of
from slimepo.pipeline.data import StageRows
from slimepo.pipeline.export import export_model, model_card
from slimepo.pipeline.heldout import AnswersByStep, compared, standing
from slimepo.pipeline.pairs.make import first_of
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import RandomModel, Stage
from slimepo.pipeline.rewards import stage_rewards
from slimepo.pipeline.start import (
    exported_adapter,
    is_made,
    lora,
    save_adapter,
    stage_model,
)
from slimepo.redaction import redact
from slimepo.training.callbacks import MetricsFile, SaveOnTerm, TrainingProgress, peak_memory
from slimepo.training.config import PreferenceConfig
from slimepo.training.steps import steps_of
from slimepo.words import plural

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.trainer import PreferenceTrainer

# Whose log-probs tell how far a merged model is from the one that trained on a base in four bits.
GAP_ROWS = 16
# Of fewer steps than these a run says that they are few.
FEW_STEPS = 10


def run_stage(
    recipe: Recipe,
    stage: Stage,
    args: PreferenceConfig,
    base: str | RandomModel,
    rows: StageRows,
    chat: ChatFormat,
    folder: Path,
    console: Console,
    accept: Collection[str] = (),
) -> dict[str, Any]:
    """Train, export to `folder/model`, write `folder/stage.json` and return what is in it.

    A stage that was interrupted goes on from its newest sound checkpoint and ends in the same weights; what of it is
    another run's is refused, but for what is in `accept`.
    """
    started = time.perf_counter()
    progress = TrainingProgress(console, stage.name)
    rewards = stage_rewards(stage, rows.tasks, folder)
    # accelerate has one state a process, and a stage may compute in another precision than the one before.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != args.mixed_precision:
        AcceleratorState._reset_state()
    trainer = stage_trainer(recipe, args, base, rows, chat.tokenizer, folder, [progress], **rewards)
    # What could not be exported is better known before it trains.
    refuse_unmergeable(trainer.model)
    for words in how_it_trains(trainer):
        console.print(f"{stage.name}: {words}")
    checkpoint = trainer.sound_checkpoint(accept)
    if checkpoint is not None:
        console.print(f"{stage.name}: going on from {checkpoint.name}")
    set_up = time.perf_counter()
    # Stages that train on the same pairs mostly start from the same model too; a sweep shares the folder of these.
    kept = folder.parent / stage.part if stage.part in recipe.pairs else None
    before = standing(trainer, rows, chat, console, "before", kept)
    stood = time.perf_counter()
    by_step = None
    if stage.answer_every is not None and rows.tasks is not None:
        by_step = AnswersByStep(
            folder, rows.tasks, chat, stage.answer_every, before.answers, trainer.whole_model, progress.say
        )
        trainer.add_callback(by_step)
    _train(trainer, recipe.seed, checkpoint, accept, folder, progress)
    trained = time.perf_counter()
    after = standing(trainer, rows, chat, console, "after")
    if by_step is not None:
        by_step.keep(trainer.state.global_step, after.answers)
    heldout = compared(
        rows, before, after, stage.loss_options.get("threshold", hyperparameters(slime)["threshold"]), folder
    )
    watched = trainer.monitor.seconds if trainer.monitor else 0.0
    answered = by_step.seconds if by_step else 0.0
    times = {
        "set_up": set_up - started,
        "before": stood - set_up,
        "training": trained - stood - watched - answered,
        "monitor": watched,
        "answers_by_step": answered,
        "after": time.perf_counter() - trained,
    }
    result = _figures(trainer, stage, base, times)
    result["resumed_from_step"] = step_of(checkpoint) if checkpoint else 0
    if heldout:
        result["heldout"] = heldout
    if trainer.monitor is not None:
        if before.scores is not None and after.scores is not None:
            trainer.monitor.conclude(before.scores, after.scores)
        result["monitor"] = trainer.monitor.record.summary(heldout if "pairs" in heldout else None)
    _export(trainer, recipe, stage, rows, chat, folder, result)
    if "merged" in result:
        merged = result["merged"]
        console.print(
            f"{stage.name}: merged onto the plain weights of its base: log-probs of {merged['tokens']:,} tokens "
            f"differ by at most {merged['largest']:.2g} nats, {merged['mean']:.2g} on the mean"
        )
    return result


def _train(
    trainer: PreferenceTrainer,
    seed: int,
    checkpoint: Path | None,
    accept: Collection[str],
    folder: Path,
    progress: TrainingProgress,
) -> None:
    """Train to the end. Raises Preempted: told to end before, and a checkpoint is written."""
    sampling = trainer.args.sampling
    ending = SaveOnTerm(sampling.steps if sampling else 1)
    trainer.add_callback(ending)
    try:
        # Scoring used no randomness that training needs, but the start must not depend on that.
        set_seed(seed)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, accept=accept)
    finally:
        progress.close()
        ending.restore()
        if trainer.certificate is not None and is_main_process():
            write_json(folder / "certificate.json", trainer.certificate)
    if ending.stopped:
        trainer.accelerator.wait_for_everyone()
        raise Preempted(
            f"{folder.name}: told to end; the same command goes on from step {trainer.state.global_step}"
        )


def _figures(
    trainer: PreferenceTrainer, stage: Stage, base: str | RandomModel, times: dict[str, float]
) -> dict[str, Any]:
    """What a stage that has trained was, and what it took."""
    parameters = [(weights_of(p), p.requires_grad) for p in trainer.model.parameters()]
    return {
        "name": stage.name,
        "loss": stage.loss,
        "loss_options": stage.loss_options,
        "base": base if isinstance(base, str) else base.model_dump(),
        "steps": trainer.state.global_step,
        "rows": len(trainer.train_dataset),
        "layout": trainer.layout,
        "reference": trainer.reference.source if trainer.reference else None,
        "parameters": sum(count for count, _ in parameters),
        "trained_parameters": sum(count for count, trains in parameters if trains),
        "peak_memory": peak_memory(),
        # Where another stage left it, "before" is found and takes no time: it never counts.
        "seconds": round(sum(times.values()) - times["before"], 1),
        "times": {part: round(seconds, 3) for part, seconds in times.items()},
        "monitor": None,
    }


def how_it_trains(trainer: PreferenceTrainer) -> list[str]:
    """What a trainer has chosen by itself, or was asked for, and is worth saying before it begins; a line each."""
    args = trainer.args
    steps = steps_of(len(trainer.get_train_dataloader()), args.max_steps, args.num_train_epochs)
    few = "; so few teach little: more epochs, or a smaller batch_size" if steps < FEW_STEPS else ""
    rows, of_step = len(trainer.train_dataset), args.train_batch_size * args.world_size
    said = [f"{rows:,} rows, {of_step:,} a step: {plural(steps, 'step')}{few}"]
    said += [f"layout {trainer.layout} ({trainer.layout_reason})"]
    if args.world_size > 1:
        said.append(f"{args.world_size} ranks, {args.parallel}")
    if trainer.reference is not None:
        said.append(f"reference {trainer.reference.source} ({trainer.reference.reason})")
    if (quantized := four_bit_weights(trainer.model)) > 0:
        named = causal_lm(trainer.model).named_parameters()
        weights = sum(weights_of(p) for name, p in named if not any(word in name for word in OF_ADAPTERS))
        said.append(f"base with {quantized:,} of {weights:,} weights in four bits")
    if args.activation_checkpointing:
        said.append(f"activations {trainer.activations}")
    return said


def _export(
    trainer: PreferenceTrainer,
    recipe: Recipe,
    stage: Stage,
    rows: StageRows,
    chat: ChatFormat,
    folder: Path,
    result: dict[str, Any],
) -> None:
    """The model with its card, and last of all `stage.json`; the trainer is of no use behind this."""
    # One set of weights is enough to export, in CPU memory: no optimizer, no reference beside it.
    whole = trainer.model_alone()
    if is_main_process():
        model = trainer.accelerator.unwrap_model(whole, keep_fp32_wrapper=False)
        if recipe.between_stages == "continue":
            save_adapter(recipe, model, exported_adapter(folder))
        quantized, kind = four_bit_weights(model), four_bit_kind(model)
        compared = [row for row in (*rows.heldout, *rows.train) if isinstance(row, Row)][:GAP_ROWS]
        made = export_model(
            model, chat.tokenizer, folder / "model", {chat.end_id}, getattr(torch, recipe.export_dtype),
            recipe.template_options, release=True, rows=compared if quantized else (),
        )  # fmt: skip
        result["export_difference"] = made.logits
        if quantized:
            result["quantized"] = {"kind": kind, "weights": quantized}
            result["merged"] = {"tokens": made.tokens, "largest": made.largest, "mean": made.mean}
        write_text(folder / "model" / "README.md", redact(model_card(recipe, stage, result)))
        # Written last: a stage with this file is done.
        write_json(folder / "stage.json", result)
    trainer.accelerator.wait_for_everyone()


def stage_trainer(
    recipe: Recipe,
    args: PreferenceConfig,
    base: str | RandomModel,
    rows: StageRows,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **rewards: Any,
) -> PreferenceTrainer:
    """The trainer of a stage, its model loaded and its adapter made from the recipe's seed.

    rewards: its `reward` and `cost`, where it samples.
    """
    from slimepo.training.trainer import PreferenceTrainer

    evaluates = args.eval_strategy != "no"
    if evaluates and not rows.heldout:
        raise InputError(
            f"stage {folder.name!r}: args.eval_strategy evaluates on held-out rows, and there are none: give "
            "data.heldout, or a part of data.parts named heldout"
        )
    model = stage_model(recipe, base, tokenizer)
    if recipe.adapter is not None and is_made(recipe, base):
        # An adapter's checkpoints are of use only beside the model they were made for.
        plain = causal_lm(model)
        plain.name_or_path = str((folder / "base").resolve())
        if is_main_process():
            plain.save_pretrained(folder / "base")
    settings = monitor_settings(args.monitor)
    watching = []
    if settings:
        watching = [DisplacementMonitor(settings, folder, heldout=rows.heldout, valid=_form_check(rows))]
    set_seed(recipe.seed)
    return PreferenceTrainer(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=list(rows.heldout) if evaluates else None,
        processing_class=tokenizer,
        peft_config=None if args.adapter == "continue" else lora(recipe),
        callbacks=[MetricsFile(folder / "metrics.jsonl"), *watching, *callbacks],
        **rewards,
    )


def _form_check(rows: StageRows) -> Callable[[str, str], bool] | None:
    """For the monitor: whether an answer has the form that its row's task asks for; None for rows of no task."""
    tasks = rows.tasks
    if tasks is None:
        return None
    of_id = {task.id: task for task in (*tasks.train, *tasks.heldout)}
    # The monitor asks what is held out, and where nothing is, rows that are trained on.
    of_row = {row.id: of_id.get(row.id) or of_id.get(first_of(row.id)) for row in rows.heldout or rows.train}
    if None in of_row.values():
        return None
    return lambda row_id, text: tasks.check(of_row[row_id], text).valid  # type: ignore[arg-type]
