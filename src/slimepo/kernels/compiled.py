"""The passes over a tile under torch.compile: each is one or two fused loops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.kernels.passes import Adjustment, Passes, TileSums, adjusted, cap_slope, wide_dtype

# Compiled code is one for all shapes, but not for all dtypes, adjustments, flags and a single row. PyTorch stops at 8.
VARIANTS = 64


@functools.cache
def compiled_passes() -> Passes:
    """Passes that compile at their first call (some seconds), for all shapes at once.

    Raises:
        InputError: at a call, where torch.compile finds no working compiler.
    """
    return Passes(_compiled(_sums), _compiled(_exponentials))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                return fast(*arguments)
        except _COMPILE_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f'linear_logps: impl="compiled" cannot compile here ({reason}); '
                'install a C++ compiler or use impl="chunked"'
            ) from error

    return call


def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    return (TorchDynamoException, InductorError, InvalidCxxCompiler)


_COMPILE_ERRORS = _compile_errors()


def _sums(raw: Tensor, adjustment: Adjustment, write: bool, stats: bool) -> TileSums:
    maximum = raw.amax(dim=1)
    logits = _logits(raw, adjustment)
    difference = logits - adjusted(maximum, adjustment)[:, None]
    exps = difference.exp()
    weighted = None
    if stats:
        # A logit of -inf adds nothing, and 0 * -inf would be NaN.
        weighted = (exps * difference.clamp_min(torch.finfo(difference.dtype).min)).sum(dim=1)
    total = exps.sum(dim=1)
    if write:
        raw.copy_(exps * cap_slope(logits, adjustment.softcap))
    return TileSums(maximum, total, weighted)


def _exponentials(raw: Tensor, shift_n: Tensor, adjustment: Adjustment) -> None:
    logits = _logits(raw, adjustment)
    raw.copy_((logits - shift_n[:, None]).exp() * cap_slope(logits, adjustment.softcap))


def _logits(raw: Tensor, adjustment: Adjustment) -> Tensor:
    logits = raw.to(wide_dtype(raw.dtype)) * adjustment.scale
    if adjustment.softcap is None:
        return logits
    return torch.tanh(logits / adjustment.softcap) * adjustment.softcap
