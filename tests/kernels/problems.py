"""Random problems for `linear_logps`, and its implementations on every device that is here."""

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slimepo.kernels import TokenStats, linear_logps_stats

TRITON_ABSENT = importlib.util.find_spec("triton") is None
CUDA = torch.cuda.is_available()

# Triton runs interpreted on the CPU only where there is no GPU to run it on.
PLACES = [
    pytest.param("chunked", "cpu"),
    pytest.param(
        "triton",
        "cpu",
        marks=[
            pytest.mark.skipif(TRITON_ABSENT, reason="the triton package is not installed"),
            pytest.mark.skipif(CUDA, reason="Triton's kernels are tested on the GPU here"),
        ],
    ),
    *(
        pytest.param(
            impl,
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")],
        )
        for impl in ("chunked", "triton")
    ),
]


class Problem(NamedTuple):
    """`hidden [N, H]`, `weight [V, H]`, `targets [N]`, `bias [V]`, and what flows back into the log-probs `[N]`."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor
    upstream: Tensor


def problem(n: int, h: int, v: int, dtype: torch.dtype, device: str = "cpu", spread: float = 1.0) -> Problem:
    """Normal numbers; logits have about the standard deviation `spread * sqrt(h)`."""
    generator = torch.Generator().manual_seed(n + 1000 * h + v)
    shapes = ((n, h), (v, h), (v,), (n,))
    hidden, weight, bias, upstream = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    targets = torch.randint(0, v, (n,), generator=generator)
    # The dtype's own rounding of the inputs is not an error of the computation.
    rounded = [t.to(dtype) for t in (hidden * spread, weight, bias)]
    return Problem(*(t.to(device) for t in (rounded[0], rounded[1], targets, rounded[2], upstream)))


def gradients(
    given: Problem, impl: str, trained: Sequence[bool], dtype: torch.dtype | None = None, **settings: Any
) -> tuple[TokenStats, list[Tensor | None]]:
    """Results, and the gradients of hidden, weight and bias (None where not trained), computed in `dtype`."""
    leaves = [
        t.to(dtype or t.dtype).clone().requires_grad_(on)
        for t, on in zip((given.hidden, given.weight, given.bias), trained, strict=True)
    ]
    hidden, weight, bias = leaves
    stats = linear_logps_stats(hidden, weight, given.targets, bias, impl=impl, **settings)  # type: ignore[arg-type]
    stats.logps.backward(given.upstream.to(stats.logps.dtype))
    return stats._replace(logps=stats.logps.detach()), [t.grad for t in leaves]
