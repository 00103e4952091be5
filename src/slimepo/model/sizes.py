"""What a configuration asks for, told without any weights: whether a model comes of it, and whether there is room."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from slimepo.errors import InputError, ResourceError, one_line

# More than any model has; to set up a hundred thousand takes minutes.
MOST_LAYERS = 1000


def refuse_layers(config: PreTrainedConfig, what: str) -> None:
    """Refuse a configuration of more layers than a model can have. Raises InputError."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int | None) or (layers or 0) > MOST_LAYERS:
        raise InputError(f"{what}: num_hidden_layers is {layers!r}; give a number up to {MOST_LAYERS}")


def refuse_numbers(sizes: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Refuse numbers that no model has: sizes and counts below 1, what is not finite.

    usual: the architecture's own, among which a token's id, for one, may be 0 or -1.

    Raises:
        InputError: with the size's name.
    """
    for name, value in sizes.items():
        if (
            isinstance(usual.get(name), bool)
            or name.endswith("_id")
            or not isinstance(value, bool | int | float)
        ):
            continue
        whole = isinstance(usual.get(name), int)
        if (
            isinstance(value, bool)
            or not math.isfinite(value)
            or value < (1 if whole and usual[name] > 0 else 0)
        ):
            raise InputError(
                f"model: {name} cannot be {value!r}; this architecture has {usual.get(name)!r} by itself"
            )


def parameters_of(config: PreTrainedConfig) -> int:
    """How many parameters a model of this configuration has.

    Raises:
        InputError: no model comes of it.
    """
    refuse_layers(config, "model")
    text = config.get_text_config()
    heads, shared = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if heads and shared and heads % shared:
        raise InputError(f"model: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        # Of whatever kind: layers look at their sizes only as they are made.
        raise InputError(
            f"model: no model of these sizes: {type(error).__name__}: {one_line(str(error))}"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def refuse_too_large(config: PreTrainedConfig) -> None:
    """Refuse a configuration whose weights in float32 are more than the machine has memory.

    Raises:
        InputError: no model comes of it.
        ResourceError: too large.
    """
    needed, there = 4 * parameters_of(config), memory()
    if there is not None and needed > there:
        raise ResourceError(
            f"model: its weights take {needed / 2**30:,.1f} GiB and this machine has {there / 2**30:,.1f} GiB of "
            "memory; give smaller sizes"
        )


def memory() -> int | None:
    """Bytes of memory that the machine has; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
