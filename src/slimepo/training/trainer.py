"""The trainer: transformers' Trainer with the loss of a step computed from per-token log-probs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from slimepo.data.batch import Batch, Step, StepCollator
from slimepo.data.chat import load_tokenizer
from slimepo.data.rows import Row, length
from slimepo.errors import InputError, NonFiniteLossError
from slimepo.losses import bind, find_objective, step_loss
from slimepo.model.load import load_model
from slimepo.model.logps import policy_logps
from slimepo.model.modes import compute_dtype, measuring
from slimepo.model.offload import activations
from slimepo.model.tryout import choose_layout, verify_logps
from slimepo.monitor.callback import DisplacementMonitor, Watched
from slimepo.monitor.settings import monitor_settings
from slimepo.training.callbacks import EpochOfSampler, LogBeforeSave, OffloadCheckpoints, TrainingProgress
from slimepo.training.config import PreferenceConfig, SLIMEConfig
from slimepo.training.dataset import tokenized, without_reference
from slimepo.training.metrics import MetricSums, non_finite_rows, pair_counts
from slimepo.training.prepare import prepared, refuse_sharding, whole_steps
from slimepo.training.reference import (
    Reference,
    choose_reference,
    frozen,
    mismatched_log_ratios,
    reference_logps,
)
from slimepo.training.reference_cache import with_reference
from slimepo.training.steps import StepSampler, rows_read, shared_chunks, step_sampler
from slimepo.types import LossOutput, PairLogps

logger = logging.getLogger(__name__)


class PreferenceTrainer(Trainer):
    """Train a causal language model on preference pairs with any objective of `slimepo.losses.LOSSES`.

    What differs from transformers' Trainer: a dataloader item is a whole optimizer step (a list of
    micro-batches), so that its loss can be divided by the pairs of the global batch whatever the layout; the
    rows of a step are a function of seed and epoch; a non-finite loss or gradient stops the run.

    Args:
        model: a model, a folder or a Hub id. Parameters that train are held in float32.
        args: a `PreferenceConfig`; `SLIMEConfig()` by default.
        train_dataset: rows in any format that `slimepo.data.formats` knows (a TRL dataset as it is), a list of
            `Preference`, or a list of `Row`.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer; taken from the model's folder where it is not given.
        peft_config: an adapter to train instead of the whole model, such as `slimepo.lora_config()`.
    """

    loss_is_scaled_for_ga = True
    control: Any
    data_collator: Any
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module | str,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = whole_steps(args or SLIMEConfig())
        refuse_sharding(args)
        self.objective = find_objective(args.loss)
        self.loss_function = bind(args.loss, args.loss_options)
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
        loaded = load_model(model, **args.model_init_kwargs) if isinstance(model, str) else model
        policy = prepared(loaded, processing_class, peft_config, disable_dropout=args.disable_dropout)
        shown = [] if args.disable_tqdm else [TrainingProgress()]
        own = [EpochOfSampler(), LogBeforeSave(), OffloadCheckpoints(), *shown]
        watching = _monitors(args, callbacks or [])
        super().__init__(
            model=policy,
            args=args,
            data_collator=StepCollator(
                args.micro_batch_size or 1,
                self.objective.positions,
                getattr(processing_class, "pad_token_id", None) or 0,
                max_tokens=args.max_tokens_per_batch,
            ),
            train_dataset=tokenized(train_dataset, processing_class, args, self.objective),
            processing_class=processing_class,
            callbacks=[*own, *watching, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if args.verify_model:
            verify_logps(self.model)
        self.layout, self.layout_reason = choose_layout(
            self.model, args.layout, self.objective.positions, args.attention, compute_dtype(args)
        )
        self.activations = activations(args)
        self.data_collator = replace(self.data_collator, layout=self.layout)
        self.reference = self._open_reference()
        self.eval_dataset = self._rows(eval_dataset, fresh=True)
        # A rank without rows in a short last step still takes part in it, with weight 0.
        self._spare: Step = self.data_collator(self.train_dataset[:1])
        self._window: MetricSums | None = None
        self.monitor = next(
            (c for c in self.callback_handler.callbacks if isinstance(c, DisplacementMonitor)), None
        )
        if self.monitor is not None:
            held_out = self.eval_dataset or []
            parts = held_out.values() if isinstance(held_out, Mapping) else [held_out]
            self.monitor.watch(
                Watched(
                    args.loss,
                    args.loss_options,
                    self.train_dataset or [],
                    [row for part in parts for row in part],
                    self.data_collator,
                    # As many as train at once fit without gradients at the least.
                    max(int(args.eval_batch_size), args.micro_batch_size or 1),
                )
            )
            if shown and self.monitor.record.say is None:
                self.monitor.record.say = shown[0].warn

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps of the epoch, of which this rank takes its share; a step is a list of micro-batches."""
        if self.train_dataset is None:
            raise InputError("there is nothing to train on: give train_dataset")
        sampler = self._sampler()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EpochOfSampler):
                callback.sampler = sampler
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(
        self, model: nn.Module, inputs: Step, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one optimizer step; returns its loss, of which every rank has its part.

        Gradients and the returned loss are multiplied by the number of ranks, because both are averaged over them.
        """
        self._window = self._window or MetricSums()
        model.train()
        counts = pair_counts(inputs["batches"], self.accelerator)
        weight = self.accelerator.num_processes if inputs["batches"] else 0
        step: Any = self._prepare_inputs(inputs if inputs["batches"] else self._spare)
        batches = step["batches"]
        divergence = self._step_divergence(step["mismatched"], weight=int(weight > 0))
        references = self._references(batches)
        losses, outputs = [], []
        for i, (batch, reference) in enumerate(zip(batches, references, strict=True)):
            last = i == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                output = self._objective(model, batch, reference, divergence)
                loss = step_loss(output, counts) * weight
                self.accelerator.backward(loss)
            losses.append(loss.detach())
            outputs.append(output)
        total = torch.stack(losses).sum()
        if not torch.isfinite(self.accelerator.reduce(total, "sum")):
            self._stop_on_non_finite(batches, outputs)
        for batch, output in zip(batches, outputs, strict=True):
            self._window.add(batch, output, weight=int(weight > 0))
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Step,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a step's rows taken alone: its mean over them."""
        batches = inputs["batches"]
        divergence = self._step_divergence(inputs["mismatched"])
        counts = pair_counts(batches)
        outputs = [
            self._objective(model, batch, reference, divergence)
            for batch, reference in zip(batches, self._references(batches), strict=True)
        ]
        loss = torch.stack([step_loss(output, counts) for output in outputs]).sum()
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics over a dataset, in eval mode, means over its pairs; logged with the prefix."""
        rows = self.eval_dataset if eval_dataset is None else self._rows(eval_dataset)
        if rows is None:
            raise InputError("there is nothing to evaluate on: give eval_dataset")
        if isinstance(rows, Mapping):
            parts = [
                self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items()
            ]
            return {key: value for part in parts for key, value in part.items()}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.score(rows).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not of use here: a preference model predicts nothing but log-probs, which `slimepo.score_pairs` gives."""
        raise InputError("PreferenceTrainer has no predict: slimepo.score_pairs gives the log-probs of pairs")

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """Mean loss and metrics of the current model on tokenised rows, over all ranks.

        In the precision of `slimepo.model.modes.measuring`, so that figures compare before and after.
        """
        rows, sums = self._rows(rows), MetricSums()
        with measuring(self.model) as forward:
            each = list(self._eval_batches(rows))
            others = [other for step, weight in each for other in step["mismatched"] if weight]
            divergence = self._divergence(forward, [self._prepare_inputs(other) for other in others])
            for step, weight in each:
                batch = self._prepare_inputs(step["batches"][0])
                reference = reference_logps(self.reference, [batch])[0] if self.reference else None
                sums.add(batch, self._objective(forward, batch, reference, divergence), weight)
        return sums.reduced(self.accelerator).means()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics since the last time to what the Trainer logs."""
        if "loss" in logs and self._window is not None:
            window, self._window = self._window.reduced(self.accelerator), None
            measured = self.monitor.figures_to_log() if self.monitor else {}
            logs = {**window.means(), **window.speed(), **measured, **logs}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Step) -> int:
        """6 * parameters * tokens, over the micro-batches of a step."""
        return sum(int(super(PreferenceTrainer, self).floating_point_ops(dict(b))) for b in inputs["batches"])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, which the Trainer asks for before every optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteLossError(
                f"the gradient is not finite at step {self.state.global_step + 1}, although the loss is; "
                "the weights are as they were. Lower the learning rate"
            )
        return norm

    def _sampler(self) -> StepSampler:
        lengths = [length(row, self.objective.positions) for row in self.train_dataset]
        return step_sampler(lengths, self.args, self.accelerator)

    def _rows(self, dataset: Any, fresh: bool = False) -> Any:
        """Tokenised rows with what the reference says of them; `fresh`: whatever another trainer's has said."""
        if isinstance(dataset, Mapping):
            return {name: self._rows(part, fresh) for name, part in dataset.items()}
        rows = tokenized(dataset, self.processing_class, self.args, self.objective)
        if fresh and rows is not None:
            rows = without_reference(rows)
        if self.reference is None or not self.reference.cached or rows is None:
            return rows
        if all("reference" in row.values for row in rows):
            return rows
        # Once training has begun, the model that they would have to be scored with has changed.
        begun = self.state.global_step > 0 or self.is_in_train
        return rows if begun else self._with_reference(rows, self.reference, lambda: measuring(self.model))

    def _open_reference(self) -> Reference | None:
        """Where reference log-probs come from; rows whose log-probs are computed beforehand have them then."""
        if not self.objective.needs_reference:
            return None
        options = self.args.model_init_kwargs
        reference = choose_reference(
            self.model, self.args.reference, self.layout, self.processing_class, **options
        )
        if self.train_dataset:
            # Rows that another trainer had bring its reference's log-probs with them.
            self.train_dataset = without_reference(self.train_dataset)
        if self.train_dataset and reference.cached:
            read = rows_read(self._sampler(), self.args.max_steps, self.args.num_train_epochs)
            rows = [self.train_dataset[i] for i in read]
            known = self._with_reference(rows, reference, self.accelerator.autocast)
            for i, row in zip(read, known, strict=True):
                self.train_dataset[i] = row
        return reference

    def _with_reference(
        self,
        rows: list[Row],
        reference: Reference,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> list[Row]:
        callbacks = self.callback_handler.callbacks if self.accelerator.is_main_process else []
        shown = next((c for c in callbacks if isinstance(c, TrainingProgress)), None)
        started = time.monotonic()
        with shown.counted("reference log-probs") if shown else nullcontext() as report:
            rows, cached = with_reference(
                rows, reference, self.model, self.data_collator, precision, self.accelerator, report
            )
        how = "from the cache" if cached else f"computed in {time.monotonic() - started:,.0f} s"
        (shown.say if shown else logger.info)(f"reference log-probs of {len(rows):,} rows {how}")
        return rows

    def _references(self, batches: Sequence[Batch]) -> Sequence[PairLogps | None]:
        """Reference log-probs of each batch, in the precision that training computes in."""
        if self.reference is None:
            return [None] * len(batches)
        with self.accelerator.autocast():
            return reference_logps(self.reference, batches)

    def _step_divergence(self, batches: Sequence[Batch], weight: int = 1) -> Tensor | None:
        """The divergence of a step's batches, in the precision that training computes in."""
        if not self.objective.mismatched:
            # Switching a large model between its modes takes time, which no other objective should spend.
            return None
        with self.accelerator.autocast(), frozen(self.model)() as forward:
            return self._divergence(forward, batches, weight)

    def _divergence(self, forward: Any, batches: Sequence[Batch], weight: int = 1) -> Tensor | None:
        """Mean log-ratio of answers to other prompts, over all ranks; None where none is read."""
        if not self.objective.mismatched or self.reference is None:
            return None
        sums = mismatched_log_ratios(forward, self.reference, batches, self.args.device) * weight
        total, count = self.accelerator.reduce(sums, "sum")
        mean: Tensor = total / count.clamp(min=1)
        return mean

    def _eval_batches(self, rows: Sequence[Row]) -> Iterator[tuple[Step, int]]:
        """This rank's batches of rows, each with weight 1; weight 0 where it only keeps the others company."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        lengths = [length(row, self.objective.positions) for row in rows]
        whole = replace(self.data_collator, micro_batch_size=len(rows), max_tokens=None)
        for chunk, weight in shared_chunks(lengths, self.args.eval_batch_size, rank, ranks):
            yield whole([rows[i] for i in chunk]), weight

    def _objective(
        self, forward: Any, batch: Batch, reference: PairLogps | None, divergence: Tensor | None
    ) -> LossOutput:
        policy = policy_logps(forward, batch)
        if self.objective.mismatched:
            return self.loss_function(policy, reference, divergence)
        return self.loss_function(policy, reference)

    def _stop_on_non_finite(self, batches: list[Batch], outputs: list[LossOutput]) -> None:
        rows = ", ".join(non_finite_rows(batches, outputs)) or "of another rank"
        raise NonFiniteLossError(
            f"the loss is not finite at step {self.state.global_step + 1}; rows: {rows}. "
            "Look at these rows, or lower the learning rate"
        )


class SLIMETrainer(PreferenceTrainer):
    """`PreferenceTrainer` under the name of the objective.

    Where TRL's `DPOTrainer` is called with model, args, train_dataset, eval_dataset, processing_class, peft_config,
    callbacks and optimizers, this is called the same way. There is no reference model to give.
    """


def _monitors(args: PreferenceConfig, given: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """The displacement monitor that the config asks for, unless the caller brings one."""
    settings = monitor_settings(args.monitor)
    if settings is None or any(isinstance(callback, DisplacementMonitor) for callback in given):
        return []
    return [DisplacementMonitor(settings, args.output_dir or ".")]
