"""What every objective in `LOSSES` keeps to."""

import pytest
import torch
from torch import Tensor

from slimepo.losses import LOSSES, Counts, count, find_objective, step_loss
from slimepo.types import LossOutput, PairLogps

OPTIONS = {
    "slime": [{}, {"rejected_mean": "token"}, {"length_normalized": False}],
    "sft": [{}, {"average": "token"}],
}
CASES = [(name, options) for name in LOSSES for options in OPTIONS.get(name, [{}])]
every_objective = pytest.mark.parametrize(("name", "options"), CASES)


def random_pairs(pairs: int = 8, seed: int = 0, scale: float = 3.0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for width in (6, 5):
        lengths = torch.randint(1, width + 1, (pairs, 1), generator=generator)
        mask = torch.arange(width) < lengths
        sides += [-scale * torch.rand(pairs, width, generator=generator, dtype=torch.float64), mask]
    return PairLogps(*sides)


def rows(policy: PairLogps, index: Tensor | slice) -> PairLogps:
    return PairLogps(
        *(getattr(policy, f)[index] for f in ("chosen", "chosen_mask", "rejected", "rejected_mask"))
    )


def evaluate(name: str, options: dict[str, object], policy: PairLogps) -> LossOutput:
    reference = rows(random_pairs(policy.chosen.shape[0], seed=9), slice(None))
    reference = PairLogps(reference.chosen, policy.chosen_mask, reference.rejected, policy.rejected_mask)
    return find_objective(name).function(policy, reference, **options)


@every_objective
def test_one_loss_and_one_of_each_metric_a_pair(name: str, options: dict[str, object]) -> None:
    output = evaluate(name, options, random_pairs())
    assert output.loss.shape == (8,)
    assert {"logps/chosen"} <= output.metrics.keys()
    for value in (*output.metrics.values(), *output.token_loss.values()):
        assert value.shape == (8,)


@every_objective
def test_gradcheck(name: str, options: dict[str, object]) -> None:
    policy = random_pairs(3)

    def total(chosen: Tensor, rejected: Tensor) -> Tensor:
        pairs = PairLogps(chosen, policy.chosen_mask, rejected, policy.rejected_mask)
        return step_loss(evaluate(name, options, pairs), count(pairs))

    assert torch.autograd.gradcheck(total, (policy.chosen.requires_grad_(), policy.rejected.requires_grad_()))


@every_objective
def test_masked_entries_reach_neither_value_nor_gradient(name: str, options: dict[str, object]) -> None:
    clean, poisoned = random_pairs(), random_pairs()
    for policy, filler in ((clean, 0.0), (poisoned, float("nan"))):
        policy.chosen[~policy.chosen_mask] = filler
        policy.rejected[~policy.rejected_mask] = filler
        step_loss(evaluate(name, options, rows(policy, slice(None))), count(policy))
    for policy in (clean, poisoned):
        policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
        loss = step_loss(evaluate(name, options, policy), count(policy))
        loss.backward()
        assert torch.isfinite(loss)
        for values, mask in ((policy.chosen, policy.chosen_mask), (policy.rejected, policy.rejected_mask)):
            if values.grad is not None:
                assert (values.grad[~mask] == 0).all()
                assert torch.isfinite(values.grad).all()
    assert evaluate(name, options, clean).loss.tolist() == evaluate(name, options, poisoned).loss.tolist()


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extreme_log_probs(name: str, options: dict[str, object], dtype: torch.dtype) -> None:
    grid = torch.tensor([0.0, -1e-20, -1.0, -50.0, -1e4], dtype=dtype)
    chosen, rejected = (
        t.reshape(-1, 1).clone().requires_grad_() for t in torch.meshgrid(grid, grid, indexing="ij")
    )
    ones = torch.ones(25, 1, dtype=torch.bool)
    policy = PairLogps(chosen, ones, rejected, ones)
    loss = step_loss(find_objective(name).function(policy, policy, **options), count(policy))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(t.grad).all() for t in (chosen, rejected) if t.grad is not None)


@every_objective
def test_permuting_pairs_permutes_losses(name: str, options: dict[str, object]) -> None:
    policy = random_pairs()
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    function = find_objective(name).function
    straight = function(policy, policy, **options).loss
    shuffled = function(rows(policy, order), rows(policy, order), **options).loss
    torch.testing.assert_close(shuffled, straight[order], rtol=0, atol=0)


@every_objective
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_split_into_micro_batches_gives_the_same_step(
    name: str, options: dict[str, object], size: int
) -> None:
    function = find_objective(name).function
    policy = random_pairs()
    counts: Counts = count(policy)
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    whole = step_loss(function(policy, policy, **options), counts)
    expected = torch.autograd.grad(whole, [policy.chosen, policy.rejected], allow_unused=True)
    parts = []
    for start in range(0, 8, size):
        part = rows(policy, slice(start, start + size))
        parts.append(step_loss(function(part, part, **options), counts))
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    actual = torch.autograd.grad(total, [policy.chosen, policy.rejected], allow_unused=True)
    for a, b in zip(actual, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@every_objective
def test_an_empty_response_is_not_nan(name: str, options: dict[str, object]) -> None:
    policy = random_pairs(2)
    policy.chosen_mask[0] = False
    policy.rejected_mask[1] = False
    assert torch.isfinite(evaluate(name, options, policy).loss).all()
