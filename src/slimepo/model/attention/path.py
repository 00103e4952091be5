"""What a path for the attention of packed rows is given, and what is to be known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slimepo.data.packing import Packing

# What the fused kernels compute in.
HALF = (torch.bfloat16, torch.float16)


class AttentionCall(NamedTuple):
    """One layer's attention over a packed row of T tokens.

    `query` is `[1, heads, T, D]`; `key` and `value` may have fewer heads, each serving a group of query heads.
    `scaling` None means `D ** -0.5`. `window` counts in position ids, which run on from the prompt in every
    response; a token sees itself and the `window - 1` before it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    packing: Packing
    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None


class AttentionPath(NamedTuple):
    """One way to compute such calls: a row of `slimepo.model.attention.table.PATHS`.

    `attend` returns `[1, T, heads, D]`. `obstacle` says why it cannot compute a call, or None where it can; a path
    without one takes every call, whatever its dtypes and device. `measured`: `auto` times it on CUDA. `planned_as`
    is the path whose memory `slimepo plan` works out for it, where its own kernel does not run on a CPU.
    """

    attend: Callable[[AttentionCall], Tensor]
    obstacle: Callable[[AttentionCall], str | None] | None = None
    measured: bool = False
    planned_as: str | None = None
