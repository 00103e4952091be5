"""Arguments of the trainer: transformers' own, with the paper's values and what preference training adds."""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from transformers import PreTrainedModel, TrainingArguments

from slimepo.data.batch import LAYOUTS
from slimepo.errors import InputError
from slimepo.files import parse_json
from slimepo.losses import bind, find_objective, hyperparameters, slime
from slimepo.losses.common import check_number
from slimepo.losses.composed import sum_name
from slimepo.losses.table import with_anchor_times
from slimepo.model.attention.table import ATTENTIONS
from slimepo.model.modes import computes_in_bf16
from slimepo.monitor.settings import monitor_settings
from slimepo.onpolicy.settings import BY_RESPONSE, Rollouts, rollout_settings
from slimepo.parallel.engines import asked_engine, engine_arguments, settle_engine
from slimepo.parallel.unsupported import refuse_unsupported
from slimepo.settings import Settings, validate
from slimepo.training.libraries import check_libraries, refuse_idle
from slimepo.training.optimizers import clipped_sstm
from slimepo.training.steps import STRATEGIES
from slimepo.training.trl_names import TrlFields, in_own_names
from slimepo.types import ENGINES

if TYPE_CHECKING:
    Options = dict[str, Any]
    Switch = bool | dict[str, Any]
    Length = int
    Word = bool | str | None
    Loss = Any
else:
    # As transformers' argument parser has to see them, to hand on the text of a command line as it is.
    Options = Switch = dict[str, Any] | str | None
    Word = str | None
    Loss = str
    Length = int | None

CHECKPOINTING = ("none", "layers", "offload")

_SLIME = hyperparameters(slime)


@dataclass
class PreferenceConfig(TrlFields, TrainingArguments):
    """`transformers.TrainingArguments` for any objective of `slimepo.losses.LOSSES`.

    The optimisation defaults are the paper's for the preference stage: AdamW at 5e-7, linear to zero, no
    warm-up, no clipping, one epoch, seed 0. `per_device_train_batch_size` counts pairs. Names of TRL's configs are
    taken for what they stand for here, or refused (docs/trl.md); a setting changed later counts for the trainers that
    are made afterwards.

    Raises:
        InputError: the objective or one of its hyperparameters is wrong; raised before a model is loaded.
    """

    output_dir: str | None = "slimepo_output"
    learning_rate: float = 5e-7
    num_train_epochs: float = 1.0
    # 0: no clipping. "inverse-lr": 1.0 at the learning rate and more as that falls, level x learning_rate / rate of the
    # step; "inverse-lr:0.5": 0.5 there, in two settings max_grad_norm=0.5 and clip_inverse_lr.
    max_grad_norm: float | str = 0.0
    clip_inverse_lr: bool = False
    seed: int = 0
    logging_steps: float = 10
    # None: bf16 where the device computes in it, else float32.
    bf16: bool | None = None
    # The trainer stops on a non-finite loss; transformers' filter would hide it as 0.
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool | None = False

    # A name, or the shares of a sum by name: {"dpo": 0.8, "sft": 1.0}, in one word 0.8*dpo+1*sft.
    loss: Loss = "slime"
    loss_options: Options = field(default_factory=dict)
    # Tokens of prompt and response together; None: any number.
    max_length: Length = 2048
    max_prompt_length: int | None = None
    cut_long_responses: bool = False
    template_options: Options = field(default_factory=dict)
    # `torch_dtype` is taken for `dtype`, as transformers does.
    model_init_kwargs: Options = field(default_factory=dict)
    # What becomes of an adapter that the model comes with: continue (it trains on; so without a word, unless there is
    # a peft_config) or merge (it is folded into the weights, for a new one or to train all of them).
    adapter: str | None = None
    disable_dropout: bool = True
    # What the balance loss of a mixture of experts is multiplied by; None: as the model's config has it, where that
    # asks for it (output_router_logits).
    router_aux_loss_coef: float | None = None
    verify_model: bool = True
    # Loss and gradients of the first rows are compared with the plain computation's before anything is learnt.
    certificate: bool = True
    # Where reference log-probs come from: auto, adapters-off, copy, cache, or another model's folder or Hub id.
    reference: str = "auto"
    # TR-DPO: every so many steps the reference moves that share of the way to the policy: {every: 512, share: 0.6}.
    sync_reference: Options | None = None
    layout: str = "auto"
    # Of packed rows; auto: by length on a CPU, the fastest of those measured on CUDA.
    attention: str = "auto"
    max_tokens_per_batch: int | None = None
    # none; layers: each layer's activations are computed again in the backward pass; offload: and the layers' inputs
    # wait in CPU memory (CUDA). True and False, and TRL's gradient_checkpointing, are taken for layers and none.
    activation_checkpointing: Word = None
    # TRL's name for what `offload` turns on.
    activation_offloading: bool = False
    # How several devices share the work: one of slimepo.types.ENGINES. None: ddp, or as the launcher says.
    parallel: str | None = None
    # On-policy training: keys of slimepo.onpolicy.settings.Rollouts. The rows of train_dataset are prompts then.
    rollouts: Options | None = None
    # The displacement monitor: True, False, or keys of slimepo.monitor.settings.MonitorSettings.
    monitor: Switch = True
    # Pairs of a step on each device; None: per_device_train_batch_size * gradient_accumulation_steps. The last
    # micro-batch of a step may be short.
    pairs_per_step: int | None = None
    # Set by the trainer, which takes a whole step at a time: pairs of one forward pass on each device.
    micro_batch_size: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.loss = sum_name(self.loss)
        for name in ("loss_options", "template_options", "model_init_kwargs", "monitor"):
            setattr(self, name, _from_text(name, getattr(self, name)))
        # Of these an empty one asks for what it is about, with its defaults.
        for name in ("sync_reference", "rollouts"):
            if getattr(self, name) is not None:
                setattr(self, name, _from_text(name, getattr(self, name)))
        self.max_grad_norm, self.clip_inverse_lr = _clipping(self.max_grad_norm, self.clip_inverse_lr)
        # What transformers makes of a config without one holds only what is off.
        of_fsdp: Any = self.fsdp_config
        if isinstance(of_fsdp, dict):
            of_fsdp = any(of_fsdp.values())
        if self.deepspeed or self.fsdp or of_fsdp:
            raise InputError(
                f"fsdp, fsdp_config and deepspeed are set by parallel: give one of {', '.join(ENGINES)} instead"
            )
        self.parallel = asked_engine(self.parallel)
        for name, value in engine_arguments(self.parallel).items():
            setattr(self, name, value)
        self._resolve_checkpointing()
        if not torch.accelerator.is_available():
            # Said outright, or ranks on a CPU would each train alone.
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.bf16 is None:
            self.bf16 = not (self.use_cpu or self.fp16) and computes_in_bf16()
        # transformers knows the names of its own optimizers alone.
        optimizer: Any = getattr(self, "optim", None)
        if optimizer == clipped_sstm.NAME:
            self.optim = "sgd"
        super().__post_init__()
        if optimizer == clipped_sstm.NAME:
            self.optim = optimizer
        settle_engine(self.parallel)
        if self.activation_offloading and self.device.type == "cuda":
            # transformers' own, which needs a device to move from.
            given = getattr(self, "activation_checkpointing_kwargs", None) or {}
            self.activation_checkpointing_kwargs = {**given, "offload": True}
        settled(self)

    def named_options(self) -> Mapping[str, Any]:
        """Hyperparameters of the objective that are fields of their own."""
        return {}

    @property
    def activations(self) -> str:
        """What becomes of a layer's activations, in a few words."""
        if not self.activation_checkpointing:
            return "kept"
        if not self.activation_offloading:
            return "computed again in the backward pass"
        if self.device.type == "cuda":
            return "computed again, the layers' inputs in CPU memory until then"
        return "computed again in the backward pass (there is no CUDA device to offload from)"

    @property
    def positions(self) -> tuple[int, ...]:
        """The responses of a row that are read: those of the objective, or every sample of a rollout."""
        sampled = self.sampling
        own = find_objective(self.loss, self.loss_options).positions
        return own or tuple(range(sampled.samples if sampled else 1))

    @property
    def sampling(self) -> Rollouts | None:
        """The checked settings of `rollouts`; None where nothing is sampled."""
        return rollout_settings(self.rollouts, self.loss, find_objective(self.loss, self.loss_options))

    @property
    def reads_reference(self) -> bool:
        """Whether the objective reads a reference model, or what makes the rows of rollouts does."""
        sampled, asks = self.sampling, find_objective(self.loss, self.loss_options).asks
        return "reference" in asks or bool(sampled and sampled.reads_reference)

    def _resolve_checkpointing(self) -> None:
        """One word, or transformers' and TRL's flags, to transformers' flag and `activation_offloading`."""
        word, older = self.activation_checkpointing, getattr(self, "gradient_checkpointing", None)
        word = {"true": True, "false": False}.get(str(word).lower(), word)
        if word is None:
            word = self.activation_offloading or bool(older)
        if isinstance(word, bool):
            word = "layers" if word else "none"
        if word not in CHECKPOINTING:
            raise InputError(
                f"activation_checkpointing = {word!r} is unknown: give one of {', '.join(CHECKPOINTING)}"
            )
        if word == "none" and self.activation_offloading:
            raise InputError(
                "activation_offloading moves checkpointed activations: give activation_checkpointing too"
            )
        if word == "none" and older:
            raise InputError(
                f"gradient_checkpointing asks for what activation_checkpointing = {self.activation_checkpointing!r} "
                "refuses: leave one of them out"
            )
        self.activation_offloading |= word == "offload"
        if self.activation_offloading and not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
            raise InputError(
                "activation_checkpointing 'offload' needs transformers 5.23 or newer: give 'layers'"
            )
        # Both names, because transformers 5.23 warns about the old one and older ones know no other.
        self.activation_checkpointing = self.gradient_checkpointing = word != "none"
        if getattr(self, "activation_checkpointing_kwargs", None) is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


@dataclass
class SLIMEConfig(PreferenceConfig):
    """`PreferenceConfig` for the SLIME objective, its hyperparameters spelt out.

    Their defaults are those of `slimepo.losses.slime`, whose docstring says what each of them does.
    """

    chosen_weight: float = _SLIME["chosen_weight"]
    rejected_weight: float = _SLIME["rejected_weight"]
    distance_weight: float = _SLIME["distance_weight"]
    threshold: float = _SLIME["threshold"]
    hard_margin: float = _SLIME["hard_margin"]
    soft_margin: float = _SLIME["soft_margin"]
    sharpness: float = _SLIME["sharpness"]
    exponent: float = _SLIME["exponent"]
    max_slope: float | None = _SLIME["max_slope"]
    length_normalized: bool = _SLIME["length_normalized"]
    rejected_mean: str = _SLIME["rejected_mean"]
    hard_gate: str = _SLIME["hard_gate"]
    soft_gate: str = _SLIME["soft_gate"]

    def named_options(self) -> Mapping[str, Any]:
        options = {name: getattr(self, name) for name in _SLIME}
        if self.loss != "slime" or self.loss_options not in ({}, options):
            raise InputError(
                "SLIMEConfig takes SLIME's hyperparameters by name (hard_margin=2.0); for another objective, or "
                "loss_options, use PreferenceConfig"
            )
        return options


def settled(args: PreferenceConfig) -> PreferenceConfig:
    """A checked copy in which every setting has our own name; what a trainer goes by.

    Raises:
        InputError: a setting that is wrong, or that nothing here would come of.
    """
    args = in_own_names(args)
    args.loss_options |= args.named_options()
    bind(args.loss, args.loss_options)
    objective = find_objective(args.loss, args.loss_options)
    sampled = args.sampling
    if args.reference != "auto" and not args.reads_reference:
        raise InputError(
            f"loss {args.loss!r} reads no reference model: leave reference = {args.reference!r} out"
        )
    if args.sync_reference is not None:
        args.sync_reference = validate(SyncReference, args.sync_reference, "sync_reference").model_dump()
        _refuse_unmoved(args)
    whole = args.loss in BY_RESPONSE or objective.preset.get("level") == "sequence"
    mode = sampled.vllm_importance_sampling_mode if sampled and sampled.corrected else ""
    if whole and mode.startswith("token"):
        raise InputError(
            f"loss {args.loss!r} weighs a response as a whole, and vllm_importance_sampling_mode = {mode!r} its "
            "tokens: use sequence_mask or sequence_truncate"
        )
    if sampled and args.reference == "cache":
        raise InputError("reference 'cache' knows rows before training, and rollouts make them: use 'copy'")
    watching = monitor_settings(args.monitor)
    if watching and watching.cure == "raise-anchor":
        with_anchor_times(args.loss, args.loss_options, 1)
    for name, known in (
        ("layout", LAYOUTS),
        ("attention", ATTENTIONS),
        ("train_sampling_strategy", STRATEGIES),
    ):
        if getattr(args, name) not in known:
            raise InputError(f"{name} = {getattr(args, name)!r} is unknown: give one of {', '.join(known)}")
    if args.layout == "padded" and args.attention != "auto":
        raise InputError(
            f"attention = {args.attention!r} is for packed rows: leave it out with layout: padded"
        )
    if args.auto_find_batch_size:
        raise InputError(
            "auto_find_batch_size would change the pairs of a step: give a smaller per_device_train_batch_size "
            "and more gradient_accumulation_steps, or max_tokens_per_batch"
        )
    if args.max_length is None:
        args.max_length = sys.maxsize
    older = args.model_init_kwargs.pop("torch_dtype", None)
    if args.model_init_kwargs.setdefault("dtype", older) != older and older is not None:
        raise InputError(
            "model_init_kwargs has both dtype and torch_dtype, its older name: leave one of them out"
        )
    if args.model_init_kwargs["dtype"] is None:
        del args.model_init_kwargs["dtype"]
    refuse_unsupported(args.parallelism_config, args.model_init_kwargs, os.environ)
    args._resolve_checkpointing()
    refuse_idle(args)
    check_libraries(args)
    return args


class SyncReference(Settings):
    """`sync_reference`: after how many steps the reference moves, and which share of the way to the policy."""

    every: int = Field(512, ge=1)
    share: float = Field(0.6, gt=0, le=1)


def _refuse_unmoved(args: PreferenceConfig) -> None:
    """InputError where there is no reference that could move."""
    if not args.reads_reference:
        raise InputError(f"loss {args.loss!r} reads no reference model: leave sync_reference out")
    if args.reference in ("cache", "adapters-off"):
        raise InputError(
            f"sync_reference moves a model of its own, and reference = {args.reference!r} has none: use 'copy'"
        )
    if args.parallel not in (None, "ddp"):
        raise InputError(
            f"sync_reference needs whole models: parallel = {args.parallel!r} cuts them, use ddp"
        )


def _clipping(given: float | str, inverse: bool) -> tuple[float, bool]:
    """`max_grad_norm` as a number, and whether it rises as the learning rate falls. Raises InputError."""
    level: Any = given
    if isinstance(given, str):
        word, _, number = given.partition(":")
        if asked := word == "inverse-lr":
            inverse, number = True, number or "1"
        try:
            level = float(number if asked else given)
        except ValueError:
            raise InputError(
                f"max_grad_norm = {given!r} is unknown: give a number, inverse-lr, or inverse-lr:0.5"
            ) from None
    check_number("max_grad_norm", level, at_least=0)
    if inverse and level == 0:
        raise InputError("max_grad_norm: inverse-lr needs a level above 0: give inverse-lr:1.0, say")
    return level, inverse


def in_their_types(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, flags and numbers as such where they are given as words: YAML's `no` is one.

    Raises:
        InputError: a value of another type, or a number that no setting can be.
    """
    kinds, typed = typing.get_type_hints(PreferenceConfig), dict(given)
    for name, value in given.items():
        if name == "activation_checkpointing":
            continue  # A word or a flag, which the config tells apart itself.
        try:
            read = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            raise InputError(f"args.{name} = {value!r}: {error.errors()[0]['msg']}") from error
        except PydanticUserError:
            continue  # A class of accelerate's, which no file can give.
        if isinstance(read, bool | int | float):
            typed[name] = read
            usual = PreferenceConfig.__dataclass_fields__[name].default
            if not (0 <= read <= 2**32 or read == usual):
                raise InputError(f"args.{name} = {value!r}: it must be a number from 0 to 4294967296")
    return typed


def _from_text(name: str, value: Any) -> Any:
    """A dictionary that a command line gives as JSON; nothing is an empty one."""
    if not isinstance(value, str):
        return {} if value is None else value
    if name == "monitor" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        read = parse_json(value)
    except ValueError as error:
        raise InputError(f"{name} = {value!r} is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise InputError(f'{name} = {value!r} must be an object in JSON, such as {{"key": 1}}')
    return read
