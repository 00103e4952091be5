"""What one of several devices holds of a planned step, by how they share it. Not measured yet: docs/scale.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from slimepo.model.logps import causal_lm

# DeepSpeed collects gradients of so many weights before it sends them.
ZERO_BUCKET = 500_000_000


class Sizes(NamedTuple):
    """Bytes of a model's weights, of its largest layer and of its two ends; bytes and numbers of those that train."""

    weights: int
    layer: int
    ends: int
    trained: int
    trained_in_layer: int
    trained_in_ends: int


def sizes_of(model: nn.Module) -> Sizes:
    """Counted on a model of fake tensors; a layer is what FSDP2 and ZeRO-3 gather at once."""

    def bytes_of(*modules: nn.Module) -> tuple[int, int]:
        each = {id(p): p for module in modules for p in module.parameters()}.values()
        trained = sum(p.numel() for p in each if p.requires_grad)
        return sum(p.numel() * p.element_size() for p in each), trained

    inner = causal_lm(model)
    names = set(inner._no_split_modules or ())
    layers = [bytes_of(module) for module in inner.modules() if type(module).__name__ in names]
    ends = bytes_of(inner.get_input_embeddings(), inner.get_output_embeddings())
    weights, trained = bytes_of(model)
    layer, in_layer = max(layers, default=(weights, trained))
    return Sizes(weights, layer, ends[0], trained, in_layer, ends[1])


def on_a_rank(memory: Mapping[str, int], sizes: Sizes, engine: str, ranks: int) -> tuple[dict[str, int], int]:
    """The parts of a step's memory on one of `ranks` devices, and what a look at the whole model takes there.

    memory: bytes by part on a device that is alone. A look: before training, for the monitor, held-out scores and
    samples, a model in parts is put together, beside its parts and the optimizer's (0 where it is whole anyway).
    """
    parts = dict(memory)
    if ranks == 1:
        return parts, 0
    kind, _, offload = engine.partition("-")
    gradients = 4 * sizes.trained
    if kind == "ddp":
        # Buckets, from which gradients are sent.
        parts["gradients"] += gradients
        return parts, 0

    def part(size: int) -> int:
        return math.ceil(size / ranks)

    beside = memory["weights"] - sizes.weights  # a reference or a value model, whole on every device
    if kind == "zero2":
        master = 4 * sizes.trained
        parts["gradients"] = part(gradients) + 4 * min(sizes.trained, ZERO_BUCKET)
        parts["optimizer"] = part(memory["optimizer"] + master)
        if offload:
            parts |= {"gradients": 4 * min(sizes.trained, ZERO_BUCKET), "optimizer": 0}
        return parts, 0
    # A layer that computes and the one that is fetched ahead, and the ends, whose head stays until its backward pass.
    gathered = 2 * sizes.layer + sizes.ends
    reduced = 4 * max(sizes.trained_in_layer, sizes.trained_in_ends)
    own = 0 if offload else part(sizes.weights)
    parts["weights"] = beside + own + min(gathered, sizes.weights)
    parts["gradients"] = reduced + (0 if offload else part(gradients))
    parts["optimizer"] = 0 if offload else part(memory["optimizer"])
    return parts, beside + own + parts["optimizer"] + sizes.weights
