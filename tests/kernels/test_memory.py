"""What `linear_logps` holds and computes: never all logits, and each logit once where the head is frozen."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimepo import kernels
from slimepo.kernels import linear_logps_stats, sweep
from slimepo.kernels.sweep import Tiling
from tests.kernels.problems import problem

TILE = Tiling(16, 64, 0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_tile_or_an_input(
    trained: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CPU_TILING", TILE)
    hidden, weight, targets, bias, _ = problem(200, 4, 300, dtype)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with LargestTensor() as largest:
        stats = linear_logps_stats(hidden, weight, targets, bias, softcap=5.0, scale=0.5, impl="chunked")
        stats.logps.sum().backward()
    assert largest.elements <= max(TILE.rows * TILE.columns, hidden.numel(), weight.numel())
    assert largest.elements < hidden.shape[0] * weight.shape[0] / 20


@pytest.mark.parametrize(
    ("trained", "keep", "times"), [(False, 0, 1), (True, 0, 2), (True, 10**6, 1), (True, 200 * 300 // 2, 1.5)]
)
def test_how_often_logits_are_computed(
    trained: bool, keep: int, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = 0

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal computed
        computed += len(inputs) * len(weight)
        return torch.nn.functional.linear(inputs, weight, bias)

    monkeypatch.setattr(kernels, "CPU_TILING", TILE._replace(keep=keep))
    monkeypatch.setattr(sweep, "linear", counted)
    hidden, weight, targets, _, _ = problem(200, 4, 300, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    kernels.linear_logps(hidden, weight, targets).sum().backward()
    assert computed == pytest.approx(times * 200 * 300, rel=0.02)
