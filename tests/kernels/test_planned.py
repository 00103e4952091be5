"""The stand-in that plans memory holds what `linear_logps` holds."""

import pytest
import torch
from torch import Tensor

from slimepo import kernels
from slimepo.kernels import linear_logps
from slimepo.kernels.planned import planned_linear_logps
from slimepo.kernels.sweep import Tiling
from slimepo.plan.tracker import MemoryTracker
from tests.kernels.problems import problem

TILE = Tiling(rows=64, columns=256, keep=2**14)


def peak(function: object, inputs: list[Tensor], targets: Tensor, softcap: float | None) -> int:
    """The most bytes alive in a forward and backward pass, inputs not counted."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    tracker = MemoryTracker()
    tracker.count([*leaves, targets], "inputs")
    with tracker:
        function(leaves[0], leaves[1], targets, softcap=softcap).sum().backward()  # type: ignore[operator]
    return tracker.peak.total() - tracker.peak["inputs"]


@pytest.mark.parametrize("shape", [(1000, 64, 3000), (50, 32, 200), (300, 256, 1000), (4000, 16, 300)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_plan_holds_what_the_chunks_hold(
    shape: tuple[int, int, int],
    trained: bool,
    dtype: torch.dtype,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "CPU_TILING", TILE)
    given = problem(*shape, dtype)
    inputs = [given.hidden.requires_grad_(), given.weight.requires_grad_(trained)]
    real = peak(lambda *a, **k: linear_logps(*a, **k, impl="chunked"), inputs, given.targets, softcap)
    planned = peak(lambda *a, **k: planned_linear_logps(*a, **k, tiling=TILE), inputs, given.targets, softcap)
    assert planned == pytest.approx(real, rel=0.1)
