"""What a model is tried out on before it trains: its log-probs, and the batch layouts it takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from slimepo.data.batch import LAYOUTS, Layout, collate, collate_packed, to_device
from slimepo.data.rows import PAIR, Row
from slimepo.errors import InputError
from slimepo.kernels.naive import gather_logps
from slimepo.model.attention.choose import choose_attention
from slimepo.model.attention.interface import install
from slimepo.model.logps import causal_lm, response_logps
from slimepo.model.modes import scoring
from slimepo.words import first_line

# Log-probs of the probe in nats, for each nat of the largest logit above one: a logit of 16 is rounded by up to 1/16 in
# bfloat16. A layout that a model cannot take is off by far more.
_CLOSE = {torch.float64: 1e-5, torch.float32: 2e-4}
_CLOSE_HALF = 0.02
# What a model may fail with that is made for other inputs than ours.
_MISFITS = (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, NotImplementedError)


def choose_layout(
    model: nn.Module,
    wanted: str,
    positions: tuple[int, ...] = PAIR,
    attention: str = "auto",
    autocast: torch.dtype | None = None,
    *,
    longest: int = 2048,
    verify: bool = True,
) -> tuple[Layout, str]:
    """The layout to train `model` with, and why, in a few words.

    First of all the model's own log-probs are taken, from its own logits, row by row, with nothing of ours installed;
    whatever it then trains in must give the same. `auto` takes prefix-shared rows where these do; models that hold
    state along the row, or whose attention needs more than our function gives, stay with padded rows and their own
    attention. `attention` and `autocast` are those of `choose_attention`.

    Args:
        longest: tokens of the longest row that will be trained on; a window as long makes no difference.
        verify: False trusts padded rows without a look at the model's own logits.

    Raises:
        InputError: an unknown layout or attention, one asked for that the model cannot take, or log-probs that are
            not the model's own in any layout.
    """
    if wanted not in LAYOUTS:
        raise InputError(f"layout = {wanted!r} is unknown: give one of {', '.join(LAYOUTS)}")
    inner = causal_lm(model)
    name, rows = type(inner).__name__, probe(inner, longest)
    layout: Layout = "packed" if wanted == "packed" or len(positions) == 1 else "shared"
    truth = _own_logps(model, rows) if verify else (_logps(model, rows, "padded"), 1.0)
    why = "as asked"
    if wanted != "padded":
        before = inner.config._attn_implementation
        reason: str | None = None
        try:
            if getattr(inner, "_is_stateful", False):
                raise NotImplementedError("it holds state along the row")
            path, measured = choose_attention(inner, attention, autocast)
            install(inner, path)
            reason = _difference(model, rows, layout, truth)
        except InputError:
            raise
        except _MISFITS as error:
            reason = first_line(error)
        if reason is None:
            return layout, f"gives the model's own log-probs; attention {path}: {measured}"
        inner.set_attn_implementation(before)
        if wanted != "auto":
            raise InputError(f"{name} cannot take layout {wanted!r}: {reason}")
        why = f"{name} cannot take {layout} rows: {reason}"
    try:
        reason = _difference(model, rows, "padded", truth) if verify else None
    except _MISFITS as error:
        reason = first_line(error)
    if reason is not None:
        raise InputError(
            f"{name} cannot be trained here: what is computed from its hidden states differs from its own logits "
            f"({reason})"
        )
    return "padded", why


def _own_logps(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, float]:
    """The model's own log-probs of the rows' responses `[N]`, response after response, and its largest logit."""
    inner = causal_lm(model)
    device = inner.get_input_embeddings().weight.device
    # Spares the logits of a long prompt, where the model knows how.
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
    found, largest = [], 1.0
    with scoring(model) as forward:
        for response, row in ((row.response(p), row) for p in PAIR for row in rows):
            ids = torch.tensor([*row.prompt_ids, *response], device=device).long()
            kept = {"logits_to_keep": len(response) + 1} if keeps else {}
            try:
                logits = forward(input_ids=ids[None], **kept).logits[0, -len(response) - 1 : -1].float()
            except _MISFITS as error:
                raise InputError(
                    f"{type(inner).__name__} cannot be trained here: given nothing but token ids it fails "
                    f"({first_line(error)})"
                ) from error
            found.append(gather_logps(logits, ids[-len(response) :]))
            largest = max(largest, logits.abs().max().item())
    return torch.cat(found), largest


def _difference(
    model: nn.Module, rows: Sequence[Row], layout: Layout, truth: tuple[Tensor, float]
) -> str | None:
    """What is wrong with log-probs in this layout; None where nothing is."""
    expected, largest = truth
    worst = (_logps(model, rows, layout) - expected).abs().max().item()
    dtype = causal_lm(model).get_input_embeddings().weight.dtype
    close = worst <= _CLOSE.get(dtype, _CLOSE_HALF) * largest
    return None if close else f"log-probs differ by {worst:.3g} nats"


def _logps(model: nn.Module, rows: Sequence[Row], layout: Layout) -> Tensor:
    """Our log-probs of the rows' responses `[N]`, response after response."""
    batch = collate(rows) if layout == "padded" else collate_packed(rows, shared=layout == "shared")
    device = causal_lm(model).get_input_embeddings().weight.device
    with scoring(model) as forward:
        return response_logps(forward, to_device(batch, device)).float()


def probe(model: nn.Module, longest: int = 0) -> list[Row]:
    """Pairs of random tokens that a model is tried on; one is longer than any window that is shorter than `longest`."""
    config = causal_lm(model).config.get_text_config()
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return random.integers(0, config.vocab_size, count).astype(np.int32)

    rows = [Row(ids(9), (ids(6), ids(8)), id="probe 1"), Row(ids(5), (ids(11), ids(3)), id="probe 2")]
    spans = [value for key, value in config.to_dict().items() if re.search("window|chunk", key)]
    windows = [span for span in spans if type(span) is int and 0 < span < longest]
    positions = getattr(config, "max_position_embeddings", None) or longest
    if windows:
        rows.append(Row(ids(min(max(windows) + 5, positions - 8)), (ids(6), ids(8)), id="probe 3"))
    return rows
