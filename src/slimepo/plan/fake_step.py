"""One micro-batch sent forward and backward through a policy that has shapes and no data, to see what it holds.

The policy is made as the trainer makes it, of torch's fake tensors: every operator runs for its shapes alone, so a
model of billions of parameters needs neither its weights nor their memory.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slimepo.data.batch import Batch
from slimepo.errors import InputError
from slimepo.kernels.chunked import CPU_TILING, GPU_TILING
from slimepo.kernels.planned import planned_linear_logps
from slimepo.model.attention import interface as attention
from slimepo.model.logps import causal_lm, head_logps
from slimepo.plan.tracker import MemoryTracker
from slimepo.training.prepare import prepared

Checkpointing = Literal["none", "layers", "offload"]


class StepSetting(NamedTuple):
    """What the memory of a micro-batch hangs on besides the model and the batch.

    `autocast`: the forward pass runs under bfloat16 autocast. `checkpointing`: of the layers' activations; `offload`
    keeps what is saved in the host's memory. `attention` is one of `slimepo.model.attention.table`.
    `accumulates`: gradients of an earlier micro-batch are there already.
    """

    gpu: bool
    dtype: torch.dtype  # of the weights as loaded
    autocast: bool
    checkpointing: Checkpointing
    attention: str
    accumulates: bool


class FakePolicy(NamedTuple):
    """A policy of fake tensors, and the mode they live in."""

    model: nn.Module
    mode: FakeTensorMode


def fake_policy(
    config: PreTrainedConfig, peft_config: Any, setting: StepSetting, *, disable_dropout: bool = True
) -> FakePolicy:
    """The policy that the trainer would make of this configuration and adapter, without its data."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
        policy = prepared(model, None, peft_config, disable_dropout=disable_dropout)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _on_fake_cpu(policy)
    if setting.checkpointing != "none":
        inner: Any = policy
        inner.activation_checkpointing_enable()
    return FakePolicy(policy.train(), mode)


def takes_packed_rows(policy: FakePolicy, path: str) -> bool:
    """Whether the model takes slimepo's attention function; installs it where it does."""
    inner = causal_lm(policy.model)
    if getattr(inner, "_is_stateful", False):
        return False
    try:
        attention.install(inner, path)
    except ValueError:
        return False
    return True


def micro_batch_memory(
    policy: FakePolicy, batch: Batch, setting: StepSetting
) -> tuple[Counter[str], Counter[str]]:
    """Bytes by kind at the peak of one micro-batch: through the layers, and in the embedding's backward pass after it.

    Kinds are weights, gradients, head and activations. The optimizer is not in it.

    Raises:
        InputError: an operator of the model does not run without data (mixtures of experts in float32), so that
            it cannot be planned.
    """
    model, mode = policy
    tracker = MemoryTracker()
    through_layers: list[Counter[str]] = []
    trained = [p for p in model.parameters() if p.requires_grad]

    def layers_are_done(gradient: Tensor) -> None:
        through_layers.append(tracker.start_anew())

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(layers_are_done)

    def stays(parameter: Any) -> None:
        tracker.count([parameter.grad], "gradients")

    hooks = [causal_lm(model).get_input_embeddings().register_forward_hook(watch)]
    leaves: list[Any] = trained
    hooks += [leaf.register_post_accumulate_grad_hook(stays) for leaf in leaves]
    try:
        with _quietly(), mode, tracker:
            tracker.count([*model.parameters(), *model.buffers()], "weights")
            _start_gradients(trained, tracker, setting)
            inputs = _on_mode(dict(batch), mode)
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
                logps = _logps(model, inputs, setting, tracker)
            torch.autograd.backward(logps.sum())
    except RuntimeError as error:
        raise InputError(
            f"{type(causal_lm(model)).__name__} cannot be planned: it does not run without data "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    last = tracker.start_anew()
    first = through_layers[0] if through_layers else Counter(last)
    first["activations"] -= _offloaded(policy, batch, setting)
    return first, last


def _logps(model: nn.Module, inputs: dict[str, Any], setting: StepSetting, tracker: MemoryTracker) -> Tensor:
    """The forward pass of `slimepo.model.logps`, its head planned."""
    inner: Any = causal_lm(model)
    packing = inputs["packing"]
    extra = {} if packing is None else {"position_ids": packing["position_ids"], "packing": packing}
    # transformers leaves a causal mask out when it sees that none is needed, which it cannot see here.
    with nullcontext() if packing is None and _beyond_window(inner, inputs) else attention.packed_rows():
        hidden = inner.base_model(input_ids=inputs["input_ids"], use_cache=False, **extra).last_hidden_state
    selected_NH = hidden.reshape(-1, hidden.shape[-1])[inputs["predict_at"]]
    fused = functools.partial(
        planned_linear_logps,
        dtype=torch.bfloat16 if setting.autocast else None,
        tiling=GPU_TILING if setting.gpu else CPU_TILING,
        within=lambda: tracker.kind("head"),
    )
    return head_logps(inner, selected_NH, inputs["targets"], fused)


def _beyond_window(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether padded rows are longer than a sliding window, so that some layers need a mask (here all get one)."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest: int = inputs["input_ids"].shape[1]
    return window is not None and longest > window


def _offloaded(policy: FakePolicy, batch: Batch, setting: StepSetting) -> int:
    """Bytes of the layers' inputs that are in the host's memory at the peak: all but that of the last layer."""
    if not (setting.gpu and setting.checkpointing == "offload"):
        return 0
    inner = causal_lm(policy.model)
    text = inner.config.get_text_config()
    states: int = batch["input_ids"].numel() * text.hidden_size * inner.get_input_embeddings().weight.itemsize
    kept: int = (text.num_hidden_layers - 1) * states
    return kept


def _on_fake_cpu(policy: nn.Module) -> None:
    """Give every parameter and buffer of a model on the meta device the CPU's name; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _on_mode(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    return {key: _on_mode(part, mode) for key, part in value.items()} if isinstance(value, dict) else value


def _start_gradients(trained: list[nn.Parameter], tracker: MemoryTracker, setting: StepSetting) -> None:
    if setting.accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            tracker.count([parameter.grad], "gradients")


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, torch's remarks on fake tensors are left out; what goes wrong is raised all the same."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before
