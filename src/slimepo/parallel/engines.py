"""How several devices share one training run: DDP, FSDP2, or DeepSpeed's ZeRO-2 and ZeRO-3.

DDP keeps a whole model on every device. FSDP2 and ZeRO-3 keep a part of the weights, gradients and optimizer states on
each, ZeRO-2 of the last two. accelerate and DeepSpeed do the work; here is what they are told, a look at whether they
do it, and the way back from parts to a whole model.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from slimepo.errors import InputError
from slimepo.model.modes import in_parts
from slimepo.types import ENGINES
from slimepo.words import nearest

# What a launcher says of an engine, where the recipe says nothing.
_BY_ENVIRONMENT = "accelerate's configuration"
# What this process was started with: later the libraries set these themselves.
_SWITCHES = {name: os.environ.get(name, "") for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
_YES = ("true", "1", "yes")


def asked_engine(wanted: str | None) -> str:
    """The engine that a run asks for, or else the one that `accelerate launch` was configured with; else DDP.

    Raises:
        InputError: no such engine, one that is not supported, or two that contradict each other.
    """
    if wanted is not None and wanted not in ENGINES:
        raise InputError(
            f"parallel = {wanted!r} is unknown{nearest(wanted, ENGINES)}: give one of {', '.join(ENGINES)}"
        )
    launched = _launched_engine(os.environ)
    for switch, kind in zip(_SWITCHES, ("fsdp", "zero"), strict=True):
        if launched is None and _SWITCHES[switch].lower() in _YES and not (wanted or "").startswith(kind):
            raise InputError(
                f"{switch} in the environment asks for an engine and does not say which: unset it, and give parallel, "
                f"one of {', '.join(ENGINES)}"
            )
    if wanted is not None and launched is not None and wanted != launched:
        raise InputError(
            f"parallel = {wanted!r}, but {_BY_ENVIRONMENT} asks for {launched}: leave one of them out"
        )
    return wanted or launched or "ddp"


def _launched_engine(environment: Mapping[str, str]) -> str | None:
    """What `accelerate launch` was configured with; the libraries set the first variable of each kind themselves.

    Raises:
        InputError: it is configured in a way that is not supported; nothing that it says is left out.
    """

    def on(name: str) -> bool:
        return environment.get(name, "").lower() in _YES

    if on("ACCELERATE_USE_FSDP") and "FSDP_VERSION" in environment:
        if environment["FSDP_VERSION"] != "2":
            raise InputError(
                f"{_BY_ENVIRONMENT} asks for FSDP 1, which is not supported: set fsdp_version: 2 in it"
            )
        if on("FSDP_ACTIVATION_CHECKPOINTING"):
            raise InputError(
                f"{_BY_ENVIRONMENT} asks for fsdp_activation_checkpointing: leave it out there, and give "
                "activation_checkpointing: layers"
            )
        if environment.get("FSDP_RESHARD_AFTER_FORWARD", "").lower() in ("false", "0", "no"):
            raise InputError(
                f"{_BY_ENVIRONMENT} has fsdp_reshard_after_forward: false, which is not supported: set it to true"
            )
        return "fsdp2-offload" if on("FSDP_OFFLOAD_PARAMS") else "fsdp2"
    own = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
    if on("ACCELERATE_USE_DEEPSPEED") and {own, "ACCELERATE_DEEPSPEED_ZERO_STAGE"} & environment.keys():
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if stage not in ("2", "3") or own in environment:
            raise InputError(
                f"{_BY_ENVIRONMENT} asks for DeepSpeed with settings of its own: give zero_stage 2 or 3 there and no "
                "deepspeed_config_file, or leave DeepSpeed out there and give parallel: zero2 or zero3"
            )
        offload = "ACCELERATE_DEEPSPEED_OFFLOAD_{}_DEVICE"
        optimizer, parameters = (environment.get(offload.format(of), "none") for of in ("OPTIMIZER", "PARAM"))
        moved = {"2": [("cpu", "none")], "3": [("cpu", "cpu")]}[stage]
        if (optimizer, parameters) not in [("none", "none"), *moved]:
            both = " and offload_param_device" if stage == "3" else ""
            raise InputError(
                f"{_BY_ENVIRONMENT} has offload_optimizer_device: {optimizer} and offload_param_device: {parameters}, "
                f"not supported with zero_stage {stage}: set offload_optimizer_device{both} to cpu, or all to none"
            )
        return f"zero{stage}{'-offload' if optimizer == 'cpu' else ''}"
    return None


def engine_arguments(engine: str) -> dict[str, Any]:
    """What transformers' TrainingArguments are told of an engine, by name."""
    kind, _, offload = engine.partition("-")
    if kind == "fsdp2":
        # A layer is a unit; whole weights in checkpoints, as every other engine writes them.
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "reshard_after_forward": True,
                "cpu_offload": bool(offload),
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    if kind == "ddp":
        return {}
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"parallel = {engine!r} needs DeepSpeed: pip install 'slimepo[deepspeed]', or give fsdp2"
        )
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    to_cpu = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
    zero: dict[str, Any] = {"stage": int(kind[-1]), "overlap_comm": False, "contiguous_gradients": True}
    if offload:
        zero["offload_optimizer"] = to_cpu
        if kind == "zero3":
            zero["offload_param"] = to_cpu
    return {
        "deepspeed": {
            "zero_optimization": zero,
            # The trainer takes a whole optimizer step at a time; these are its own numbers.
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    }


def settle_engine(engine: str) -> None:
    """What accelerate has to know before the accelerator is made, once the process group is there.

    It knows FSDP for accelerators alone and would train with DDP on a CPU, without a word: it is told of another kind
    of device, and gloo does the rest.
    """
    if engine.startswith("fsdp2"):
        state = PartialState()
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU
    load_whole(engine)


def load_whole(engine: str | None) -> None:
    """Let transformers load models whole from here on, as whatever looks at them before they train expects.

    For ZeRO-3 it would cut weights into parts as they are loaded, when the model is still to be tried out, untied or
    given an adapter; DeepSpeed does it when training begins. Accelerators and trainers remind it of ZeRO-3.
    """
    if engine is not None and engine.startswith("zero"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def take_settings_anew(engine: str | None) -> None:
    """Let the next trainer of a process, a later stage's, have an accelerator with DeepSpeed's settings of its own."""
    if engine is not None and engine.startswith("zero"):
        AcceleratorState._reset_state()


def shards(accelerator: Any) -> bool:
    """Whether ranks wait for each other in every pass, because weights or gradients are in parts."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def precision(accelerator: Any) -> AbstractContextManager[Any]:
    """What a forward pass of training runs under: autocast, but for DeepSpeed, whose weights are in half themselves."""
    own = accelerator.distributed_type == DistributedType.DEEPSPEED
    autocast: AbstractContextManager[Any] = nullcontext() if own else accelerator.autocast()
    return autocast


def settle_fsdp(accelerator: Any) -> None:
    """How FSDP2 is to compute and offload, in place of accelerate's own choices.

    Under autocast products are in half precision; gradients are summed in float32, and log-probs left in it. Memory is
    pinned where there is a device to copy to.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None
    )
    if plugin.cpu_offload:
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())


def refuse_whole(engine: str, model: nn.Module, optimizer: Any, ranks: int) -> None:
    """Refuse to train with an engine that shards where it does not.

    model, optimizer: what the engine has made of them, when training begins.

    Raises:
        InputError: what is in effect instead.
    """
    here, whole = held_parameters(model)
    parts = in_parts(model) and here < whole
    # ZeRO-2 keeps whole weights and cuts the optimizer's states.
    zero2 = getattr(getattr(optimizer, "optimizer", optimizer), "partition_gradients", False)
    in_effect = {"ddp": not parts, "fsdp2": parts, "zero2": zero2 and not parts, "zero3": parts}
    if not in_effect[engine.partition("-")[0]]:
        raise InputError(
            f"parallel = {engine!r} is not in effect: each of {ranks} processes holds {here:,} of {whole:,} weights; "
            "leave other settings of FSDP and DeepSpeed out"
        )


def held_parameters(model: nn.Module) -> tuple[int, int]:
    """How many weights this rank holds, and how many the model has."""
    parameters: list[Any] = list(model.parameters())
    return sum(held_part(p).numel() for p in parameters), sum(map(weights_of, parameters))


def held_part(parameter: Any) -> Tensor:
    """What of a parameter this rank holds."""
    if hasattr(parameter, "device_mesh"):
        part: Tensor = parameter.to_local()
    elif hasattr(parameter, "ds_tensor"):
        # ZeRO-3's parts are all of one size: behind the end of the weight lies what was in memory.
        part = parameter.ds_tensor.flatten()
        part = part[: max(0, parameter.ds_numel - torch.distributed.get_rank() * part.numel())]
    else:
        part = parameter
    return part.detach()


def weights_of(parameter: Any) -> int:
    """How many weights a parameter has on all ranks together; bitsandbytes packs two into a number."""
    if (packed := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(packed.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model without its weights (they are on the device `meta`); buffers are there."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a model whole, by name, detached; every rank must call this.

    What DeepSpeed trains is given as its optimizer has it, in float32. Of a model in parts these are new tensors, of
    another one its own.
    """
    return {name: whole_tensor(p) for name, p in model.named_parameters()}


def whole_tensor(tensor: Any) -> Tensor:
    """A parameter, its gradient or a state of its optimizer put together from its parts; every rank must call this."""
    if of_deepspeed(tensor):
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor | None = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
        if master is not None:
            return master.detach().clone().view(getattr(tensor, "ds_shape", tensor.shape))
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            return torch.clone(tensor.detach())
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor
    return whole.detach()


@contextmanager
def backward_alone(accelerator: Any, tensors: Mapping[str, Any]) -> Iterator[dict[str, Tensor | None]]:
    """Backward passes of one step without the step: gives the whole gradients of `tensors`, by name, when it is left.

    Every rank must enter. DeepSpeed takes its step within the last backward pass: here its optimizer rests, so that the
    step changes no weight and no state, and what it counts is set back.
    """
    gradients: dict[str, Tensor | None] = {}
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield gradients
        gradients |= {name: None if t.grad is None else whole_tensor(t.grad) for name, t in tensors.items()}
        return
    from deepspeed.utils import safe_get_full_grad

    engine = accelerator.deepspeed_engine_wrapped.engine
    optimizer = engine.optimizer.optimizer
    own_step, engine_step = optimizer.step, engine.step
    counted = {name: vars(engine)[name] for name in ("global_steps", "global_samples", "micro_steps")}

    def look_and_step(*args: Any, **kwargs: Any) -> None:
        for name, tensor in tensors.items():
            gradient = safe_get_full_grad(tensor)
            shape = getattr(tensor, "ds_shape", tensor.shape)
            gradients[name] = None if gradient is None else gradient.detach().clone().view(shape)
        engine_step(*args, **kwargs)

    engine.step, optimizer.step = look_and_step, lambda *args, **kwargs: None
    try:
        yield gradients
    finally:
        optimizer.step = own_step
        del engine.step
        vars(engine).update(counted)


def of_deepspeed(parameter: Any) -> bool:
    """Whether DeepSpeed keeps a parameter in parts (ZeRO-3), or its states apart from it (ZeRO-2)."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def whole_model(model: nn.Module, bare: nn.Module | None) -> nn.Module:
    """The model with all of its weights on this device, for whatever does not train it; `model` itself if it is whole.

    Every rank must call this together; with what it gives each may go its own way. A copy takes the room of the weights
    once more, for as long as it is held.

    bare: the model's `skeleton`.
    """
    if bare is None or not (in_parts(model) or any(map(of_deepspeed, model.parameters()))):
        return model
    return filled(bare, full_weights(model))


def gathered(model: nn.Module, bare: nn.Module | None, *, keep: bool) -> nn.Module:
    """The model with all of its weights, in CPU memory where it was in parts; `model` itself where it is whole.

    Every rank must call this; those that do not `keep` get the model as it is. Only one tensor at a time is whole on a
    device.

    bare: the model's `skeleton`.
    """
    if bare is None or not (in_parts(model) or any(map(of_deepspeed, model.parameters()))):
        return model
    weights = {}
    for name, parameter in model.named_parameters():
        whole = whole_tensor(parameter)
        if keep:
            weights[name] = whole.cpu()
    return filled(bare, weights).cpu() if keep else model


def filled(bare: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a skeleton with these weights in it; one that two modules share (a tied head) is shared again."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(weights[name], requires_grad=p.requires_grad)
        for name, p in bare.named_parameters()
    }
    return copy.deepcopy(bare, memo)
