"""`linear_logps`: every implementation against the specification, and the specification against log_softmax."""

import pytest
import torch
from torch import Tensor

from slimepo.kernels import linear_logps
from slimepo.kernels.chunked import linear_logps_chunked

SHAPES = [(1, 3, 5), (7, 5, 11), (33, 16, 257)]
ADJUSTMENTS = [(None, 1.0), (2.0, 1.0), (None, 0.25), (3.0, 1.7)]


def problem(
    n: int, h: int, v: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((n, h), (v, h), (v,))
    )
    return hidden, weight, torch.randint(0, v, (n,), generator=generator), bias


def test_the_specification_is_log_softmax() -> None:
    hidden, weight, targets, bias = problem(7, 5, 11, torch.float64)
    logits = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0)
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(7), targets]
    actual = linear_logps(hidden, weight, targets, bias, softcap=3.0, scale=0.5, impl="naive")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("softcap", "scale"), ADJUSTMENTS)
@pytest.mark.parametrize(
    "trained", [(True, False, False), (True, True, False), (True, True, True), (False, True, True)]
)
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_chunked_equals_naive_with_every_gradient(
    shape: tuple[int, int, int], softcap: float | None, scale: float, trained: tuple[bool, ...], rows: int
) -> None:
    hidden, weight, targets, bias = problem(*shape, torch.float64)
    upstream = torch.randn(shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for impl in ("naive", "chunked"):
        inputs = [t.clone().requires_grad_(on) for t, on in zip((hidden, weight, bias), trained, strict=True)]
        if impl == "naive":
            logps = linear_logps(
                inputs[0], inputs[1], targets, inputs[2], softcap=softcap, scale=scale, impl="naive"
            )
        else:
            logps = linear_logps_chunked(
                inputs[0], inputs[1], targets, inputs[2], softcap, scale, torch.float64, rows * shape[2]
            )
        logps.backward(upstream)
        results.append([logps, *(t.grad for t in inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_error_is_no_larger_than_the_plain_same_dtype_computation(dtype: torch.dtype, frozen: bool) -> None:
    hidden, weight, targets, _ = problem(65, 48, 1001, dtype)
    upstream = torch.randn(65, generator=torch.Generator().manual_seed(1))

    def run(impl: str, kind: torch.dtype) -> list[Tensor]:
        h, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_(not frozen)
        logps = linear_logps(h, w, targets, impl=impl)  # type: ignore[arg-type]
        logps.backward(upstream.to(logps.dtype))
        return [logps.detach(), h.grad, *([] if frozen else [w.grad])]

    truth = run("naive", torch.float64)
    for exact, plain, ours in zip(truth, run("naive", dtype), run("chunked", dtype), strict=True):
        allowed = (plain.double() - exact).abs().max() * 1.25 + 1e-6 * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


def test_under_autocast_products_run_in_its_dtype_and_the_weight_gradient_stays_float32() -> None:
    hidden, weight, targets, _ = problem(9, 8, 33, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = linear_logps(hidden, weight, targets)
        naive = linear_logps(hidden, weight, targets, impl="naive")
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, naive, rtol=0, atol=1e-6)
    chunked.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_no_row_gives_no_log_prob() -> None:
    hidden, weight, targets, _ = problem(1, 4, 6, torch.float32)
    assert linear_logps(hidden[:0], weight, targets[:0]).shape == (0,)
