"""A trained model with fewer bits or fewer weights: what that does to it, told on ordinary weights.

Round-to-nearest and magnitude pruning, without data and without training again. The numbers that the model computes
with are those of the compressed one; they are kept as ordinary weights, so that any transformers user can load them,
and take neither less room nor less time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimepo.errors import InputError
from slimepo.model.logps import causal_lm

BITS = (8, 4, 3)
# Weights in a row of a matrix that share a scale.
GROUP = 64


class Compression(NamedTuple):
    """What is done to the matrices of a model's layers: the smallest weights of each become 0, and the rest is rounded.

    bits: of a weight; None: as it is. prune: the share of each matrix that becomes 0.
    """

    bits: int | None = None
    prune: float = 0.0


def check_compression(compression: Compression) -> None:
    """Raises InputError for bits or a share that cannot be."""
    if compression.bits is not None and compression.bits not in BITS:
        raise InputError(f"--bits {compression.bits}: give one of {', '.join(map(str, BITS))}")
    if not 0 <= compression.prune < 1:
        raise InputError(
            f"--prune {compression.prune:g}: give the share of weights that becomes 0, at least 0 and below 1"
        )


def compress(model: nn.Module, compression: Compression) -> int:
    """Compress the matrices of a plain model's layers in place; returns how many weights they hold.

    Embeddings and the head are left alone, and so are norms, biases and convolutions.
    """
    matrices = layer_matrices(model)
    with torch.no_grad():
        for weight in matrices.values():
            if compression.prune:
                weight.copy_(pruned(weight, compression.prune))
            if compression.bits is not None:
                weight.copy_(rounded(weight, compression.bits))
    return sum(weight.numel() for weight in matrices.values())


def layer_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a model's layers that are matrices, or stacks of them (experts), by name."""
    inner: Any = causal_lm(model)
    ends = {id(end.weight) for end in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    return {
        f"{name}.{own}": weight
        for name, module in inner.named_modules()
        if not isinstance(module, nn.Embedding) and not type(module).__name__.startswith("Conv1d")
        for own, weight in module.named_parameters(recurse=False)
        if weight.dim() in (2, 3) and id(weight) not in ends
    }


def pruned(weight: Tensor, share: float) -> Tensor:
    """`weight` with that share of its entries, those nearest to 0, set to 0.

    Example:
        >>> import torch
        >>> from slimepo.model.compress import pruned
        >>> pruned(torch.tensor([[1.0, -0.5], [0.25, -2.0]]), 0.5)
        tensor([[ 1.,  0.],
                [ 0., -2.]])
    """
    flat = weight.detach().flatten().clone()
    smallest = flat.abs().argsort(stable=True)[: round(share * flat.numel())]
    flat[smallest] = 0
    return flat.view_as(weight)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """`weight` rounded to the nearest of 2**bits - 1 levels, evenly spaced about 0; each 64 in a row have a scale.

    Example:
        >>> import torch
        >>> from slimepo.model.compress import rounded
        >>> rounded(torch.tensor([[3.0, -1.6, 0.4, 0.0]]), 3)  # levels -3 to 3, a scale of 1
        tensor([[ 3., -2.,  0.,  0.]])
    """
    most = 2 ** (bits - 1) - 1
    parts = []
    for part in torch.split(weight.detach().float(), GROUP, dim=-1):
        scale = part.abs().amax(dim=-1, keepdim=True) / most
        parts.append((part / scale.clamp(min=1e-30)).round() * scale)
    return torch.cat(parts, dim=-1).to(weight.dtype)
