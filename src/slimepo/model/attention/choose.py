"""Which attention path a model trains with: on CUDA the fastest of those that compute the right thing there."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimepo.data.packing import Packing, pack
from slimepo.data.rows import PAIR, Ids, Row
from slimepo.errors import InputError
from slimepo.model.attention.path import AttentionCall
from slimepo.model.attention.table import ATTENTIONS, PATHS
from slimepo.words import first_line

# Prompt, chosen and rejected tokens of the pairs that paths are timed on: about those of UltraFeedback, 10.8k in all.
_TIMED = [
    (160, 420, 330),
    (90, 250, 480),
    (410, 640, 520),
    (60, 720, 240),
    (230, 330, 390),
    (120, 880, 760),
] * 2
# ... and compared on; windows shrink with them.
_COMPARED = [(70, 40, 90), (20, 150, 33), (129, 1, 64)]
_COMPARED_WINDOW = 48
# Relative error that is no sign of anything.
_SLACK = 1e-3
_TIMES = 3


@dataclass(frozen=True)
class AttentionShape:
    """What the time of attention hangs on; `windows` is each window (None: all is seen) and how many layers have it."""

    heads: int
    key_heads: int
    head_size: int
    windows: tuple[tuple[int | None, int], ...]
    softcap: float | None
    dropout: float
    dtype: torch.dtype
    device: torch.device


def choose_attention(
    model: PreTrainedModel, wanted: str = "auto", autocast: torch.dtype | None = None
) -> tuple[str, str]:
    """The path for packed rows of `model`, and why, in a few words; every rank takes the first one's choice.

    `auto` goes by length on a CPU and is measured on CUDA. `autocast` is the dtype that training computes in where
    it is not the weights'.

    Raises:
        InputError: an unknown path, or one asked for that cannot compute this model's attention here.
    """
    if wanted not in ATTENTIONS:
        raise InputError(f"attention = {wanted!r} is unknown: give one of {', '.join(ATTENTIONS)}")
    device = model.get_input_embeddings().weight.device
    if wanted == "auto" and device.type != "cuda":
        return "by_length", "side by side where sequences are short, else one by one"
    if wanted != "auto" and PATHS[wanted].obstacle is None:
        return wanted, "as asked"
    shape = attention_shape(model, autocast)
    if wanted != "auto":
        reason = _against(shape, wanted, 2 * _error(shape, "side_by_side") + _SLACK)
        if reason is not None:
            raise InputError(
                f"attention = {wanted!r} cannot be used here: {reason}; give auto or side_by_side"
            )
        return wanted, "as asked"
    choice = list(_measured(shape))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(choice)
    return choice[0], choice[1]


def attention_shape(model: PreTrainedModel, autocast: torch.dtype | None = None) -> AttentionShape:
    """The shape of the model's attention, from its configuration."""
    config = model.config.get_text_config()
    weight = model.get_input_embeddings().weight
    heads = config.num_attention_heads
    window = getattr(config, "sliding_window", None) or None
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return AttentionShape(
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        windows=tuple(Counter(window if kind == "sliding_attention" else None for kind in kinds).items()),
        softcap=getattr(config, "attn_logit_softcapping", None),
        dropout=max((float(getattr(m, "attention_dropout", 0) or 0) for m in model.modules()), default=0.0),
        dtype=autocast or weight.dtype,
        device=weight.device,
    )


def fastest(
    shape: AttentionShape,
    candidates: Sequence[str],
    pairs: Sequence[tuple[int, int, int]] = _TIMED,
) -> tuple[str, str]:
    """The candidate that takes the least time for forward and backward of all layers, and the times in words.

    The first candidate is taken to be right; another one that is further from the float32 truth than twice the
    first one's rounding, or that fails, is left out by name.
    """
    first = candidates[0]
    allowed = 2 * _error(shape, first) + _SLACK
    seconds, words = {first: _seconds(shape, first, pairs)}, []
    for path in candidates[1:]:
        reason = _against(shape, path, allowed)
        if reason is None:
            try:
                seconds[path] = _seconds(shape, path, pairs)
            except Exception as error:
                reason = f"fails: {first_line(error)}"
        if reason is not None:
            words.append(f"not {path}: {reason}")
    times = ", ".join(f"{path} {1e3 * took:.3g} ms" for path, took in seconds.items())
    tokens = sum(sum(pair) for pair in pairs)
    return min(seconds, key=lambda path: seconds[path]), "; ".join([f"for {tokens:,} tokens {times}", *words])


@functools.cache
def _measured(shape: AttentionShape) -> tuple[str, str]:
    """Once for all the trainers of a process."""
    return fastest(shape, [name for name, path in PATHS.items() if path.measured])


def _against(shape: AttentionShape, path: str, allowed: float) -> str | None:
    """Why `path` is not to be used: it cannot, it fails, or it computes something else. None: nothing is."""
    obstacle = PATHS[path].obstacle
    reason = obstacle and obstacle(_call(shape, None, _COMPARED[:1]))
    if reason is not None:
        return reason
    try:
        error = _error(shape, path)
    except Exception as failure:
        # Whatever a compiler or a kernel that is not ours may raise: the run can do without it.
        return f"fails: {first_line(failure)}"
    return None if error <= allowed else f"differs by {error:.2g}"


def _seconds(shape: AttentionShape, path: str, pairs: Sequence[tuple[int, int, int]]) -> float:
    """Of forward and backward through all layers' attention, the best of a few; compiling is not counted."""
    total = 0.0
    for window, layers in shape.windows:
        # Another length first, so that compiled code takes any.
        for warm in (pairs[:1], pairs):
            _states(path, _call(shape, window, warm))
        call = _call(shape, window, pairs)
        took: list[float] = []
        for _ in range(_TIMES):
            _wait(shape.device)
            start = time.perf_counter()
            _states(path, call)
            _wait(shape.device)
            took.append(time.perf_counter() - start)
        total += layers * min(took)
    return total


def _error(shape: AttentionShape, path: str) -> float:
    """Largest relative error of output and gradients against float32, over the windows."""
    errors: list[float] = []
    for window, _ in shape.windows:
        call = _call(shape, window and min(window, _COMPARED_WINDOW), _COMPARED)._replace(dropout=0.0)
        truth = call._replace(query=call.query.float(), key=call.key.float(), value=call.value.float())
        for ours, exact in zip(_states(path, call), _states("side_by_side", truth), strict=True):
            errors.append(((ours.float() - exact).norm() / exact.norm()).item())
    return max(errors)


def _states(path: str, call: AttentionCall) -> list[Tensor]:
    """Output, and the gradients of query, key and value for a fixed one of the output."""
    leaves = [states.detach().requires_grad_() for states in (call.query, call.key, call.value)]
    with torch.enable_grad(), torch.autocast(call.query.device.type, enabled=False):
        output = PATHS[path].attend(call._replace(query=leaves[0], key=leaves[1], value=leaves[2]))
        # Weights that differ from token to token: the gradient of a plain sum would hide a token in another's place.
        weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


def _call(shape: AttentionShape, window: int | None, pairs: Sequence[tuple[int, int, int]]) -> AttentionCall:
    from accelerate.utils import send_to_device

    def ids(count: int) -> Ids:
        return np.zeros(count, np.int32)

    rows = [Row(ids(a), (ids(b), ids(c)), id="probe") for a, b, c in pairs]
    packing: Packing = send_to_device(pack(rows, PAIR, shared=True).packing, shape.device)
    tokens = packing["position_ids"].shape[1]
    generator = torch.Generator(shape.device).manual_seed(0)

    def states(heads: int) -> Tensor:  # in memory as projections leave them: [1, T, heads, D]
        drawn = torch.randn(1, tokens, heads, shape.head_size, device=shape.device, generator=generator)
        return drawn.to(shape.dtype).transpose(1, 2)

    query, key, value = states(shape.heads), states(shape.key_heads), states(shape.key_heads)
    return AttentionCall(query, key, value, packing, shape.dropout, None, window, shape.softcap)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
