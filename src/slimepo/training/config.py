"""Arguments of the trainer: transformers' own, with the paper's values and what preference training adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from slimepo.data.batch import LAYOUTS
from slimepo.errors import InputError
from slimepo.losses import bind, find_objective, hyperparameters, slime
from slimepo.model.attention.table import ATTENTIONS
from slimepo.model.modes import computes_in_bf16
from slimepo.monitor.settings import monitor_settings

CHECKPOINTING = ("none", "layers", "offload")

_SLIME = hyperparameters(slime)


@dataclass
class PreferenceConfig(TrainingArguments):
    """`transformers.TrainingArguments` for any objective of `slimepo.losses.LOSSES`.

    The optimisation defaults are the paper's for the preference stage: AdamW at 5e-7, linear to zero, no
    warm-up, no clipping, one epoch, seed 0. `per_device_train_batch_size` counts pairs.

    Raises:
        InputError: the objective or one of its hyperparameters is wrong; raised before a model is loaded.
    """

    output_dir: str | None = "slimepo_output"
    learning_rate: float = 5e-7
    num_train_epochs: float = 1.0
    max_grad_norm: float = 0.0
    seed: int = 0
    logging_steps: float = 10
    # None: bf16 where the device computes in it, else float32.
    bf16: bool | None = None
    # The trainer stops on a non-finite loss; transformers' filter would hide it as 0.
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool | None = False

    loss: str = "slime"
    loss_options: dict[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    max_prompt_length: int | None = None
    cut_long_responses: bool = False
    template_options: dict[str, Any] = field(default_factory=dict)
    model_init_kwargs: dict[str, Any] = field(default_factory=dict)
    # What becomes of an adapter that the model comes with: continue (it trains on; so without a word, unless there is
    # a peft_config) or merge (it is folded into the weights, for a new one or to train all of them).
    adapter: str | None = None
    disable_dropout: bool = True
    verify_model: bool = True
    # Where reference log-probs come from: auto, adapters-off, copy, cache, or another model's folder or Hub id.
    reference: str = "auto"
    layout: str = "auto"
    # Of packed rows; auto: by length on a CPU, the fastest of those measured on CUDA.
    attention: str = "auto"
    max_tokens_per_batch: int | None = None
    # none; layers: each layer's activations are computed again in the backward pass; offload: and the layers' inputs
    # wait in CPU memory (CUDA). True and False, and TRL's gradient_checkpointing, are taken for layers and none.
    activation_checkpointing: bool | str | None = None
    # TRL's name for what `offload` turns on.
    activation_offloading: bool = False
    # The displacement monitor: true, false, or keys of slimepo.monitor.settings.MonitorSettings.
    monitor: bool | dict[str, Any] = True
    # Pairs of a step on each device; None: per_device_train_batch_size * gradient_accumulation_steps. The last
    # micro-batch of a step may be short.
    pairs_per_step: int | None = None
    # Set by the trainer, which takes a whole step at a time: pairs of one forward pass on each device.
    micro_batch_size: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        bind(self.loss, self.loss_options)
        if self.reference != "auto" and "reference" not in find_objective(self.loss).asks:
            raise InputError(
                f"loss {self.loss!r} reads no reference model: leave reference = {self.reference!r} out"
            )
        monitor_settings(self.monitor)
        if self.layout not in LAYOUTS:
            raise InputError(f"layout = {self.layout!r} is unknown: give one of {', '.join(LAYOUTS)}")
        if self.attention not in ATTENTIONS:
            raise InputError(
                f"attention = {self.attention!r} is unknown: give one of {', '.join(ATTENTIONS)}"
            )
        if self.layout == "padded" and self.attention != "auto":
            raise InputError(
                f"attention = {self.attention!r} is for packed rows: leave it out with layout: padded"
            )
        if self.auto_find_batch_size:
            raise InputError(
                "auto_find_batch_size would change the pairs of a step: give a smaller per_device_train_batch_size "
                "and more gradient_accumulation_steps, or max_tokens_per_batch"
            )
        self._resolve_checkpointing()
        if not torch.accelerator.is_available():
            # Said outright, or ranks on a CPU would each train alone.
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.bf16 is None:
            self.bf16 = not (self.use_cpu or self.fp16) and computes_in_bf16()
        super().__post_init__()
        if self.activation_offloading and self.device.type == "cuda":
            # transformers' own, which needs a device to move from.
            given = getattr(self, "activation_checkpointing_kwargs", None) or {}
            self.activation_checkpointing_kwargs = {**given, "offload": True}

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

    def _resolve_checkpointing(self) -> None:
        """One word, or transformers' and TRL's flags, to transformers' flag and `activation_offloading`."""
        word, older = self.activation_checkpointing, getattr(self, "gradient_checkpointing", None)
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
    length_normalized: bool = _SLIME["length_normalized"]
    rejected_mean: str = _SLIME["rejected_mean"]
    hard_gate: str = _SLIME["hard_gate"]
    soft_gate: str = _SLIME["soft_gate"]

    def __post_init__(self) -> None:
        options = {name: getattr(self, name) for name in _SLIME}
        if self.loss != "slime" or self.loss_options not in ({}, options):
            raise InputError(
                "SLIMEConfig takes SLIME's hyperparameters by name (hard_margin=2.0); for another objective, or "
                "loss_options, use PreferenceConfig"
            )
        self.loss_options = options
        super().__post_init__()
