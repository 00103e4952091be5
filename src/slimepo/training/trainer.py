"""The trainer: transformers' Trainer with the loss of a step computed from per-token log-probs."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import speed_metrics

from slimepo.checkpoints import store
from slimepo.checkpoints.resume import newest_of_run, refuse_other
from slimepo.data.batch import Step, StepCollator, to_device
from slimepo.data.rows import Row
from slimepo.errors import BadFilesError, CertificateError, InputError, NonFiniteLossError
from slimepo.files import write_json
from slimepo.losses import bind, find_objective, step_loss
from slimepo.losses.composed import option_key
from slimepo.model.balance import balance_coefficient
from slimepo.model.load import load_model, refuse_other_tensors
from slimepo.model.logps import causal_lm
from slimepo.model.modes import compute_dtype, scoring
from slimepo.model.quantize import quantization_note
from slimepo.model.tryout import choose_layout
from slimepo.monitor.callback import DisplacementMonitor, Watched
from slimepo.monitor.settings import monitor_settings
from slimepo.onpolicy.prompts import PromptDataset, prompts_from
from slimepo.onpolicy.rewards import Prompt
from slimepo.parallel.agree import of_all_ranks, on_main
from slimepo.parallel.engines import (
    gathered,
    load_whole,
    settle_fsdp,
    skeleton,
    take_settings_anew,
    whole_model,
)
from slimepo.training.callbacks import (
    EpochOfSampler,
    FiniteWeights,
    LogBeforeSave,
    MovingReference,
    Sharding,
    TrainingProgress,
    WholeRollouts,
)
from slimepo.training.certificate import Certified, certify, in_words
from slimepo.training.config import PreferenceConfig, SLIMEConfig
from slimepo.training.dataset import RowDataset, make_dataset, read_stream, refuse_lengths
from slimepo.training.metrics import MetricSums
from slimepo.training.optimizers import clipped_sstm
from slimepo.training.prepare import (
    arguments,
    model_notes,
    own_tokenizer,
    prepared,
    read_once,
    refuse_changes,
    refuse_no_step,
    refuse_rows,
    run_identity,
    settings_of,
)
from slimepo.training.reference import reference_for
from slimepo.training.reference_cache import add_reference
from slimepo.training.rollouts import rollout_source, sampling_inputs
from slimepo.training.scores import score_dataset
from slimepo.training.step import (
    Done,
    OutOfMemory,
    beside_the_policy,
    meet_again,
    non_finite_rows,
    output_of,
    policy_tokens,
    row_weight,
    step_counts,
    train_step,
)
from slimepo.training.steps import StepSampler, rows_read, step_sampler
from slimepo.training.trl_names import in_own_arguments
from slimepo.words import first_line

logger = logging.getLogger(__name__)
# Rows that an error names.
_NAMED = 16
_Callback = TypeVar("_Callback", bound=TrainerCallback)


class PreferenceTrainer(Trainer):
    """Train a causal language model on preference pairs with any objective of `slimepo.losses.LOSSES`.

    What differs from transformers' Trainer: a dataloader item is a whole optimizer step (a list of
    micro-batches), so that its loss can be divided by the pairs of the global batch whatever the layout; the
    rows of a step are a function of seed and epoch; a non-finite loss or gradient stops the run.

    Args:
        model: a model, a folder or a Hub id. Parameters that train are held in float32.
        args: a `PreferenceConfig`; `SLIMEConfig()` by default.
        train_dataset: rows in any format that `slimepo.data.formats` knows (a TRL dataset as it is), a list of
            `Preference`, or a list of `Row`. Of a stream as many rows are read as `max_steps` steps take, in its order.
            With `rollouts` in the config, rows with a `prompt` and whatever else the reward reads.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer; the model's own, by its name, where it is not given.
        peft_config: an adapter to train instead of the whole model, such as `slimepo.lora_config()`.
        reward: for rollouts: a function (prompt, completions, row) that gives each completion a number; several of
            them; or functions with weights by name. prompt: a list of messages; completions: texts.
        cost: the same, of what an answer costs, where `rollouts` have a `cost` with a limit.
        positional, others: what else TRL's trainers take (`slimepo.training.trl_names`), such as `ref_model`, a frozen
            model in place of the config's `reference`, or `quantization_config`, for loading the model.

    Raises:
        InputError: an argument, a setting, a row or a model that cannot be right.
    """

    loss_is_scaled_for_ga = True
    control: Any
    data_collator: Any
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module | str,
        *positional: Any,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] | None = None,
        reward: Any = None,
        cost: Any = None,
        **others: Any,
    ) -> None:
        given = in_own_arguments(
            dict(
                args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
                peft_config=peft_config, callbacks=callbacks, optimizers=optimizers, reward=reward, cost=cost,
            ),
            positional,
            others,
        )  # fmt: skip
        config, eval_dataset = given.get("args") or SLIMEConfig(), given.get("eval_dataset")
        self.ref_model = given.get("ref_model")
        args = arguments(config, model, self.ref_model, given.get("quantization_config"))
        self.objective = find_objective(args.loss, args.loss_options)
        sampling = args.sampling
        self.loss_function = bind(args.loss, args.loss_options)
        processing_class = given.get("processing_class") or own_tokenizer(model, args.model_init_kwargs)
        rows = given.get("train_dataset")
        if rows is not None and not hasattr(rows, "__len__"):
            if args.train_sampling_strategy == "group_by_length":
                raise InputError(
                    "a stream's rows are taken in its order: leave train_sampling_strategy = 'group_by_length' out, or "
                    "load the rows first"
                )
            rows = read_stream(rows, processing_class, args, self.objective)
            args.train_sampling_strategy = "sequential"
        else:
            refuse_lengths(rows, args)
        rewarders, chat = sampling_inputs(
            sampling, given.get("reward"), given.get("cost"), processing_class, args
        )
        if sampling and chat:
            rows = PromptDataset(prompts_from(rows or [], chat), sampling)
        else:
            rows = make_dataset(rows, processing_class, args, self.objective)
        loaded = load_model(model, **args.model_init_kwargs) if isinstance(model, str) else model
        policy = prepared(
            loaded,
            processing_class,
            given.get("peft_config"),
            adapter=args.adapter,
            disable_dropout=args.disable_dropout,
            engine=args.parallel,
        )
        self.balance = balance_coefficient(causal_lm(policy), args.router_aux_loss_coef)
        # For the card of a model that is pushed to the Hub.
        causal_lm(policy).add_model_tags(["slimepo", option_key(args.loss)])
        shown = [] if args.disable_tqdm else [TrainingProgress()]
        own = [Sharding(), EpochOfSampler(), FiniteWeights(), LogBeforeSave(), *shown]
        if sampling:
            own.insert(3, WholeRollouts(sampling.steps))
        others_callbacks = given.get("callbacks") or []
        settings = monitor_settings(args.monitor)
        if settings is not None and not any(isinstance(c, DisplacementMonitor) for c in others_callbacks):
            own.append(DisplacementMonitor(settings, args.output_dir or "."))
        take_settings_anew(args.parallel)
        super().__init__(
            model=policy,
            args=args,
            data_collator=StepCollator(
                args.micro_batch_size or 1,
                args.positions,
                getattr(processing_class, "pad_token_id", None) or 0,
                max_tokens=args.max_tokens_per_batch,
            ),
            train_dataset=rows,
            # As it is given; its rows are made below, when the reference is known.
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*own, *others_callbacks],
            optimizers=given.get("optimizers", (None, None)),
        )
        load_whole(args.parallel)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if rows is not None:
            refuse_no_step(rows, self._sampler())
            refuse_rows(self.model, rows.tokens())
        if self.args.parallel in ("fsdp2", "zero2", "zero3"):
            # Until training begins the model is whole, and scored where it will train.
            self.model.to(self.args.device)
        self.layout, self.layout_reason = choose_layout(
            self.model, args.layout, args.positions, args.attention, compute_dtype(args),
            longest=args.max_length, verify=args.verify_model,
        )  # fmt: skip
        self.activations = args.activations
        self.data_collator = replace(self.data_collator, layout=self.layout)
        for note in model_notes(self.model, self.balance):
            logger.warning(note)
        self.reference = reference_for(
            self.args, self.ref_model, self.model, self.layout, self.processing_class
        )
        if self.reference and self.reference.cached and self.train_dataset:
            read = rows_read(self._sampler(), self.args.max_steps, self.args.num_train_epochs)
            self._add_reference(self.train_dataset, read, self.accelerator.autocast)
        moves = self.args.sync_reference
        self.moving = MovingReference(self.reference.model, **moves) if self.reference and moves else None
        if self.moving:
            self.add_callback(self.moving)
        self.rollouts = (
            rollout_source(
                sampling, rewarders, chat, self.args, self.model, self.train_dataset,
                objective=self.objective, sampler=self._sampler(), collator=self.data_collator,
                reference=self.reference, accelerator=self.accelerator, whole=self.whole_model,
                say=shown[0].say if shown else logger.warning,
            )
            if sampling and chat
            else None
        )  # fmt: skip
        self.eval_dataset = self._dataset(eval_dataset)
        # A rank without rows in a short last step still takes part in it, with weight 0.
        spare = (
            self.rollouts.spare() if self.rollouts else self.train_dataset[0] if self.train_dataset else None
        )
        self._spare: Step = self.data_collator([spare] if spare else [])
        self._window: MetricSums | None = None
        self._looked = 0.0
        # What `slimepo.training.certificate` found when training began.
        self.certificate: dict[str, Any] | None = None
        self._only_certify = False
        # Whether memory has run out, so that steps are cut smaller than they are loaded; the rows of the last one.
        self._smaller = False
        self._row_ids: list[str] = []
        self.monitor = self._callback(DisplacementMonitor)
        if self.monitor is not None:
            self._begin_watching(self.monitor)
        # What a whole model is made of again where training has cut it into parts.
        self.bare: nn.Module | None = None
        # What a checkpoint says of the run that it is of, and the one that has been found sound.
        self.identity = run_identity(
            self.args,
            self.objective,
            self.train_dataset,
            self.model,
            [function for each in rewarders for function, _ in each.functions.values()],
        )
        self._sound: Path | None = None
        self._config, self._as_given, self._as_read = config, settings_of(config), read_once(self.args)

    def _begin_watching(self, monitor: DisplacementMonitor) -> None:
        held_out = self.eval_dataset or []
        parts = held_out.values() if isinstance(held_out, Mapping) else [held_out]
        if self.rollouts and not any(parts) and not monitor.heldout:
            if monitor.settings != monitor_settings(True):
                raise InputError(
                    "monitor: it watches held-out pairs where answers are sampled: give eval_dataset, in a recipe "
                    "data.heldout, or leave its settings out"
                )
            # Samples are other ones at every step: there is nothing whose likelihood could fall.
            say = self._progress.say if self._progress else logger.warning
            say("no monitor: answers are sampled, and there are no held-out pairs to watch")
            self.remove_callback(monitor)
            self.monitor = None
            return
        # As many as train at once fit without gradients at the least.
        rows = max(int(self.args.eval_batch_size), self.args.micro_batch_size or 1)
        monitor.watch(
            Watched(
                self.args.loss,
                self.args.loss_options,
                [] if self.rollouts else self.train_dataset or [],
                [row for part in parts for row in part],
                replace(self.data_collator, micro_batch_size=rows),
                self.whole_model,
                self._change_loss,
            )
        )
        monitor.record.say = monitor.record.say or (self._progress.warn if self._progress else None)

    def _change_loss(self, loss: str, options: Mapping[str, Any]) -> None:
        self.loss_function = bind(loss, options)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        accept: Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        """transformers' `train`, once it is sure that the settings are still those that the trainer was made with.

        resume_from_checkpoint: a checkpoint's folder, or True for the newest sound one of `output_dir`.
        accept: differences from the run of that checkpoint that may be, by name.

        Raises:
            BadFilesError: the checkpoint, or with True every one, is damaged.
            InputError: it is of another run; there is none.
        """
        refuse_changes(self._config, self._as_given)
        refuse_changes(self.args, self._as_read)
        checkpoint = None
        if resume_from_checkpoint is True:
            checkpoint = self.sound_checkpoint(accept)
            if checkpoint is None:
                raise InputError(f"there is no checkpoint in {self.args.output_dir} to go on from")
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            if checkpoint != self._sound:
                on_main(functools.partial(refuse_other, checkpoint, self.identity, accept), self.accelerator)
        if self.args.parallel != "ddp" and self.bare is None:
            self.bare = skeleton(self.model)
        if self.is_fsdp_enabled:
            settle_fsdp(self.accelerator)
        try:
            return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        finally:
            load_whole(self.args.parallel)
            if self.rollouts:
                self.rollouts.close()

    def sound_checkpoint(self, accept: Collection[str] = ()) -> Path | None:
        """`newest_of_run` in `output_dir`; every rank must call this. Raises BadFilesError, InputError."""
        find = functools.partial(newest_of_run, Path(self.args.output_dir), self.identity, accept, self._say)
        self._sound = on_main(find, self.accelerator)
        return self._sound

    def certify(self) -> dict[str, Any]:
        """Compare loss and gradients of the run's first rows with the plain computation's, and train nothing.

        Raises:
            CertificateError: they are not the same.
        """
        self._only_certify = True
        with suppress(Certified):
            self.train()
        self._only_certify = self.is_in_train = False
        assert self.certificate is not None
        return self.certificate

    def _certify(self, model: nn.Module, rows: Sequence[Row]) -> None:
        self.certificate = certify(
            model, self.model, rows, self._spare, self.data_collator, self.objective, self.loss_function,
            self.reference, self.accelerator, bare=self.bare, fresh=self.state.global_step == 0,
        )  # fmt: skip
        if self.rollouts and self.certificate.get("rows") == 0 and not self._only_certify:
            # No sample has taught anything yet: a later step is looked at.
            self.certificate = None
            return
        if not self.certificate.get("agrees", True):
            raise CertificateError(in_words(self.certificate))
        (self._progress.say if self._progress else logger.info)(in_words(self.certificate))
        if self._only_certify:
            raise Certified

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps of the epoch, of which this rank takes its share; a step is a list of micro-batches."""
        if self.train_dataset is None:
            raise InputError("there is nothing to train on: give train_dataset")
        sampler = self._sampler()
        if follows := self._callback(EpochOfSampler):
            follows.sampler = sampler
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=_prompts_alone if self.rollouts else self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Newer than transformers 5.0.
            multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
        )

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository that the model is pushed to. Raises InputError."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except (OSError, ValueError) as error:
            raise InputError(f"push_to_hub: {first_line(error)}") from error

    def training_step(
        self, model: nn.Module, inputs: Step, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one optimizer step; returns its loss, of which every rank has its part.

        Gradients and the returned loss are multiplied by the number of ranks, because both are averaged over them.
        """
        if self.rollouts:
            # Only now: the loader makes items ahead, when the model is not yet what samples this step's rows.
            made = self.rollouts.rows(self.state.global_step, self.state.max_steps)
        if self.is_in_train and self.certificate is None and (self.args.certificate or self._only_certify):
            first = made if self.rollouts else [self.train_dataset[i] for i in next(iter(self._sampler()))]
            self._certify(model, first)
        if self._window is None:
            self._window, self._looked = MetricSums(), self._looking()
        started = time.perf_counter()
        if self.rollouts:
            inputs.update(self.data_collator(made))
            self.rollouts.learn_values(made)
        elif self._smaller:
            # The loader cuts steps as they were cut before memory ran out.
            inputs = self.data_collator(inputs["rows"])
        if self.args.clip_inverse_lr and self.is_deepspeed_enabled:
            # DeepSpeed clips while it goes backward, by a level of its optimizer's own.
            self.model_wrapped.optimizer.clip_grad = self._clip_level()
        model.train()
        while (done := self._try_step(model, inputs)) is None:
            inputs = self.data_collator(inputs["rows"])
        if not torch.isfinite(self.accelerator.reduce(done.loss, "sum")):
            rows = [row for of_rank in of_all_ranks(non_finite_rows(done)) for row in of_rank]
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.state.global_step + 1}; rows: {_some(rows) or 'all together'}. "
                "Look at these rows, or lower the learning rate"
            )
        self._row_ids = [row.id for row in inputs["rows"]]
        for at, (batch, output) in enumerate(zip(done.batches, done.outputs, strict=True)):
            self._window.add(batch, output, self.objective, times=int(at < done.counted))
            if done.balances:
                self._window.add_value(
                    "balance_loss", done.balances[at], batch["real_tokens"] * (at < done.counted)
                )
        if self.rollouts:
            # The device is done with it: the loss has been looked at.
            self.rollouts.facts.append({"time/train": time.perf_counter() - started})
        return done.loss

    def _try_step(self, model: nn.Module, inputs: Step) -> Done | None:
        """The step, or None where memory did not suffice on a rank: micro-batches are half as large from then on.

        Raises:
            OutOfMemory: they hold one row each already.
        """
        try:
            return train_step(
                model,
                inputs,
                self._spare,
                self.objective,
                self.loss_function,
                self.reference,
                self.accelerator,
                self.balance,
            )
        except OutOfMemory as error:
            words = first_line(error)
        # Plain numbers: the tensors of the failed pass are to go.
        largest = max(of_all_ranks(max((batch["rows"] for batch in inputs["batches"]), default=1)))
        step = self.state.global_step + 1
        if largest == 1:
            raise torch.OutOfMemoryError(
                f"step {step}, a row at a time: {words}; lower max_length, or give activation_checkpointing, an "
                "adapter, or parallel: fsdp2 on more devices"
            )
        collator = self.data_collator
        collator = replace(collator, micro_batch_size=min(collator.micro_batch_size, largest)).halved()
        self.data_collator, self._smaller = collator, True
        clear_device_cache(garbage_collection=True)
        if isinstance(model, DistributedDataParallel):
            meet_again(model, self._spare["batches"][0], self.accelerator)
        model.zero_grad(set_to_none=True)
        size = f"{collator.max_tokens} tokens" if collator.max_tokens else f"{collator.micro_batch_size} rows"
        self._say(
            f"out of memory at step {step} ({words}): it is taken again in micro-batches of {size} on each rank"
        )
        return None

    def compute_loss(self, model: nn.Module, inputs: Step, *_: Any, **__: Any) -> Tensor:
        """The loss of this rank's rows of a step taken alone: their weighted mean."""
        counts = step_counts(inputs["batches"], self.objective)
        step = to_device(inputs, self.args.device)
        references, divergence = beside_the_policy(
            model, step, self.objective, self.reference, self.accelerator
        )
        losses = []
        for batch, known in zip(step["batches"], references, strict=True):
            logps = policy_tokens(model, batch, self.objective)
            output = output_of(self.objective, self.loss_function, logps, batch, known, divergence)
            losses.append(step_loss(output, counts, row_weight(self.objective, batch)))
        return torch.stack(losses).sum()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics over a dataset, in eval mode, means over its pairs; logged with the prefix.

        Args:
            eval_dataset: rows, a dict of them, or the name of one in the dict that the trainer was given.
        """
        refuse_changes(self.args, self._as_read)
        own = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {}
        sets = own if eval_dataset is None else eval_dataset
        if isinstance(sets, Mapping) and sets:
            parts = [
                self.evaluate(name if sets is own else part, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, part in sets.items()
            ]
            return {key: value for part in parts for key, value in part.items()}
        if isinstance(eval_dataset, str) and eval_dataset not in own:
            known = ", ".join(own) or "none by name"
            raise InputError(f"there is no eval_dataset {eval_dataset!r}; there are: {known}")
        if eval_dataset is None:
            rows = self.eval_dataset
        else:
            rows = own[eval_dataset] if isinstance(eval_dataset, str) else self._dataset(eval_dataset)
        if rows is None:
            raise InputError("there is nothing to evaluate on: give eval_dataset")
        started = time.time()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.score(rows).items()}
        batches = math.ceil(len(rows) / (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(rows), num_steps=batches)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not of use here: a preference model predicts nothing but log-probs, which `slimepo.score_pairs` gives."""
        raise InputError("PreferenceTrainer has no predict: slimepo.score_pairs gives the log-probs of pairs")

    def score(self, rows: Any) -> dict[str, float]:
        """Mean loss and metrics of the current model on rows, over all ranks; no batch is over the token budget.

        In the precision of `slimepo.model.modes.scoring`, so that figures compare before and after.
        """
        known = rows if isinstance(rows, RowDataset) else self._dataset(rows)
        model = self.whole_model()
        return score_dataset(
            model,
            known,
            replace(self.data_collator, micro_batch_size=self.args.eval_batch_size),
            self.objective,
            self.loss_function,
            self.reference and self.reference.seen_by(model),
            self.accelerator,
        )

    def whole_model(self) -> nn.Module:
        """The model with all of its weights on this device, to be looked at; every rank must call this."""
        return whole_model(self.model, self.bare)

    def model_alone(self) -> nn.Module:
        """The model when training is over, on the first rank whole, and nothing else; every rank must call this.

        Optimizer and reference are let go, and a model in parts is put together in CPU memory. On other ranks it is
        what they have, and of no use.
        """
        self.reference = None
        keeps_weights = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if not keeps_weights:
            self._let_go()
        whole = gathered(self.model, self.bare, keep=self.accelerator.is_main_process)
        if keeps_weights:
            # What DeepSpeed trains is in its optimizer.
            self._let_go()
        return whole

    def _let_go(self) -> None:
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics since the last time to what the Trainer logs."""
        if "loss" in logs and self._window is not None:
            window, self._window = self._window.reduced(self.accelerator), None
            measured = self.monitor.figures_to_log() if self.monitor else {}
            measured |= self.rollouts.figures() if self.rollouts else {}
            logs = {**window.means(), **window.speed(self._looking() - self._looked), **measured, **logs}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers writes it; a checkpoint once every rank has written its part, and the manifest is there."""
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        on_main(lambda: store.begin(checkpoint), self.accelerator)
        # Older ones are removed when this one is whole, and only those that are a run's own.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        best = [Path(self.state.best_model_checkpoint)] if self.state.best_model_checkpoint else []

        def finish() -> None:
            store.complete(checkpoint, self.identity)
            store.keep_newest(folder, limit, also=best)

        on_main(finish, self.accelerator)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if fault := on_main(functools.partial(store.fault_of, best), self.accelerator):
            raise BadFilesError(
                f"{best}, the best one by {self.args.metric_for_best_model}, is not sound: {fault}"
            )
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse weights of a checkpoint that are not all of the model's; transformers would warn and go on."""
        saved = set(self.model._keys_to_ignore_on_save or ()) | set(
            getattr(self.model, "all_tied_weights_keys", {})
        )
        refuse_other_tensors(
            f"the checkpoint in {self.args.output_dir}", "the model that trains",
            sorted(set(load_result.missing_keys) - saved), sorted(load_result.unexpected_keys),
        )  # fmt: skip
        self.model.tie_weights()

    def _looking(self) -> float:
        """Seconds that callbacks which look at the model between steps say they took: the monitor, held-out tasks."""
        return sum(getattr(callback, "seconds", 0.0) for callback in self.callback_handler.callbacks)

    def _say(self, words: str) -> None:
        (self._progress.warn if self._progress else logger.warning)(words)

    @property
    def _progress(self) -> TrainingProgress | None:
        return self._callback(TrainingProgress)

    def _callback(self, kind: type[_Callback]) -> _Callback | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, kind)), None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What the Trainer saves, checkpoints too, with the template's options and how its base was loaded."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            # Every rank comes here, and two would write one file at once.
            return
        options = {"template_options": self.args.template_options, **quantization_note(self.model)}
        folder = Path(output_dir or self.args.output_dir)
        write_json(folder / "slimepo.json", options)
        trained = getattr(self.accelerator.unwrap_model(self.model), "active_adapters", ["default"])
        if trained != ["default"] and (folder / "adapter_config.json").exists():
            # peft puts each adapter but the default into a folder of its own.
            logger.warning(
                "%s is the adapter 'default'; the one that was trained is %s", folder, folder / trained[0]
            )

    def floating_point_ops(self, inputs: Step) -> int:
        """6 * parameters * tokens, over the micro-batches of a step."""
        return sum(int(super(PreferenceTrainer, self).floating_point_ops(dict(b))) for b in inputs["batches"])

    def _clip_level(self) -> float:
        """The norm that this step's gradient is clipped to: with `clip_inverse_lr` it rises as the rate falls."""
        level: float = self.args.max_grad_norm
        if not self.args.clip_inverse_lr:
            return level
        rate = self._get_learning_rate()
        return level * self.args.learning_rate / rate if rate else math.inf

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: PreferenceConfig, model: Any = None) -> tuple[Any, Any]:
        """The optimizer of a config: transformers' own, or `clipped_sstm`."""
        return clipped_sstm.optimizer_class(args, model)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        given, self.args.max_grad_norm = self.args.max_grad_norm, self._clip_level()
        try:
            return super()._clip_grad_norm(model)
        finally:
            self.args.max_grad_norm = given

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, which the Trainer asks for before every optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1:
            # fp16: a scale that was too large; the scaler skips this step and takes a smaller one.
            return norm
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            rows = [row for of_rank in of_all_ranks(self._row_ids) for row in of_rank]
            raise NonFiniteLossError(
                f"the gradient is not finite at step {self.state.global_step + 1}, although the loss is; rows: "
                f"{_some(rows)}. The weights are as they were. Look at these rows, or lower the learning rate"
            )
        return norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Before the checkpoint's last file: a value model is a part of it, and a reference that moves.
        super()._save_optimizer_and_scheduler(output_dir)
        if self.rollouts and self.rollouts.critic and self.accelerator.is_main_process:
            self.rollouts.critic.save(Path(output_dir))
        if self.moving and self.accelerator.is_main_process:
            self.moving.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.rollouts and self.rollouts.critic and checkpoint is not None:
            self.rollouts.critic.load(Path(checkpoint))
        if self.moving and checkpoint is not None:
            self.moving.load(Path(checkpoint))

    def _track_num_input_tokens(self, inputs: Step) -> None:
        """Count the tokens of a step, over all ranks, as `include_num_input_tokens_seen` asks."""
        how = self.args.include_num_input_tokens_seen
        if how == "no":
            return
        padded = how == "all"
        here = sum(b["input_ids"].numel() if padded else b["real_tokens"] for b in inputs["batches"])
        tokens = torch.tensor(float(here), device=self.accelerator.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))

    def _sampler(self) -> StepSampler:
        return step_sampler(self.train_dataset.lengths, self.args, self.accelerator)

    def _dataset(self, given: Any) -> Any:
        """The dataset of given rows, or a dict of them, with what a cached reference says of them."""
        if isinstance(given, Mapping):
            return {name: self._dataset(part) for name, part in given.items()}
        rows = make_dataset(given, self.processing_class, self.args, self.objective)
        if rows is not None:
            refuse_rows(self.model, rows.tokens())
        # Once training has begun, the model that they would have to be scored with has changed.
        begun = self.state.global_step > 0 or self.is_in_train
        if rows is not None and self.reference is not None and self.reference.cached and not begun:
            self._add_reference(rows, range(len(rows)), functools.partial(scoring, self.model))
        return rows

    def _add_reference(
        self, rows: RowDataset, index: Sequence[int], precision: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        assert self.reference is not None
        add_reference(
            rows, index, self.reference, self.model, self.data_collator, precision, self.accelerator,
            self._progress,
        )  # fmt: skip


class SLIMETrainer(PreferenceTrainer):
    """`PreferenceTrainer` under the name of the objective.

    It is called as TRL's `DPOTrainer` is; SLIME reads no reference model, so that `ref_model` can only be None.
    """


def _prompts_alone(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A step whose batches are made when it is taken."""
    return {"batches": [], "mismatched": [], "prompts": list(prompts)}


def _some(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(rows[:_NAMED]) + more
