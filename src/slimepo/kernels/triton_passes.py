"""Launches the Triton kernels over a tile.

`sums` reads a tile once (and once more, from the cache, where it also writes it); `exponentials` reads and writes it
once. They run on GPUs, and on a CPU under Triton's interpreter (TRITON_INTERPRET=1 before the first use).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor

from slimepo.errors import InputError
from slimepo.kernels.passes import Adjustment, Passes, TileSums, wide_dtype
from slimepo.kernels.triton_kernels import exponentials_kernel, sums_kernel

BLOCK = 4096
WARPS = 8


@functools.cache
def triton_passes(device: str) -> Passes:
    """Passes for tensors on `device`.

    Raises:
        InputError: on a CPU without Triton's interpreter.
    """
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            'linear_logps: impl="triton" needs a GPU, or TRITON_INTERPRET=1 for its tests; use impl="chunked"'
        )
    return Passes(_sums, _exponentials)


def _sums(raw: Tensor, adjustment: Adjustment, write: bool, stats: bool) -> TileSums:
    rows, columns = raw.shape
    maximum = torch.empty(rows, dtype=raw.dtype, device=raw.device)
    total = torch.empty(rows, dtype=wide_dtype(raw.dtype), device=raw.device)
    weighted, squared = (torch.empty_like(total) if stats else None for _ in range(2))
    sums_kernel[(rows,)](
        raw,
        maximum,
        total,
        total if weighted is None else weighted,
        total if squared is None else squared,
        columns,
        raw.stride(0),
        **_constants(adjustment, columns),
        WRITE=write,
        STATS=stats,
        num_warps=WARPS,
    )
    return TileSums(maximum, total, weighted, squared)


def _exponentials(raw: Tensor, shift_n: Tensor, adjustment: Adjustment) -> None:
    rows, columns = raw.shape
    constants = _constants(adjustment, columns)
    exponentials_kernel[(rows, triton.cdiv(columns, constants["BLOCK"]))](
        raw, shift_n.contiguous(), columns, raw.stride(0), **constants, num_warps=WARPS
    )


def _constants(adjustment: Adjustment, columns: int) -> dict[str, Any]:
    # Fixed for a model, and as constants they reach the kernel in full precision.
    return {
        "SCALE": float(adjustment.scale),
        "SOFTCAP": float(adjustment.softcap or 0.0),
        "BLOCK": min(BLOCK, triton.next_power_of_2(columns)),
    }
