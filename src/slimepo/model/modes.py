"""The one mode that everything but a training step runs the model in, and what training computes in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from slimepo.model.logps import causal_lm, forward_with_logps, without_router_logits

Forward = Callable[..., Any]


@contextmanager
def scoring(model: nn.Module, *, adapters: bool = True, own_precision: bool = True) -> Iterator[Forward]:
    """Inside, the yielded callable is `model`'s forward, log-probs included, in eval mode and without gradients.

    It is the forward without what accelerate has put around it when training began, so that figures from before and
    after training can be compared. The model is again as it was outside.

    Args:
        model: a transformers model, bare or inside peft's wrappers.
        adapters: False switches peft's adapters off; a trained head is off as well. Its weight is the policy's
            again outside, so the forward must not be used there.
        own_precision: a model with half-precision weights runs under autocast of that dtype (its trained parts are
            float32 and would not fit otherwise), a float32 model in float32. False: under the caller's autocast.
    """
    peft_model: Any = model
    inner: Any = causal_lm(model)
    halves = [p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    # One by one: what a user keeps in eval mode (a frozen part, say) stays there.
    training = [(module, module.training) for module in model.modules()]
    # Switching adapters on again, peft lets all of their parameters train, those that the user froze among them.
    trains = [] if adapters else [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(without_router_logits(inner))
            if own_precision:
                device = inner.get_input_embeddings().weight.device.type
                dtype = halves[0] if halves else None
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=bool(halves)))
            if not adapters:
                stack.enter_context(peft_model.disable_adapter())
            model_class: Any = type(inner)
            if in_parts(model):
                # Parts are gathered when the module is called, and nothing is put around its forward then.
                yield model
            elif inner is model:
                yield functools.partial(forward_with_logps(model_class), model)
            else:
                yield functools.partial(type(model).forward, model)
    finally:
        for module, was in training:
            module.training = was
        for parameter, before in trains:
            parameter.requires_grad_(before)


def in_parts(model: nn.Module) -> bool:
    """Whether each device holds a part of the model's weights alone: FSDP2's DTensors, or DeepSpeed's ZeRO-3."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def compute_dtype(args: Any) -> torch.dtype | None:
    """What training with these arguments computes in, where that is not the weights' dtype."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def answer_dtype(asked: str = "auto") -> torch.dtype:
    """What a model that answers is loaded in; auto is bfloat16 where a GPU computes in it, else float32."""
    if asked == "auto":
        return torch.bfloat16 if computes_in_bf16() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[asked]


def computes_in_bf16() -> bool:
    """Whether there is a CUDA device that computes in bfloat16 itself (older ones only emulate it)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
