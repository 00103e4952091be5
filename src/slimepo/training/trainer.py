"""The trainer: transformers' Trainer with the loss of a step computed from per-token log-probs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from slimepo.data.batch import Layout, PairBatch, StepCollator, epoch_order, length
from slimepo.data.chat import load_tokenizer
from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError, NonFiniteLossError
from slimepo.losses import Counts, bind, find_objective, step_loss
from slimepo.training.adapters import add_adapter
from slimepo.training.callbacks import EpochOfSampler, LogBeforeSave
from slimepo.training.config import PreferenceConfig, SLIMEConfig
from slimepo.training.datasets import tokenized
from slimepo.training.layout import choose_layout, untried_layout
from slimepo.training.logps import causal_lm, install_logps, policy_logps, verify_logps
from slimepo.training.metrics import MetricSums, side_tokens
from slimepo.training.models import check_embeddings, load_model
from slimepo.types import LossOutput


class PreferenceTrainer(Trainer):
    """Train a causal language model on preference pairs with any objective of `slimepo.losses.LOSSES`.

    What differs from transformers' Trainer: a dataloader item is a whole optimizer step (a list of
    micro-batches), so that its loss can be divided by the pairs of the global batch whatever the layout; the
    order of rows is a function of seed and epoch; a non-finite loss stops the run.

    Args:
        model: a model, a folder or a Hub id.
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

    def __init__(
        self,
        model: nn.Module | str,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = _whole_steps(args or SLIMEConfig())
        objective = find_objective(args.loss)
        self.loss_function = bind(args.loss, args.loss_options)
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
        loaded = load_model(model, **args.model_init_kwargs) if isinstance(model, str) else model
        policy = _prepared(loaded, args, processing_class, peft_config)
        sides = objective.sides
        train_rows = tokenized(train_dataset, processing_class, args, sides)
        if isinstance(eval_dataset, Mapping):
            eval_rows: Any = {k: tokenized(v, processing_class, args, sides) for k, v in eval_dataset.items()}
        else:
            eval_rows = tokenized(eval_dataset, processing_class, args, sides)
        self.sampler = EpochSampler([length(row) for row in train_rows or ()], args)
        self._window: MetricSums | None = None
        super().__init__(
            model=policy,
            args=args,
            data_collator=StepCollator(
                args.micro_batch_size or 1,
                sides,
                _pad_id(processing_class),
                max_tokens=args.max_tokens_per_batch,
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            callbacks=[EpochOfSampler(self.sampler), LogBeforeSave(), *callbacks],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.layout, self.layout_reason = self._layout(args, sides)
        self.data_collator = replace(self.data_collator, layout=self.layout)

    def _layout(self, args: PreferenceConfig, sides: tuple[str, ...]) -> tuple[Layout, str]:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # The probe needs whole weights, which sharded models do not have here.
            return untried_layout(self.model, args.layout)
        if args.verify_model:
            verify_logps(self.model)
        return choose_layout(self.model, args.layout, sides)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def training_step(
        self, model: nn.Module, inputs: list[PairBatch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one optimizer step; returns its loss times the number of ranks.

        (The Trainer takes the mean over ranks of what this returns, and so do wrapped models of gradients.)
        """
        self._window = self._window or MetricSums()
        model.train()
        batches = self._prepare_inputs(inputs)
        counts = self._global_counts(batches)
        ranks = self.accelerator.num_processes
        total = torch.zeros((), device=self.args.device)
        outputs = []
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                output = self._objective(model, batch)
                loss = step_loss(output, counts) * ranks
                self.accelerator.backward(loss)
            total += loss.detach()
            outputs.append(output)
        if not torch.isfinite(total):
            self._stop_on_non_finite(batches, outputs)
        for batch, output in zip(batches, outputs, strict=True):
            self._window.add(batch, output)
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PairBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch taken alone: its mean over the pairs in it."""
        output = self._objective(model, inputs)
        loss = step_loss(output, _counts([inputs]))
        return (loss, output) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics over a dataset, in eval mode, means over its pairs; logged with the prefix."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, Mapping):
            parts = [
                self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, rows in chosen.items()
            ]
            return {key: value for part in parts for key, value in part.items()}
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.score(chosen).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def score(self, rows: Sequence[TokenizedPair]) -> dict[str, float]:
        """Mean loss and metrics of the current model on tokenised rows, over all ranks."""
        model = self._wrap_model(self.model, training=False)
        training = model.training
        model.eval()
        collator: StepCollator = self.data_collator
        size, ranks = self.args.eval_batch_size, self.accelerator.num_processes
        ordered = sorted(rows, key=length, reverse=True)
        chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        sums = MetricSums()
        for first in range(0, len(chunks), ranks):
            # Every rank runs the same number of forward passes, as sharded models need; a surplus one is not counted.
            mine = first + self.accelerator.process_index
            chunk = chunks[min(mine, len(chunks) - 1)]
            batch = self._prepare_inputs(collator.batch(chunk))
            output = self._objective(model, batch)
            sums.add(batch, output, weight=int(mine < len(chunks)))
        model.train(training)
        return sums.reduced(self.accelerator).means()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics since the last time to what the Trainer logs."""
        if "loss" in logs and self._window is not None:
            window, self._window = self._window.reduced(self.accelerator), None
            logs = {**window.means(), **window.speed(), **logs}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: list[PairBatch]) -> int:
        """6 * parameters * tokens, over the micro-batches of a step."""
        return sum(int(super(PreferenceTrainer, self).floating_point_ops(dict(b))) for b in inputs)

    def _objective(self, model: nn.Module, batch: PairBatch) -> LossOutput:
        return self.loss_function(policy_logps(model, batch), None)

    def _global_counts(self, batches: list[PairBatch]) -> Counts:
        local = _counts(batches)
        if self.accelerator.num_processes == 1:
            return local
        counts = torch.tensor(local, dtype=torch.float64, device=self.args.device)
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
    """`PreferenceTrainer` under the name of the objective; takes the arguments of TRL's `DPOTrainer`."""


class EpochSampler(Sampler[int]):
    """Row order by `epoch_order`; `epoch` is set by a callback, so that a resumed run goes on exactly."""

    def __init__(self, lengths: Sequence[int], args: PreferenceConfig) -> None:
        strategy = args.train_sampling_strategy
        if strategy not in ("random", "group_by_length", "sequential"):
            raise InputError(
                f"train_sampling_strategy = {strategy!r} is not supported: give random, group_by_length or sequential"
            )
        self.lengths, self.strategy = lengths, strategy
        self.batch_size = args.train_batch_size
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.strategy == "sequential":
            return iter(range(len(self.lengths)))
        by_length = self.strategy == "group_by_length"
        return iter(epoch_order(self.lengths, self.batch_size, self.seed, self.epoch, by_length))


def _prepared(
    model: nn.Module, args: PreferenceConfig, tokenizer: PreTrainedTokenizerBase | None, peft_config: Any
) -> nn.Module:
    """The model as it trains: fitting the tokenizer, with its adapter, without dropout, giving log-probs."""
    if tokenizer is not None:
        check_embeddings(causal_lm(model), tokenizer)
    if peft_config is not None:
        model = add_adapter(causal_lm(model), peft_config)
    if args.disable_dropout:
        _disable_dropout(model)
    install_logps(model)
    return model


def _whole_steps(args: PreferenceConfig) -> PreferenceConfig:
    """Let one dataloader batch be one optimizer step; the micro-batch size is kept beside it."""
    args = copy.copy(args)
    args.micro_batch_size = args.per_device_train_batch_size
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    if args.n_gpu > 1:
        # torch.nn.DataParallel would split the list of micro-batches; ranks come from torchrun or accelerate.
        args._n_gpu = 1
    return args


def _counts(batches: Sequence[PairBatch]) -> Counts:
    tokens = [side_tokens(batch) for batch in batches]
    pairs = sum(batch["pairs"] for batch in batches)
    return Counts(pairs, sum(t["chosen"] for t in tokens), sum(t["rejected"] for t in tokens))


def _finite_rows(output: LossOutput) -> list[bool]:
    finite = torch.isfinite(output.loss)
    for sums in output.token_loss.values():
        finite = finite & torch.isfinite(sums)
    return [bool(ok) for ok in finite]


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    return 0 if pad is None else pad
