"""The trainer: transformers' Trainer with the loss of a step computed from per-token log-probs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from slimepo.data.batch import PairBatch, StepCollator, length
from slimepo.data.chat import load_tokenizer
from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError, NonFiniteLossError
from slimepo.losses import Counts, bind, find_objective, step_loss
from slimepo.losses.dpo import log_ratios
from slimepo.training.callbacks import EpochOfSampler, LogBeforeSave, OffloadCheckpoints, TrainingProgress
from slimepo.training.config import PreferenceConfig, SLIMEConfig
from slimepo.training.datasets import tokenized
from slimepo.training.layout import choose_layout, verify_logps
from slimepo.training.logps import policy_logps
from slimepo.training.metrics import MetricSums, side_tokens
from slimepo.training.models import load_model
from slimepo.training.monitor import DisplacementMonitor
from slimepo.training.offload import activations
from slimepo.training.order import StepSampler
from slimepo.training.pace import monitor_settings
from slimepo.training.precision import measuring
from slimepo.training.prepare import prepared, refuse_sharding, whole_steps
from slimepo.training.reference import (
    Reference,
    choose_reference,
    frozen,
    reference_logps,
    with_reference,
)
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
            `Preference`, or a list of `TokenizedPair`.
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
        self.sides = self.objective.sides
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
                self.sides,
                _pad_id(processing_class),
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
            self.model, args.layout, self.sides, args.attention, _autocast(args)
        )
        self.activations = activations(args)
        self.data_collator = replace(self.data_collator, layout=self.layout)
        self.reference = self._open_reference()
        self.eval_dataset = self._rows(eval_dataset)
        # A rank without rows in a short last step still takes part in it, with weight 0.
        self._spare = self.data_collator(self.train_dataset[:1]) if self.train_dataset else []
        self._window: MetricSums | None = None
        self.monitor = next(
            (c for c in self.callback_handler.callbacks if isinstance(c, DisplacementMonitor)), None
        )
        if self.monitor is not None:
            self.monitor.attach(self)
            if shown and watching:
                self.monitor.record.say = shown[0].warn

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps of the epoch, of which this rank takes its share; a step is a list of micro-batches."""
        if self.train_dataset is None:
            raise InputError("there is nothing to train on: give train_dataset")
        args, ranks = self.args, self.accelerator.num_processes
        sampler = StepSampler(
            lengths=[length(row, self.sides) for row in self.train_dataset],
            step_size=args.train_batch_size * ranks,
            seed=args.seed if args.data_seed is None else args.data_seed,
            strategy=args.train_sampling_strategy,
            drop_last=args.dataloader_drop_last,
            rank=self.accelerator.process_index,
            ranks=ranks,
        )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EpochOfSampler):
                callback.sampler = sampler
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def training_step(
        self, model: nn.Module, inputs: list[PairBatch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one optimizer step; returns its loss, of which every rank has its part.

        Gradients and the returned loss are multiplied by the number of ranks, because both are averaged over them.
        """
        self._window = self._window or MetricSums()
        model.train()
        counts = self._global_counts(inputs)
        weight = self.accelerator.num_processes if inputs else 0
        batches = self._prepare_inputs(inputs or self._spare)
        divergence = self._step_divergence(batches, weight=int(weight > 0))
        losses, outputs = [], []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                output = self._objective(model, batch, self._reference(batch), divergence)
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
        inputs: PairBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch taken alone: its mean over the pairs in it."""
        divergence = self._step_divergence([inputs])
        output = self._objective(model, inputs, self._reference(inputs), divergence)
        loss = step_loss(output, _counts([inputs]))
        return (loss, output) if return_outputs else loss

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

    def score(self, rows: Sequence[TokenizedPair]) -> dict[str, float]:
        """Mean loss and metrics of the current model on tokenised rows, over all ranks.

        In the precision of `slimepo.training.precision.measuring`, so that figures compare before and after.
        """
        rows, sums = self._rows(rows), MetricSums()
        with measuring(self.model) as forward:
            divergence = self._divergence(forward, self._eval_batches(rows))
            for batch, weight in self._eval_batches(rows):
                reference = reference_logps(self.reference, batch) if self.reference else None
                sums.add(batch, self._objective(forward, batch, reference, divergence), weight)
        return sums.reduced(self.accelerator).means()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics since the last time to what the Trainer logs."""
        if "loss" in logs and self._window is not None:
            window, self._window = self._window.reduced(self.accelerator), None
            measured = self.monitor.figures_to_log() if self.monitor else {}
            logs = {**window.means(), **window.speed(), **measured, **logs}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: list[PairBatch]) -> int:
        """6 * parameters * tokens, over the micro-batches of a step."""
        return sum(int(super(PreferenceTrainer, self).floating_point_ops(dict(b))) for b in inputs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, which the Trainer asks for before every optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise NonFiniteLossError(
                f"the gradient is not finite at step {self.state.global_step + 1}, although the loss is; "
                "the weights are as they were. Lower the learning rate"
            )
        return norm

    def _rows(self, dataset: Any) -> Any:
        if isinstance(dataset, Mapping):
            return {name: self._rows(part) for name, part in dataset.items()}
        rows = tokenized(dataset, self.processing_class, self.args, self.objective)
        if self.reference is None or not self.reference.cached or not rows or rows[0].reference is not None:
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
        if reference.cached and self.train_dataset:
            self.train_dataset = self._with_reference(
                self.train_dataset, reference, self.accelerator.autocast
            )
        elif self.train_dataset:
            # Rows that another trainer had bring its reference's log-probs with them.
            self.train_dataset = [replace(row, reference=None) for row in self.train_dataset]
        return reference

    def _with_reference(
        self,
        rows: list[TokenizedPair],
        reference: Reference,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> list[TokenizedPair]:
        rows, cached = with_reference(
            rows, reference, self.model, self.data_collator, precision, self.accelerator
        )
        logger.info(
            "reference log-probs of %d rows %s", len(rows), "from the cache" if cached else "computed"
        )
        return rows

    def _reference(self, batch: PairBatch) -> PairLogps | None:
        """Reference log-probs of a batch, in the precision that training computes in."""
        if self.reference is None:
            return None
        with self.accelerator.autocast():
            return reference_logps(self.reference, batch)

    def _step_divergence(self, batches: Sequence[PairBatch], weight: int = 1) -> Tensor | None:
        """The divergence of a step's batches, in the precision that training computes in."""
        if not self.objective.mismatched:
            # Switching a large model between its modes takes time, which no other objective should spend.
            return None
        with self.accelerator.autocast(), frozen(self.model)() as forward:
            return self._divergence(forward, ((batch, weight) for batch in batches))

    def _divergence(self, forward: Any, batches: Iterable[tuple[PairBatch, int]]) -> Tensor | None:
        """Mean log-ratio of the mismatched answers of weighted batches, over all ranks; None where none is read."""
        if not self.objective.mismatched or self.reference is None:
            return None
        parts = []
        for batch, weight in batches:
            other = batch["mismatched"]
            if other is None:
                raise InputError(f"row {batch['row_ids'][0]} has no mismatched answer")
            policy, reference = policy_logps(forward, other), reference_logps(self.reference, other)
            ratios = log_ratios(policy, reference).chosen
            parts.append(weight * torch.stack([ratios.sum(), torch.full_like(ratios[0], len(ratios))]))
        total, count = self.accelerator.reduce(torch.stack(parts).sum(dim=0), "sum")
        mean: Tensor = total / count.clamp(min=1)
        return mean

    def _eval_batches(self, rows: Sequence[TokenizedPair]) -> Iterator[tuple[PairBatch, int]]:
        """This rank's batches of rows, each with weight 1; weight 0 where it only keeps the others company."""
        size, ranks = self.args.eval_batch_size, self.accelerator.num_processes
        ordered = sorted(rows, key=lambda row: length(row, self.sides), reverse=True)
        chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        for first in range(0, len(chunks), ranks):
            # A rank left without a chunk scores the last one with weight 0: its sums need the same names.
            mine = first + self.accelerator.process_index
            batch = self._prepare_inputs(self.data_collator.batch(chunks[min(mine, len(chunks) - 1)]))
            yield batch, int(mine < len(chunks))

    def _objective(
        self, forward: Any, batch: PairBatch, reference: PairLogps | None, divergence: Tensor | None
    ) -> LossOutput:
        policy = policy_logps(forward, batch)
        if self.objective.mismatched:
            return self.loss_function(policy, reference, divergence)
        return self.loss_function(policy, reference)

    def _global_counts(self, batches: list[PairBatch]) -> Counts:
        local = _counts(batches)
        if self.accelerator.num_processes == 1:
            return local
        # Counts of a step are far below 2**24, so float32 holds them exactly on every device.
        counts = torch.tensor(local, dtype=torch.float32, device=self.args.device)
        return Counts(*self.accelerator.reduce(counts, "sum").tolist())

    def _stop_on_non_finite(self, batches: list[PairBatch], outputs: list[LossOutput]) -> None:
        bad = [
            row
            for batch, output in zip(batches, outputs, strict=True)
            for row, ok in zip(batch["row_ids"], _finite_rows(output), strict=True)
            if not ok
        ]
        rows = ", ".join(bad) or "of another rank"
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


def _autocast(args: PreferenceConfig) -> torch.dtype | None:
    """What training computes in, where that is not the weights' dtype."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _counts(batches: Sequence[PairBatch]) -> Counts:
    tokens = [side_tokens(batch) for batch in batches]
    pairs = sum(batch["pairs"] for batch in batches)
    return Counts(pairs, sum(t["chosen"] for t in tokens), sum(t["rejected"] for t in tokens))


def _finite_rows(output: LossOutput) -> list[bool]:
    finite = torch.isfinite(output.loss)
    for sums in output.token_loss.values():
        finite = finite & torch.isfinite(sums)
    return [bool(ok) for ok in finite]


def _pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    return 0 if pad is None else pad
