"""What training computes in, and one precision for everything that is measured, whatever that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slimepo.model.logps import causal_lm, plain_forward


@contextmanager
def measuring(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Inside, the yielded callable is `model`'s forward in eval mode, without gradients, in its own precision.

    A model with half-precision weights runs under autocast of that dtype (its trained parts are float32 and would
    not fit otherwise); a float32 model runs in float32. accelerate's mixed precision, which it puts on a model when
    training begins, is passed by, so that figures from before and after training can be compared.
    """
    halves = [p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    device = causal_lm(model).get_input_embeddings().weight.device.type
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device, dtype=halves[0] if halves else None, enabled=bool(halves)),
        ):
            yield plain_forward(model)
    finally:
        model.train(training)


def compute_dtype(args: Any) -> torch.dtype | None:
    """What training with these arguments computes in, where that is not the weights' dtype."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def computes_in_bf16() -> bool:
    """Whether there is a CUDA device that computes in bfloat16 itself (older ones only emulate it)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
