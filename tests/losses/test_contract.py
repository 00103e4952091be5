"""What every objective in `LOSSES` keeps to, with its presets and the options that take another road."""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slimepo.losses import LOSSES, PRESETS, Counts, bind, count, find_objective, step_loss
from slimepo.losses.table import LossFunction
from slimepo.types import LossOutput, PairLogps, SampleLogps
from tests.losses.problems import Logps, random_pairs, random_samples, rows, sides, with_logps


class Case(NamedTuple):
    """An objective as a recipe names it; `one_sided` pairs hold one answer each, `by_token` is of the advantages."""

    name: str
    options: Mapping[str, Any] = {}
    one_sided: bool = False
    divergence: float | None = None
    by_token: bool = False


CASES = [
    *(Case(name) for name in LOSSES),
    *(Case(f"{base}/{preset}") for base, presets in PRESETS.items() for preset in presets),
    Case("slime", {"rejected_mean": "token"}),
    Case("slime", {"length_normalized": False}),
    Case("slime", {"hard_gate": "softplus"}),
    Case("slime", {"hard_gate": "linear"}),
    Case("slime", {"max_slope": 0.05}),
    Case("sft", {"average": "token"}),
    Case("dpo", {"label_smoothing": 0.2}),
    Case("dpo", {"ld_alpha": 0.3}),
    Case("dpo", {"f_divergence": "forward_kl"}),
    Case("dpo", {"f_divergence": "js_divergence"}),
    Case("ipo", {"f_divergence": "alpha_divergence", "f_alpha": 0.3, "ld_alpha": 0.3}),
    Case("robust", {"label_smoothing": 0.2}),
    Case("reward_aware_rpo", {"distance": "forward_kl"}),
    Case("reward_aware_rpo", {"distance": "squared"}),
    Case("alpha_po", {"alpha": -0.5}),
    Case("tpo", {"nll_weight": 0}),
    Case("0.5*dpo+2.0*slime+1.0*sft", {"sft": {"average": "token"}, "dpo": {"beta": 0.3}}),
    Case("ipo", {"length_normalized": False}),
    Case("simpo", {"nll_weight": 0.7}),
    Case("cpo", {"nll_weight": 0}),
    Case("orpo", {"nll_weight": 0}),
    Case("rpo", {"eta": 2}),
    Case("lpo", {"rejected_rate": 3, "hinge_weight": 0}),
    Case("xpo", {"alpha": 0.3}),
    Case("chi_po", {"clip_low": -1.5, "clip_high": 0.5}),
    Case("kto", one_sided=True),
    Case("kto", one_sided=True, divergence=0.8),
    Case("kto", {"desirable_weight": 0.5, "undesirable_weight": 2}, one_sided=True, divergence=-0.8),
    Case("kto", divergence=3.0),
    Case("kto", {"reference_point": False}, one_sided=True),
    Case("grpo", {"kl": 0.3}),
    Case("grpo", {"kl": 0.3, "kl_times_ratio": True}),
    Case("grpo", {"level": "sequence", "kl": 0.3, "kl_times_ratio": True}),
    Case("grpo", {"level": "sequence", "aggregation": "token"}),
    Case("grpo", {"aggregation": "constant", "length": 7}, by_token=True),
    Case("reinforce_pp", {"kl": 0.3}),
    Case("reinforce_pp", by_token=True),
    Case("ppo", {"dual_clip": 1.1}, by_token=True),
]

# Each side's gradient takes the other side for a constant, so it is not the slope of the loss: test_dpo.py proves it
# right in another way, and `test_why_an_objective_is_exempt` that it cannot be proved here.
STOPS_GRADIENTS = {"lpo"}
# A mean over the rejected tokens of each micro-batch, as the authors' code takes it, for comparison only; and ranks
# among the pairs of each micro-batch.
DEPENDS_ON_THE_CUT = {"slime/authors-code", "aot", "aot_unpaired"}


def label(case: Case) -> str:
    parts = [case.name, *(f"{key}={value}" for key, value in case.options.items())]
    parts += [*["one-sided"] * case.one_sided, *["by-token"] * case.by_token]
    return "-".join([*parts, *([str(case.divergence)] * bool(case.divergence))])


def each_case(exempt: Collection[str] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if case.name not in exempt], ids=label)


every_case = each_case()


def policy_of(case: Case, count: int = 8) -> Logps:
    """Log-probs of what the objective reads."""
    if find_objective(case.name).positions is None:
        return random_samples(count)
    return one_sided(random_pairs(count)) if case.one_sided else random_pairs(count)


def one_sided(policy: PairLogps) -> PairLogps:
    """The same rows with one answer each; which one is a matter of the row alone."""
    chosen = policy.chosen[:, :1] > policy.rejected[:, :1]
    return PairLogps(
        policy.chosen, policy.chosen_mask & chosen, policy.rejected, policy.rejected_mask & ~chosen
    )


def beside(case: Case, count: int = 8) -> dict[str, Any]:
    """What an objective may ask for: another model's log-probs as reference, the policy's own of a while ago."""
    generator = torch.Generator().manual_seed(7)
    now = random_samples(count)
    moved = 0.3 * torch.randn(now.logps.shape, generator=generator, dtype=torch.float64)
    shape = now.logps.shape if case.by_token else (count,)
    samples = isinstance(policy_of(case, 1), SampleLogps)
    return {
        "reference": random_samples(count, seed=9) if samples else random_pairs(count, seed=9),
        "behaviour": with_logps(now, now.logps + moved),
        "gold": random_samples(count, seed=5),
        "opponent": torch.eye(2, dtype=torch.float64)[torch.arange(count) % 2],
        "rewards": torch.randn(count, 2, generator=generator, dtype=torch.float64),
        "weight": 1 + torch.rand(count, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(shape, generator=generator, dtype=torch.float64),
        "divergence": torch.tensor(case.divergence or 0.0),
    }


BOUND: dict[str, tuple[LossFunction, tuple[str, ...]]] = {}


def evaluate(case: Case, policy: Logps, **known: Any) -> LossOutput:
    """The objective on some rows, with what it asks for: `known`, or that of `beside`."""
    known = beside(case, len(sides(policy)[0][0])) | known
    key = f"{case.name} {case.options}"
    if key not in BOUND:
        # Once a case: trying an objective out takes longer than calling it.
        BOUND[key] = bind(case.name, case.options), find_objective(case.name, case.options).asks
    function, asks = BOUND[key]
    return function(policy, **{name: known[name] for name in asks})


def alone(case: Case, policy: Logps, **known: Any) -> Tensor:
    """The loss of a step that consists of these rows."""
    return step_loss(evaluate(case, policy, **known), counts_of(policy))


def counts_of(policy: Logps) -> Counts:
    """`count`, with the tokens of the gold answers of `beside`."""
    counts = count(policy)
    gold = random_samples(len(sides(policy)[0][0]), seed=5).mask.sum()
    return counts._replace(tokens={**counts.tokens, "gold": float(gold)})


def cut(known: Mapping[str, Any], index: Tensor | slice) -> dict[str, Any]:
    """What belongs to some of the rows; the divergence is that of the whole step."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index] if value.dim() else value
        return rows(value, index)

    return {name: part(value) for name, value in known.items()}


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return with_logps(value, *(logps.to(dtype) for logps, _ in sides(value)))


def trained(policy: Logps) -> list[Tensor]:
    """The log-probs, of which a gradient is wanted."""
    return [logps.requires_grad_() for logps, _ in sides(policy)]


@every_case
def test_one_loss_and_one_of_each_metric_a_row(case: Case) -> None:
    policy = policy_of(case)
    output = evaluate(case, policy)
    assert output.loss.shape == (8,)
    assert {"logps/sampled" if isinstance(policy, SampleLogps) else "logps/chosen"} <= output.metrics.keys()
    for value in (*output.metrics.values(), *output.token_loss.values()):
        assert value.shape == (8,)
    assert not any(metric.requires_grad for metric in output.metrics.values())


@every_case
def test_a_metric_is_nan_where_its_answer_is_absent_and_nowhere_else(case: Case) -> None:
    policy = policy_of(case)
    if isinstance(policy, SampleLogps):
        policy.mask[::3] = False
    there = [mask.any(-1) for _, mask in sides(policy)]
    if case.one_sided:
        assert 0 < there[0].sum() < 8
    of_side = dict(zip(("chosen", "rejected"), there, strict=False)) if len(there) == 2 else {}
    of_side["gold"] = torch.ones(8, dtype=torch.bool)
    for name, values in evaluate(case, policy).metrics.items():
        all_of_them = torch.stack(there).all(dim=0)
        wanted = of_side.get(name.rpartition("/")[2], all_of_them)
        assert (~values.isnan() == (torch.ones_like(wanted) if name == "z0" else wanted)).all(), name


@each_case(exempt=STOPS_GRADIENTS)
def test_gradcheck(case: Case) -> None:
    policy = policy_of(case, 3)
    assert torch.autograd.gradcheck(lambda *logps: alone(case, with_logps(policy, *logps)), trained(policy))


@every_case
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_masked_entries_reach_neither_value_nor_gradient(case: Case, filler: float) -> None:
    losses = []
    for fill in (0.0, filler):
        policy, known = policy_of(case), beside(case)
        absent = [~mask for _, mask in sides(policy)]
        for given in (policy, known["reference"], known["behaviour"]):
            for (logps, _), nowhere in zip(sides(given), absent, strict=False):
                logps[nowhere] = fill
        if case.by_token:
            known["advantages"][absent[0]] = fill
        trained(policy)
        loss = alone(case, policy, **known)
        loss.backward()
        losses.append(loss.item())
        for values, mask in sides(policy):
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
    ones = torch.ones_like(values[0], dtype=torch.bool)
    policy: Logps
    if isinstance(policy_of(case, 1), SampleLogps):
        policy = SampleLogps(values[0].clone(), ones)
        stakes = torch.tensor([0.0, -1e-7, 1e-7, -1.0, 1.0, 100.0], dtype=dtype).repeat(6**3)
        known = {
            "behaviour": SampleLogps(values[1], ones),
            "reference": SampleLogps(values[2], ones),
            "advantages": stakes[:, None].repeat(1, tokens) if case.by_token else stakes,
        }
    else:
        policy = PairLogps(values[0].clone(), ones, values[1].clone(), ones)
        known = {
            "reference": PairLogps(values[2], ones, values[3], ones),
            "gold": SampleLogps(values[2], ones),
        }
    logps = trained(policy)
    loss = alone(case, policy, **known)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.dtype == dtype
    assert all(torch.isfinite(t.grad).all() for t in logps if t.grad is not None)


@every_case
def test_half_precision_log_probs_are_computed_in_float32(case: Case) -> None:
    policy, known = policy_of(case), beside(case)
    halves = [to_dtype(policy, torch.bfloat16), {k: to_dtype(v, torch.bfloat16) for k, v in known.items()}]
    half = alone(case, halves[0], **halves[1])
    single = alone(
        case,
        to_dtype(halves[0], torch.float32),
        **{k: to_dtype(v, torch.float32) for k, v in halves[1].items()},
    )
    assert half.dtype == torch.float32
    assert half.item() == single.item()


@every_case
def test_permuting_rows_permutes_losses(case: Case) -> None:
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    policy, known = policy_of(case), beside(case)
    straight = evaluate(case, policy, **known)
    shuffled = evaluate(case, rows(policy, order), **cut(known, order))
    # A mean over all tokens is added up in another order.
    digits = 1e-14 if case.name in DEPENDS_ON_THE_CUT else 0
    torch.testing.assert_close(shuffled.loss, straight.loss[order], rtol=digits, atol=0)
    for side, sums in straight.token_loss.items():
        torch.testing.assert_close(shuffled.token_loss[side], sums[order], rtol=digits, atol=0)


@each_case(exempt=DEPENDS_ON_THE_CUT)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_split_into_micro_batches_gives_the_same_step(case: Case, size: int) -> None:
    whole, whole_slope = step_in_parts(case, 8)
    parts, parts_slope = step_in_parts(case, size)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts_slope, whole_slope, rtol=1e-12, atol=1e-15)


def step_in_parts(case: Case, size: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a step of 8 rows, added up over micro-batches of `size`."""
    policy, known = policy_of(case), beside(case)
    counts, logps = counts_of(policy), trained(policy)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, 8, size):
        part = slice(start, start + size)
        total = total + step_loss(evaluate(case, rows(policy, part), **cut(known, part)), counts)
    slopes = torch.autograd.grad(total, logps, allow_unused=True)
    return total.detach(), torch.cat([s.flatten() for s in slopes if s is not None])


@every_case
def test_an_empty_response_is_not_nan(case: Case) -> None:
    policy = policy_of(case, 3)
    for i, (_, mask) in enumerate(sides(policy)):
        mask[[i, 2]] = False
    logps = trained(policy)
    output = evaluate(case, policy)
    assert torch.isfinite(output.loss).all()
    step_loss(output, counts_of(policy)).backward()
    assert all(t.grad is None or torch.isfinite(t.grad).all() for t in logps)


@every_case
def test_the_reference_is_read_where_it_is_asked_for_and_nowhere_else(case: Case) -> None:
    policy = policy_of(case)
    read = alone(case, policy).item() != alone(case, policy, reference=policy).item()
    assert read == ("reference" in find_objective(case.name, case.options).asks)


def test_why_an_objective_is_exempt() -> None:
    policy, lpo = random_pairs(3), Case("lpo")
    inputs = trained(policy)
    assert not torch.autograd.gradcheck(
        lambda *logps: alone(lpo, with_logps(policy, *logps)), inputs, raise_exception=False
    )
    for name in DEPENDS_ON_THE_CUT:
        assert step_in_parts(Case(name), 2)[0].item() != pytest.approx(step_in_parts(Case(name), 8)[0].item())
