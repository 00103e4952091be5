"""Which batch layout a model takes: tried out, not looked up."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from slimepo.data.batch import SIDES, Layout, PairBatch, collate, collate_packed
from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError
from slimepo.training.attention import install
from slimepo.training.logps import causal_lm, policy_logps

LAYOUTS = ("auto", *get_args(Layout))

# Log-probs of the probe in nats; a layout that a model cannot take is off by far more.
_CLOSE = {torch.float64: 1e-5, torch.float32: 2e-4}
_CLOSE_HALF = 0.1


def choose_layout(model: nn.Module, wanted: str, sides: tuple[str, ...] = SIDES) -> tuple[Layout, str]:
    """The layout to train `model` with, and why, in a few words.

    `auto` tries a prefix-shared row against padded rows and takes it when the log-probs agree; models that hold
    state along the row, or that do not take an attention function, stay with padded rows.

    Raises:
        InputError: an unknown layout, or one asked for that the model cannot take.
    """
    if wanted not in LAYOUTS:
        raise InputError(f"layout = {wanted!r} is unknown: give one of {', '.join(LAYOUTS)}")
    if wanted == "padded":
        return "padded", "as asked"
    layout: Layout = "packed" if wanted == "packed" or len(sides) == 1 else "shared"
    inner = causal_lm(model)
    before = inner.config._attn_implementation
    try:
        install(inner)
        reason = _difference(model, layout)
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if reason is None:
        return layout, "gives the log-probs of padded rows"
    inner.set_attn_implementation(before)
    if wanted != "auto":
        raise InputError(f"{type(inner).__name__} cannot take layout {wanted!r}: {reason}")
    return "padded", f"{type(inner).__name__} cannot take {layout} rows: {reason}"


def untried_layout(model: nn.Module, wanted: str) -> tuple[Layout, str]:
    """The layout for a model that cannot be probed: as asked, and padded rows for `auto`."""
    for layout in get_args(Layout):
        if layout == wanted != "padded":
            install(causal_lm(model))
            return layout, "as asked, not tried out"
    if wanted not in LAYOUTS:
        raise InputError(f"layout = {wanted!r} is unknown: give one of {', '.join(LAYOUTS)}")
    return "padded", "no other was tried out"


@torch.no_grad()
def _difference(model: nn.Module, layout: Layout) -> str | None:
    """What is wrong with the layout on a probe of two pairs; None where nothing is."""
    if getattr(causal_lm(model), "_is_stateful", False):
        return "it holds state along the row"
    pairs = _probe(causal_lm(model).config.get_text_config().vocab_size)
    device = causal_lm(model).get_input_embeddings().weight.device
    training = model.training
    model.eval()
    try:
        padded = _logps(model, collate(pairs), device)
        packed = _logps(model, collate_packed(pairs, shared=layout == "shared"), device)
    finally:
        model.train(training)
    worst = (padded - packed).abs().max().item()
    close = _CLOSE.get(causal_lm(model).get_input_embeddings().weight.dtype, _CLOSE_HALF)
    return None if worst <= close else f"log-probs differ by {worst:.3g} nats"


def _logps(model: nn.Module, batch: PairBatch, device: torch.device) -> Tensor:
    logps = policy_logps(model, to_device(batch, device))
    return torch.cat([logps.chosen, logps.rejected]).float()


def to_device(batch: PairBatch, device: torch.device) -> PairBatch:
    """The batch with its tensors on `device`."""
    from accelerate.utils import send_to_device

    moved: PairBatch = send_to_device(batch, device)
    return moved


def _probe(vocabulary: int) -> list[TokenizedPair]:
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return random.integers(0, vocabulary, count).astype(np.int32)

    return [
        TokenizedPair(ids(9), ids(6), ids(8), "probe 1"),
        TokenizedPair(ids(5), ids(11), ids(3), "probe 2"),
    ]
