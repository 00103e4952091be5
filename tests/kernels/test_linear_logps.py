"""`linear_logps`: every implementation against the specification, and the specification against log_softmax."""

import itertools
import logging

import pytest
import torch
from torch import Tensor

from slimepo import kernels
from slimepo.errors import InputError
from slimepo.kernels import linear_logps, linear_logps_stats
from slimepo.kernels.sweep import Tiling, parts
from tests.kernels.problems import PLACES, gradients, problem

# A single row, fewer tokens than a tile, an odd width, vocabularies that no tile divides.
SHAPES = [(1, 3, 5), (7, 5, 11), (33, 16, 257)]
ADJUSTMENTS = [(None, 1.0), (2.0, 1.0), (None, 0.25), (3.0, 1.7)]
TRAINED = [
    (True, False, False),
    (True, True, False),
    (True, True, True),
    (False, True, True),
    (False, True, False),
    (False, False, True),
]
TILINGS = [Tiling(1, 1, 0), Tiling(4, 3, 30), Tiling(8, 100, 0), Tiling(1000, 1000, 10**6)]

# Each value of one factor meets each value of every other: 24 cases in place of 288.
GRID = [
    (SHAPES[(i - j) % 3], ADJUSTMENTS[(i + j) % 4], trained, tiling)
    for i, trained in enumerate(TRAINED)
    for j, tiling in enumerate(TILINGS)
]


def use(tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_TILING", tiling)
    monkeypatch.setattr(kernels, "GPU_TILING", tiling)


def test_the_specification_is_log_softmax() -> None:
    hidden, weight, targets, bias, _ = problem(7, 5, 11, torch.float64)
    distribution = torch.log_softmax(3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0), dim=-1)
    actual = linear_logps_stats(hidden, weight, targets, bias, softcap=3.0, scale=0.5, impl="naive")
    torch.testing.assert_close(actual.logps, distribution[torch.arange(7), targets], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        actual.entropy, -(distribution.exp() * distribution).sum(dim=-1), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(actual.top1, distribution.argmax(dim=-1) == targets)
    torch.testing.assert_close(
        actual.collision, distribution.exp().square().sum(dim=-1).log(), rtol=1e-12, atol=1e-12
    )


def test_the_grid_holds_every_pair_of_values() -> None:
    factors = (SHAPES, ADJUSTMENTS, TRAINED, TILINGS)
    for (one, values), (other, values_there) in itertools.combinations(enumerate(factors), 2):
        assert {(case[one], case[other]) for case in GRID} == set(itertools.product(values, values_there))


@pytest.mark.parametrize(("shape", "adjustment", "trained", "tiling"), GRID)
def test_tiles_of_any_size_make_the_specification_with_every_gradient(
    shape: tuple[int, int, int],
    adjustment: tuple[float | None, float],
    trained: tuple[bool, ...],
    tiling: Tiling,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
) -> None:
    # A tile of one logit is for small problems: it takes a Python loop over each.
    if tiling.rows * tiling.columns == 1 and shape[0] * shape[2] > 100:
        tiling = Tiling(16, 64, 1000)
    use(tiling, monkeypatch)
    check(shape, "chunked", "cpu", trained, *adjustment)


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_every_implementation_equals_the_specification(
    impl: str,
    device: str,
    shape: tuple[int, int, int],
    trained: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
) -> None:
    use(Tiling(20, 100, 0), monkeypatch)
    check(shape, impl, device, trained, 3.0, 1.7)
    check(shape, impl, device, trained, None, 1.0)


def check(
    shape: tuple[int, int, int],
    impl: str,
    device: str,
    trained: tuple[bool, ...],
    softcap: float | None,
    scale: float,
) -> None:
    given = problem(*shape, torch.float64, device)
    expected, expected_gradients = gradients(given, "naive", trained, softcap=softcap, scale=scale)
    actual, actual_gradients = gradients(given, impl, trained, softcap=softcap, scale=scale)
    assert torch.equal(actual.top1, expected.top1)
    for ours, theirs in zip(
        (actual.logps, actual.entropy, actual.collision, *actual_gradients),
        (expected.logps, expected.entropy, expected.collision, *expected_gradients),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_gradients_are_those_of_finite_differences(
    impl: str, device: str, trained: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Tiling(2, 4, 10), monkeypatch)
    given = problem(3, 2, 7, torch.float64, device)
    leaves = [
        t.requires_grad_(on) for t, on in zip((given.hidden, given.weight, given.bias), trained, strict=True)
    ]

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        settings = {"softcap": 3.0, "scale": 1.7, "impl": impl}
        return linear_logps(hidden, weight, given.targets, bias, **settings)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(logps, leaves)


@pytest.mark.parametrize(("impl", "device"), PLACES)
def test_no_row_gives_no_log_prob_and_no_gradient(impl: str, device: str) -> None:
    given = problem(1, 4, 6, torch.float32, device)
    hidden, weight = given.hidden[:0].requires_grad_(), given.weight.requires_grad_()
    stats = linear_logps_stats(hidden, weight, given.targets[:0], impl=impl)  # type: ignore[arg-type]
    assert [t.shape for t in stats] == [(0,)] * 4
    stats.logps.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize(("impl", "device"), PLACES)
def test_tokens_that_a_bias_rules_out_change_nothing(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabularies padded with a bias of -inf: whole tiles may have no probability at all."""
    use(Tiling(4, 5, 0), monkeypatch)
    hidden, weight, targets, bias, _ = problem(9, 4, 23, torch.float32, device)
    allowed = slice(10, 23)
    bias[:10] = -torch.inf
    hidden.requires_grad_()
    actual = linear_logps_stats(hidden, weight, targets % 13 + 10, bias, impl=impl)  # type: ignore[arg-type]
    expected = linear_logps_stats(hidden, weight[allowed], targets % 13, bias[allowed], impl="naive")
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(actual.logps.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.logps.sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one uses up the logits kept from the forward pass; the second computes them again."""
    use(Tiling(4, 10, 100), monkeypatch)
    hidden, weight, targets, _, _ = problem(9, 8, 33, torch.float64)
    weight.requires_grad_()
    logps = linear_logps(hidden, weight, targets)
    (first,) = torch.autograd.grad(logps.sum(), weight, retain_graph=True)
    (second,) = torch.autograd.grad(logps.sum(), weight)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_stretches_are_nearly_equal() -> None:
    assert [part.stop - part.start for part in parts(1025, 512)] == [342, 342, 341]
    assert parts(0, 512) == []


def test_a_target_outside_the_vocabulary_is_named() -> None:
    hidden, weight, targets, _, _ = problem(3, 4, 6, torch.float32)
    for wrong in (-100, 6):
        targets[1] = wrong
        with pytest.raises(InputError, match=f"target {wrong} is outside the vocabulary of 6 tokens"):
            linear_logps(hidden, weight, targets)


def test_what_cannot_be_computed_is_refused() -> None:
    hidden, weight, targets, _, _ = problem(3, 4, 6, torch.float32)
    with pytest.raises(InputError, match="scale must be positive, not -1"):
        linear_logps(hidden, weight, targets, scale=-1.0)
    with pytest.raises(InputError, match="'fast' is not one of auto, naive, chunked, triton"):
        linear_logps(hidden, weight, targets, impl="fast")  # type: ignore[arg-type]


def test_triton_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _, _ = problem(3, 4, 6, torch.float32)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="needs the triton package"):
        linear_logps(hidden, weight, targets, impl="triton")


def test_the_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    hidden, weight, targets, _, _ = problem(3, 4, 6, torch.float32)
    kernels._automatic.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="slimepo.kernels"):
        for _ in range(2):
            linear_logps(hidden, weight, targets)
    assert [record.getMessage() for record in caplog.records] == ["linear_logps on cpu: impl=chunked"]
