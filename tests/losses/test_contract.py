"""What every objective in `LOSSES` keeps to, with its presets and the options that take another road."""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slimepo.losses import LOSSES, PRESETS, bind, count, find_objective, step_loss
from slimepo.types import LossOutput, PairLogps
from tests.losses.problems import FIELDS, random_pairs, rows


class Case(NamedTuple):
    """An objective as a recipe names it; `one_sided` rows hold one answer each."""

    name: str
    options: Mapping[str, Any] = {}
    one_sided: bool = False
    divergence: float | None = None


CASES = [
    *(Case(name) for name in LOSSES),
    *(Case(f"{base}/{preset}") for base, presets in PRESETS.items() for preset in presets),
    Case("slime", {"rejected_mean": "token"}),
    Case("slime", {"length_normalized": False}),
    Case("slime", {"hard_gate": "softplus"}),
    Case("slime", {"hard_gate": "linear"}),
    Case("sft", {"average": "token"}),
    Case("dpo", {"label_smoothing": 0.2}),
    Case("ipo", {"length_normalized": False}),
    Case("simpo", {"nll_weight": 0.7}),
    Case("cpo", {"nll_weight": 0}),
    Case("orpo", {"nll_weight": 0}),
    Case("rpo", {"eta": 2}),
    Case("lpo", {"rejected_rate": 3, "hinge_weight": 0}),
    Case("chi_po", {"clip_low": -1.5, "clip_high": 0.5}),
    Case("kto", one_sided=True),
    Case("kto", one_sided=True, divergence=0.8),
    Case("kto", {"desirable_weight": 0.5, "undesirable_weight": 2}, one_sided=True, divergence=-0.8),
    Case("kto", divergence=3.0),
]

# Each side's gradient takes the other side for a constant, so it is not the slope of the loss: test_dpo.py proves it
# right in another way, and `test_why_an_objective_is_exempt` that it cannot be proved here.
STOPS_GRADIENTS = {"lpo"}
# What the authors' code does, for comparison only: a mean over the rejected tokens of each micro-batch.
DEPENDS_ON_THE_CUT = {"slime/authors-code"}


def label(case: Case) -> str:
    parts = [case.name, *(f"{key}={value}" for key, value in case.options.items())]
    return "-".join(
        [*parts, *["one-sided"] * case.one_sided, *([str(case.divergence)] * bool(case.divergence))]
    )


def each_case(exempt: Collection[str] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if case.name not in exempt], ids=label)


every_case = each_case()


def evaluate(case: Case, policy: PairLogps, reference: PairLogps | None = None) -> LossOutput:
    """The objective on the case's rows, with another model's log-probs as reference."""
    given = policy if not case.one_sided else one_sided(policy)
    reference = reference or rows(random_pairs(len(policy.chosen), seed=9), slice(None))
    function = bind(case.name, case.options)
    beside = {"reference": reference, "divergence": torch.tensor(case.divergence or 0.0)}
    return function(given, **{name: beside[name] for name in find_objective(case.name).asks})


def one_sided(policy: PairLogps) -> PairLogps:
    """The same rows with one answer each; which one is a matter of the row alone, so that it moves with the row."""
    chosen = policy.chosen.detach()[:, :1] > policy.rejected.detach()[:, :1]
    return PairLogps(
        policy.chosen, policy.chosen_mask & chosen, policy.rejected, policy.rejected_mask & ~chosen
    )


def alone(case: Case, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
    """The loss of a step that consists of these rows."""
    given = one_sided(policy) if case.one_sided else policy
    return step_loss(evaluate(case, policy, reference), count(given))


@every_case
def test_one_loss_and_one_of_each_metric_a_pair(case: Case) -> None:
    output = evaluate(case, random_pairs())
    assert output.loss.shape == (8,)
    assert {"logps/chosen"} <= output.metrics.keys()
    for value in (*output.metrics.values(), *output.token_loss.values()):
        assert value.shape == (8,)
    assert not any(metric.requires_grad for metric in output.metrics.values())


@every_case
def test_a_metric_is_nan_where_its_answer_is_absent_and_nowhere_else(case: Case) -> None:
    policy = random_pairs()
    given = one_sided(policy) if case.one_sided else policy
    present = {"chosen": given.chosen_mask.any(-1), "rejected": given.rejected_mask.any(-1)}
    if case.one_sided:
        assert 0 < present["chosen"].sum() < 8
    for name, values in evaluate(case, policy).metrics.items():
        side = name.rpartition("/")[2]
        both = present["chosen"] & present["rejected"]
        wanted = present.get(side, torch.ones(8, dtype=torch.bool) if name == "z0" else both)
        assert (~values.isnan() == wanted).all(), name


@each_case(exempt=STOPS_GRADIENTS)
def test_gradcheck(case: Case) -> None:
    policy = random_pairs(3)

    def total(chosen: Tensor, rejected: Tensor) -> Tensor:
        return alone(case, PairLogps(chosen, policy.chosen_mask, rejected, policy.rejected_mask))

    assert torch.autograd.gradcheck(total, (policy.chosen.requires_grad_(), policy.rejected.requires_grad_()))


@every_case
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_masked_entries_reach_neither_value_nor_gradient(case: Case, filler: float) -> None:
    losses = []
    for fill in (0.0, filler):
        policy, reference = random_pairs(), random_pairs(seed=9)
        for side in ("chosen", "rejected"):
            absent = ~getattr(policy, f"{side}_mask")
            getattr(policy, side)[absent] = fill
            getattr(reference, side)[absent] = fill
        policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
        loss = alone(case, policy, reference)
        loss.backward()
        losses.append(loss.item())
        for values, mask in ((policy.chosen, policy.chosen_mask), (policy.rejected, policy.rejected_mask)):
            if values.grad is not None:
                assert (values.grad[~mask] == 0).all()
                assert torch.isfinite(values.grad).all()
    assert math.isfinite(losses[0])
    assert losses[0] == losses[1]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 3])
def test_finite_at_extreme_log_probs(case: Case, dtype: torch.dtype, tokens: int) -> None:
    # Log-ratios from -1e4 to 1e4 a token, and both models certain, nearly certain or hopeless.
    ends = torch.tensor([0.0, -1e-20, -1e-7, -1.0, -50.0, -1e4], dtype=dtype)
    values = [t.reshape(-1, 1).repeat(1, tokens) for t in torch.meshgrid(*[ends] * 4, indexing="ij")]
    chosen, rejected = (t.clone().requires_grad_() for t in values[:2])
    ones = torch.ones_like(chosen, dtype=torch.bool)
    loss = alone(case, PairLogps(chosen, ones, rejected, ones), PairLogps(values[2], ones, values[3], ones))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.dtype == dtype
    assert all(torch.isfinite(t.grad).all() for t in (chosen, rejected) if t.grad is not None)


@every_case
def test_half_precision_log_probs_are_computed_in_float32(case: Case) -> None:
    halves = [
        PairLogps(*(t.bfloat16() if t.is_floating_point() else t for t in (getattr(p, f) for f in FIELDS)))
        for p in (random_pairs(), random_pairs(seed=9))
    ]
    singles = [
        PairLogps(*(t.float() if t.is_floating_point() else t for t in vars(p).values())) for p in halves
    ]
    half, single = (evaluate(case, *given).loss for given in (halves, singles))
    assert half.dtype == torch.float32
    assert half.tolist() == single.tolist()


@every_case
def test_permuting_pairs_permutes_losses(case: Case) -> None:
    policy, reference = random_pairs(), random_pairs(seed=9)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    straight = evaluate(case, policy, reference).loss
    shuffled = evaluate(case, rows(policy, order), rows(reference, order)).loss
    # A mean over all tokens is added up in another order.
    digits = 1e-14 if case.name in DEPENDS_ON_THE_CUT else 0
    torch.testing.assert_close(shuffled, straight[order], rtol=digits, atol=0)


@each_case(exempt=DEPENDS_ON_THE_CUT)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_split_into_micro_batches_gives_the_same_step(case: Case, size: int) -> None:
    whole, whole_slope = step_in_parts(case, 8)
    parts, parts_slope = step_in_parts(case, size)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts_slope, whole_slope, rtol=1e-12, atol=1e-15)


def step_in_parts(case: Case, size: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a step of 8 pairs, added up over micro-batches of `size`."""
    policy, reference = random_pairs(), random_pairs(seed=9)
    counts = count(one_sided(policy) if case.one_sided else policy)
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, 8, size):
        part = slice(start, start + size)
        total = total + step_loss(evaluate(case, rows(policy, part), rows(reference, part)), counts)
    slopes = torch.autograd.grad(total, [policy.chosen, policy.rejected], allow_unused=True)
    return total.detach(), torch.cat([s.flatten() for s in slopes if s is not None])


@every_case
def test_an_empty_response_is_not_nan(case: Case) -> None:
    policy = random_pairs(3)
    policy.chosen_mask[0] = False
    policy.rejected_mask[1] = False
    policy.chosen_mask[2] = policy.rejected_mask[2] = False
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    output = evaluate(case, policy)
    assert torch.isfinite(output.loss).all()
    step_loss(output, count(policy)).backward()
    assert all(t.grad is None or torch.isfinite(t.grad).all() for t in (policy.chosen, policy.rejected))


@every_case
def test_the_reference_is_read_where_it_is_asked_for_and_nowhere_else(case: Case) -> None:
    policy = random_pairs()
    if "reference" in find_objective(case.name).asks:
        assert evaluate(case, policy).loss.tolist() != evaluate(case, policy, policy).loss.tolist()
    else:
        without = bind(case.name, case.options)(policy)
        assert without.loss.tolist() == evaluate(case, policy).loss.tolist()


def test_why_an_objective_is_exempt() -> None:
    policy = random_pairs(3)

    def total(chosen: Tensor, rejected: Tensor) -> Tensor:
        return alone(Case("lpo"), PairLogps(chosen, policy.chosen_mask, rejected, policy.rejected_mask))

    inputs = (policy.chosen.requires_grad_(), policy.rejected.requires_grad_())
    assert not torch.autograd.gradcheck(total, inputs, raise_exception=False)
    for name in DEPENDS_ON_THE_CUT:
        assert step_in_parts(Case(name), 2)[0].item() != pytest.approx(step_in_parts(Case(name), 8)[0].item())
