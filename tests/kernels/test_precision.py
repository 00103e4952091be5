"""The kernel rule: no larger an error against the truth than the plain computation in the same dtype has."""

import pytest
import torch
from torch import Tensor

from slimepo.kernels import linear_logps
from slimepo.kernels.products import linear, product
from tests.kernels.problems import PLACES, Problem, gradients, problem

# Room beyond the plain computation's largest error: other orders of summation round otherwise.
FACTOR = 1.25
# And, relative to the largest true value, a few roundings of float32.
FLOOR = 1e-6


def largest_error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth.double()).abs().max().item()


def obeys_the_rule(
    given: Problem, impl: str, trained: tuple[bool, ...], softcap: float | None = None
) -> None:
    dtype = given.hidden.dtype
    truth, true_gradients = gradients(given, "naive", trained, torch.float64, softcap=softcap)
    plain, plain_gradients = gradients(given, "naive", trained, softcap=softcap)
    ours, our_gradients = gradients(given, impl, trained, softcap=softcap)
    names = ("logps", "entropy", "collision", "hidden", "weight", "bias")
    columns = zip(
        names,
        (truth.logps, truth.entropy, truth.collision, *true_gradients),
        (plain.logps, plain.entropy, plain.collision, *plain_gradients),
        (ours.logps, ours.entropy, ours.collision, *our_gradients),
        strict=True,
    )
    for name, exact, usual, fused in columns:
        if exact is None or usual is None or fused is None:
            continue
        assert fused.dtype == (torch.float32 if name in ("logps", "entropy", "collision") else dtype)
        allowed = FACTOR * largest_error(usual, exact) + FLOOR * exact.abs().max().item()
        assert largest_error(fused, exact) <= allowed, name


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_no_larger_an_error_than_the_plain_computation(
    impl: str, device: str, dtype: torch.dtype, trained: tuple[bool, ...], poisoned: None
) -> None:
    """More tokens and a larger vocabulary than a tile has on a CPU, an odd width."""
    interpreted = impl == "triton" and device == "cpu"  # a program a row, in Python
    obeys_the_rule(problem(40 if interpreted else 600, 47, 1501, dtype, device), impl, trained)


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_with_a_soft_cap(impl: str, device: str, dtype: torch.dtype, trained: tuple[bool, ...]) -> None:
    obeys_the_rule(problem(40, 33, 1201, dtype, device), impl, trained, softcap=30.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_where_the_model_is_nearly_sure(dtype: torch.dtype, trained: tuple[bool, ...]) -> None:
    """1 - p of a target with p near 1 keeps its digits, although p itself has few in bfloat16."""
    given = problem(64, 33, 501, dtype, spread=4.0)
    logits = given.hidden.double() @ given.weight.double().T + given.bias.double()
    sure = given._replace(targets=logits.argmax(dim=-1))
    assert logits.softmax(dim=-1).amax(dim=-1).median() > 0.95
    obeys_the_rule(sure, "chunked", trained)


def test_extreme_logits_stay_finite() -> None:
    given = problem(40, 16, 300, torch.float32, spread=1e4)
    for trained in ((True, False, False), (True, True, True)):
        stats, found = gradients(given, "chunked", trained)
        for tensor in (stats.logps, stats.entropy, stats.collision, *found):
            assert tensor is None or tensor.isfinite().all()
        assert (stats.logps <= 0).all()


def test_under_autocast_products_run_in_its_dtype_and_the_weight_gradient_stays_float32() -> None:
    hidden, weight, targets, _, _ = problem(9, 8, 33, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = linear_logps(hidden, weight, targets)
        naive = linear_logps(hidden, weight, targets, impl="naive")
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, naive, rtol=0, atol=1e-5)
    (fused,) = torch.autograd.grad(chunked.sum(), weight)
    (plain,) = torch.autograd.grad(naive.sum(), weight)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=0, atol=0.05 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (5, 7, 3), (64, 33, 130), (0, 4, 5)])
def test_products_are_products_whatever_the_strides(dtype: torch.dtype, n: int, k: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((n, k), (k, m), (m,))
    )
    tolerance = {"rtol": 0.0, "atol": 0.2 if dtype == torch.bfloat16 else 1e-4}
    exact = left.double() @ right.double()
    for a, b in ((left, right), (left.T.contiguous().T, right.T.contiguous().T)):
        torch.testing.assert_close(product(a, b).double(), exact, **tolerance)
        torch.testing.assert_close(linear(a, b.T, bias).double(), exact + bias.double(), **tolerance)
