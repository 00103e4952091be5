"""What a model is tried out on before it trains: its log-probs, and the batch layouts it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimepo.data.batch import LAYOUTS, Batch, Layout, collate, collate_packed, to_device
from slimepo.data.rows import PAIR, Row
from slimepo.errors import InputError
from slimepo.kernels.naive import gather_logps
from slimepo.model.attention.choose import choose_attention
from slimepo.model.attention.interface import install
from slimepo.model.logps import causal_lm, policy_logps
from slimepo.model.modes import scoring

# Log-probs of the probe in nats; a layout that a model cannot take is off by far more.
_CLOSE = {torch.float64: 1e-5, torch.float32: 2e-4}
_CLOSE_HALF = 0.1


def choose_layout(
    model: nn.Module,
    wanted: str,
    positions: tuple[int, ...] = PAIR,
    attention: str = "auto",
    autocast: torch.dtype | None = None,
) -> tuple[Layout, str]:
    """The layout to train `model` with, and why, in a few words.

    `auto` tries a prefix-shared row against padded rows and takes it when the log-probs agree; models that hold
    state along the row, or that do not take an attention function, stay with padded rows. `attention` and
    `autocast` are those of `choose_attention`.

    Raises:
        InputError: an unknown layout or attention, or one asked for that the model cannot take.
    """
    if wanted not in LAYOUTS:
        raise InputError(f"layout = {wanted!r} is unknown: give one of {', '.join(LAYOUTS)}")
    if wanted == "padded":
        return "padded", "as asked"
    layout: Layout = "packed" if wanted == "packed" or len(positions) == 1 else "shared"
    inner = causal_lm(model)
    before = inner.config._attn_implementation
    try:
        if getattr(inner, "_is_stateful", False):
            raise NotImplementedError("it holds state along the row")
        path, why = choose_attention(inner, attention, autocast)
        install(inner, path)
        reason = _difference(model, layout)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if reason is None:
        return layout, f"gives the log-probs of padded rows; attention {path}: {why}"
    inner.set_attn_implementation(before)
    if wanted != "auto":
        raise InputError(f"{type(inner).__name__} cannot take layout {wanted!r}: {reason}")
    return "padded", f"{type(inner).__name__} cannot take {layout} rows: {reason}"


def verify_logps(model: nn.Module) -> None:
    """Compare with the model's own logits on a few tokens: no architecture may train on wrong numbers.

    Raises:
        InputError: the log-probs differ by more than rounding explains.
    """
    inner = causal_lm(model)
    weight = inner.get_input_embeddings().weight
    ids = (torch.arange(2, 14, device=weight.device) % inner.config.get_text_config().vocab_size)[None]
    with scoring(model) as forward:
        ours = forward(input_ids=ids, predict_at=torch.arange(11, device=weight.device), targets=ids[0, 1:])
        logits = forward(input_ids=ids).logits[0, :-1].float()
    worst = (ours.float() - gather_logps(logits, ids[0, 1:])).abs().max().item()
    # A logit of 16 is rounded by up to 1/16 in bfloat16, and some architectures work on it in that precision.
    allowed = _CLOSE.get(weight.dtype, 0.02) * max(1.0, logits.abs().max().item())
    if not worst <= allowed:
        raise InputError(
            f"{type(inner).__name__}: log-probs computed from its hidden states differ from its own logits by "
            f"{worst:.3g} nats; its head does something slimepo does not know, so it cannot be trained here"
        )


def _difference(model: nn.Module, layout: Layout) -> str | None:
    """What is wrong with the layout on a probe of two pairs; None where nothing is."""
    inner = causal_lm(model)
    pairs = probe(inner.config.get_text_config().vocab_size)
    weight = inner.get_input_embeddings().weight
    with scoring(model) as forward:
        padded = _logps(forward, collate(pairs), weight.device)
        packed = _logps(forward, collate_packed(pairs, shared=layout == "shared"), weight.device)
    worst = (padded - packed).abs().max().item()
    return None if worst <= _CLOSE.get(weight.dtype, _CLOSE_HALF) else f"log-probs differ by {worst:.3g} nats"


def _logps(forward: Callable[..., Any], batch: Batch, device: torch.device) -> Tensor:
    logps = policy_logps(forward, to_device(batch, device))
    return torch.cat([logps.chosen, logps.rejected]).float()


def probe(vocabulary: int) -> list[Row]:
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return random.integers(0, vocabulary, count).astype(np.int32)

    return [
        Row(ids(9), (ids(6), ids(8)), id="probe 1"),
        Row(ids(5), (ids(11), ids(3)), id="probe 2"),
    ]
