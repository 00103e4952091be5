"""Matrix products with a narrow job: the fastest exact float32 product that this CPU has.

PyTorch sends float32 products on a CPU to MKL, which keeps to half the vector width (AVX2) on processors that
are not Intel's. oneDNN, which PyTorch also carries, uses AVX-512 wherever it is there: measured on an AMD EPYC
(Zen 5), 200 against 95 GFLOP/s on one thread, with the same float32 arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(inputs_nk: Tensor, weight_mk: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """`inputs @ weight.T + bias`, `[n, m]`, without gradients."""
    fast = _onednn_linear() if inputs_nk.device.type == "cpu" and inputs_nk.dtype == torch.float32 else None
    if fast is None or inputs_nk.numel() == 0:
        return F.linear(inputs_nk, weight_mk, bias_m)
    return fast(inputs_nk, weight_mk, bias_m, "none", [], "")  # type: ignore[no-any-return]


def product(left_nk: Tensor, right_km: Tensor) -> Tensor:
    """`left @ right`, `[n, m]`, without gradients."""
    return linear(left_nk, right_km.T)


def accumulate(total_nm: Tensor, left_nk: Tensor, right_km: Tensor) -> None:
    """`total += left @ right`, without gradients; on a GPU a product of half-precision factors is added unrounded.

    A product that is rounded to bfloat16 first costs a pass over memory more, and its error grows with every tile.
    """
    if _adds_unrounded(left_nk.device.type, left_nk.dtype):
        torch.addmm(total_nm, left_nk, right_km, out_dtype=total_nm.dtype, out=total_nm)
    else:
        total_nm += product(left_nk, right_km)


@functools.cache
def _adds_unrounded(device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch has that operation there: tried once, on numbers that show a wrong answer."""
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    left, total = torch.ones(16, 32, dtype=dtype, device=device), torch.full((16, 16), 0.001, device=device)
    try:
        torch.addmm(total, left, left.T, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 32.001).all())


@functools.cache
def _onednn_linear() -> Callable[..., Any] | None:
    """PyTorch's own operator for a oneDNN product (the one that torch.compile calls), where it pays."""
    if not torch._C._has_mkldnn or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
