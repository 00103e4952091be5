"""One micro-batch sent forward and backward through a policy that has shapes and no data, to see what it holds.

The policy is made as the trainer makes it, of torch's fake tensors: every operator runs for its shapes alone, so a
model of billions of parameters needs neither its weights nor their memory.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from slimepo.data.batch import Layout, PairBatch
from slimepo.errors import InputError
from slimepo.kernels.chunked import CPU_TILING, GPU_TILING
from slimepo.kernels.planned import planned_linear_logps
from slimepo.training import attention
from slimepo.training.logps import causal_lm, head_logps
from slimepo.training.tracker import MemoryTracker
from slimepo.training.trainer import prepared

Checkpointing = Literal["none", "layers", "offload"]


class StepSetting(NamedTuple):
    """What the memory of a micro-batch hangs on besides the model and the batch.

    `autocast`: the forward pass runs under bfloat16 autocast. `checkpointing`: of the layers' activations; `offload`
    keeps what is saved in the host's memory. `accumulates`: gradients of an earlier micro-batch are there already.
    """

    gpu: bool
    dtype: torch.dtype  # of the weights as loaded
    autocast: bool
    checkpointing: Checkpointing
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


def takes_packed_rows(policy: FakePolicy) -> bool:
    """Whether the model takes slimepo's attention function; installs it where it does."""
    inner = causal_lm(policy.model)
    if getattr(inner, "_is_stateful", False):
        return False
    try:
        attention.install(inner)
    except ValueError:
        return False
    return True


def micro_batch_memory(
    policy: FakePolicy, batch: PairBatch, setting: StepSetting
) -> tuple[Counter[str], Counter[str]]:
    """Bytes by kind at the peak of one micro-batch: through the layers, and in the embedding's backward pass after it.

    Kinds are weights, gradients, head and activations. The optimizer is not in it.

    Raises:
        InputError: the model's forward pass looks at its data (some mixtures of experts), so it cannot be planned.
    """
    model, mode = policy
    tracker = MemoryTracker()
    through_layers: list[Counter[str]] = []
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: tracker.count([p.grad], "gradients")) for p in trained]
    hooks.append(
        causal_lm(model).get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: _at_gradient(output, lambda: through_layers.append(tracker.start_anew()))
        )
    )  # fmt: skip
    try:
        with warnings.catch_warnings(), mode, _attention_of(setting), tracker:
            warnings.simplefilter("ignore")
            tracker.count([*model.parameters(), *model.buffers()], "weights")
            _start_gradients(trained, tracker, setting)
            inputs = _on_mode(dict(batch), mode)
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
                logps = _logps(model, inputs, setting, tracker)
            logps.sum().backward()
    except (RuntimeError, DynamicOutputShapeException) as error:
        raise InputError(
            f"{type(causal_lm(model)).__name__} cannot be planned: its forward pass looks at its data "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    last = tracker.start_anew()
    return (through_layers[0], last) if through_layers else (last, last)


def _logps(
    model: nn.Module, inputs: dict[str, Any], setting: StepSetting, tracker: MemoryTracker
) -> Tensor:
    """The forward pass of `slimepo.training.logps`, its head planned."""
    inner: Any = causal_lm(model)
    packing = inputs["packing"]
    extra = {} if packing is None else {"position_ids": packing["position_ids"], "packing": packing}
    # No mask where the real tensors would need none: transformers has to look at position ids to know.
    with attention.packed_rows():
        hidden = inner.base_model(input_ids=inputs["input_ids"], use_cache=False, **extra).last_hidden_state
    selected_NH = hidden.reshape(-1, hidden.shape[-1])[inputs["predict_at"]]
    fused = functools.partial(
        planned_linear_logps,
        dtype=torch.bfloat16 if setting.autocast else None,
        tiling=GPU_TILING if setting.gpu else CPU_TILING,
        within=lambda: tracker.kind("head"),
    )
    return head_logps(inner, selected_NH, inputs["targets"], fused)


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


def _at_gradient(output: Tensor, call: Callable[[], None]) -> None:
    """Call when the gradient of `output` is there."""
    if output.requires_grad:
        output.register_hook(lambda gradient: call())


@contextmanager
def _attention_of(setting: StepSetting) -> Iterator[None]:
    """On a GPU sequences attend side by side whatever their length; fake tensors are all on the CPU."""
    before = attention.SIDE_BY_SIDE
    attention.SIDE_BY_SIDE = sys.maxsize if setting.gpu else before
    try:
        yield
    finally:
        attention.SIDE_BY_SIDE = before
