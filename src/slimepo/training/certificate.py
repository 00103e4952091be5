"""The certificate: a run's first numbers, computed a second time in the plainest way, before anything is learnt.

A few of the run's first rows go through the run as it is configured: its layout, attention, ranks and wrapper,
activation checkpointing, tiled head. The same rows, those of all ranks together, go through the model's own forward on
one rank: padded, full logits, nothing of this library but the objective. Loss and gradients must agree.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimepo.data.batch import Batch, Step, StepCollator, pair_logps, to_device
from slimepo.data.rows import Row, length
from slimepo.kernels import TokenStats
from slimepo.kernels.naive import gather_logps, stats_of_logits
from slimepo.losses import Objective, step_loss
from slimepo.losses.common import log_ratios
from slimepo.losses.table import LossFunction
from slimepo.model.attention.path import HALF
from slimepo.model.logps import causal_lm, policy_logps, without_router_logits
from slimepo.model.modes import Forward
from slimepo.parallel.agree import of_all_ranks, together
from slimepo.parallel.engines import backward_alone, gathered
from slimepo.training.prepare import sources_of_noise
from slimepo.training.reference import Reference, reference_logps
from slimepo.training.step import (
    OutOfMemory,
    meet_again,
    output_of,
    policy_tokens,
    row_weight,
    step_counts,
    train_step,
)

# Rows of each rank: two in one micro-batch, and one more to accumulate.
ROWS = 3
# How far the loss (from 1 on of itself) and a gradient (of its norm) may be off. In float32 both computations are exact
# to some 1e-6; in half precision each of some hundred operations rounds to 2**-9 of its result, which adds up to a few
# hundredths of a gradient. What has been lost or counted twice is a far larger part of so few rows.
TOLERANCE = {"float32": (1e-4, 1e-3), "half": (0.02, 0.1)}
# Where it adds up to more, each may be off by so many times what the plain computation is in the run's precision; a
# gradient that is off by a third there is rounding, and says nothing of the run.
ROUNDING, BLIND = 3, 1 / 3
_NONE = {"name": "none", "error": 0.0, "tolerance": 1.0, "run": 0.0, "plain": 0.0}


class Certified(Exception):
    """Ends a run that was to be certified alone."""


def certify(
    model: nn.Module,
    policy: nn.Module,
    rows: Sequence[Row],
    spare: Step,
    collator: StepCollator,
    objective: Objective,
    loss: LossFunction,
    reference: Reference | None,
    accelerator: Any,
    *,
    bare: nn.Module | None = None,
    fresh: bool = True,
) -> dict[str, Any]:
    """Compare the run's loss and gradients with the plain ones on some of this rank's `rows`; leaves no trace.

    Every rank must call this. The arguments are those of `train_step`, with the run's collator and `policy`, the model
    without what has been put around it; `bare`: its skeleton, where its weights are in parts. `fresh`: nothing has been
    learnt yet, so that a reference that is the policy at the start can be computed again.

    Returns:
        What was found, the same on every rank: `loss` and `gradients`, of each what the `run` and the `plain`
        computation gave (of a gradient its norm) and how far they are apart (`error`); `tolerance`, `agrees`.
    """
    if accelerator.mixed_precision == "fp16":
        return {"left_out": "the scale of an fp16 loss is found by training alone"}
    started = time.perf_counter()
    mine = chosen_rows(rows, collator, accelerator.process_index, accelerator.num_processes)
    small = replace(collator, micro_batch_size=min(collator.micro_batch_size, ROWS - 1), max_tokens=None)
    tensors = chosen_tensors(policy)
    found: dict[str, Any] = {}
    with undisturbed(policy):
        model.train()
        try:
            with backward_alone(accelerator, tensors) as run:
                done = train_step(model, small(mine), spare, objective, loss, reference, accelerator)
        except OutOfMemory:
            # The step that follows is cut smaller, row by row if it must be.
            if isinstance(model, DistributedDataParallel):
                meet_again(model, spare["batches"][0], accelerator)
            model.zero_grad(set_to_none=True)
            return {"left_out": "there is no room for two rows at once"}
        if not done.batches:
            return {"left_out": "no row has anything to learn from", "rows": 0}
        value = float(accelerator.reduce(done.loss, "sum")) / accelerator.num_processes
        for parameter in policy.parameters():
            parameter.grad = None
        everyone = [row for of_rank in of_all_ranks(mine) for row in of_rank]
        norms = of_all_ranks({name: _norm(gradient) for name, gradient in run.items()})
        whole = gathered(policy, bare, keep=accelerator.is_main_process)
        # The others wait: what one rank has lost, one process has not.
        with together():
            if accelerator.is_main_process:
                plainly = reference and _plain_reference(reference.seen_by(whole), fresh)
                leaves = {name: p for name, p in whole.named_parameters() if name in tensors}
                plain = functools.partial(
                    plain_step, whole, everyone, leaves, collator, objective, loss, plainly
                )
                half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
                found = beside(
                    plain,
                    whole,
                    (value, run),
                    norms,
                    _precision(policy, accelerator),
                    accelerator.device,
                    half,
                )
    (found,) = (each for each in of_all_ranks(found) if each)
    about = {"rows": len(everyone), "ranks": accelerator.num_processes, "layout": collator.layout}
    return {**found, **about, "seconds": round(time.perf_counter() - started, 2)}


def beside(
    plain: Callable[[], tuple[list[float], dict[str, Tensor]]],
    model: nn.Module,
    run: tuple[float, Mapping[str, Tensor | None]],
    norms: Sequence[Mapping[str, float]],
    precision: str,
    device: torch.device,
    half: torch.dtype | None = None,
) -> dict[str, Any]:
    """`compared` with what `plain` computes on `model`; where they differ, with what rounding does to it in view.

    half: the dtype of autocast that the run computes under.
    """
    try:
        if next(model.parameters()).device != device:
            # Put together from its parts in CPU memory.
            model.to(device)
        with _computing_in(None, model):
            of_rows, gradients = plain()
        truth = sum(of_rows), gradients
        found = compared(run, truth, norms, precision)
        if found.get("agrees", True):
            return found
        # In the run's precision, and with attention written out in place of a fused kernel, plain differs from plain: a
        # model that is far gone (attention that is all on one token) has gradients that are little else. Of so few rows
        # one try may be right by chance: the worse of two counts.
        again = []
        for attention in (nullcontext(), _eager_attention(model)):
            with attention, _computing_in(half, model):
                again.append(plain())
    except torch.OutOfMemoryError:
        return {"left_out": "the plain computation does not fit on this device"}
    rounding, of_loss = dict.fromkeys(truth[1], 0.0), 0.0
    for of_rows_again, gradients in again:
        norms_again = [{name: _norm(gradient) for name, gradient in gradients.items()}]
        apart = compared((sum(of_rows_again), gradients), truth, norms_again, precision)
        if "left_out" in apart:
            return found
        for each in apart["gradients"]:
            rounding[each["name"]] = max(rounding[each["name"]], each["error"])
        # Errors of rows may cancel by chance: they are added up.
        errors = sum(abs(one - other) for one, other in zip(of_rows, of_rows_again, strict=True))
        of_loss = max(of_loss, errors / max(abs(truth[0]), 1.0))
    return compared(run, truth, norms, precision, rounding, of_loss)


def chosen_rows(rows: Sequence[Row], collator: StepCollator, rank: int = 0, ranks: int = 1) -> list[Row]:
    """The shortest of a rank's rows that count. The last of several ranks has one less, and so a micro-batch less."""
    count = ROWS - 1 if ranks > 1 and rank == ranks - 1 else ROWS
    return sorted(rows, key=lambda row: (not row.values.get("weight", 1), length(row, collator.positions)))[
        :count
    ]


def chosen_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Some of the matrices that train, by name: embeddings, head, and of the others the first, middle and last two.

    Two, so that of an adapter's pair of matrices both are there: the gradient of one is 0 at the start.
    """
    inner = causal_lm(model)
    ends = {
        id(parameter)
        for end in (inner.get_input_embeddings(), inner.get_output_embeddings())
        for parameter in end.parameters()
    }
    # ZeRO-3 keeps a matrix as a part of a row, and its shape beside it.
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    }
    between = [name for name, parameter in trained.items() if id(parameter) not in ends]
    middle = len(between) // 2
    left_out = {*between} - {*between[:2], *between[middle : middle + 2], *between[-2:]}
    return {name: parameter for name, parameter in trained.items() if name not in left_out}


def plain_step(
    model: nn.Module,
    rows: Sequence[Row],
    tensors: Mapping[str, nn.Parameter],
    collator: StepCollator,
    objective: Objective,
    loss: LossFunction,
    reference: Reference | None,
) -> tuple[list[float], dict[str, Tensor]]:
    """What each row adds to the loss of one step on `rows`, and its gradients, by the model's own logits."""
    model.eval()
    padded = replace(collator, layout="padded", micro_batch_size=1, max_tokens=None)
    if reference is not None and not reference.cached:
        # To be computed again.
        rows = [
            replace(row, values={k: v for k, v in row.values.items() if k != "reference"}) for row in rows
        ]
    step = to_device(padded(rows), next(iter(model.parameters())).device)
    forward = functools.partial(own_logps, model)
    counts = step_counts(step["batches"], objective)
    references: Sequence[Tensor | None] = [None] * len(step["batches"])
    divergence = None
    if reference is not None and {"reference", "divergence"} & set(objective.asks):
        references = reference_logps(reference, step["batches"])
        if "divergence" in objective.asks:
            divergence = _divergence(forward, reference, step["mismatched"])
    values, gradients = [], {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for batch, known in zip(step["batches"], references, strict=True):
        output = output_of(
            objective, loss, policy_tokens(forward, batch, objective), batch, known, divergence
        )
        value = step_loss(output, counts, row_weight(objective, batch))
        found = torch.autograd.grad(value, [*tensors.values()], allow_unused=True)
        for gradient, part in zip(gradients.values(), found, strict=True):
            if part is not None:
                gradient += part
        values.append(value.item())
    return values, gradients


def own_logps(
    model: nn.Module, *, input_ids: Tensor, predict_at: Tensor, targets: Tensor, stats: bool = False
) -> Tensor | TokenStats:
    """Log-probs `[N]` of the targets from the model's own forward and all of its logits, without anything of ours."""
    inner: Any = causal_lm(model)
    with without_router_logits(inner):
        logits = type(inner).forward(inner, input_ids=input_ids, use_cache=False).logits
    selected_NV = logits.flatten(0, 1)[predict_at]
    selected_NV = selected_NV if selected_NV.dtype == torch.float64 else selected_NV.float()
    logps_N = gather_logps(selected_NV, targets)
    return TokenStats(logps_N, *stats_of_logits(selected_NV, targets, None, 1.0)) if stats else logps_N


def compared(
    run: tuple[float, Mapping[str, Tensor | None]],
    plain: tuple[float, Mapping[str, Tensor]],
    norms: Sequence[Mapping[str, float]],
    precision: str,
    rounding: Mapping[str, float] | None = None,
    loss_rounding: float = 0.0,
) -> dict[str, Any]:
    """Loss and gradients of the run beside the plain ones; `norms` are those of the run's gradients on each rank.

    rounding, loss_rounding: how far the plain ones are off in the run's precision, where that was looked at.
    """
    if not all(map(math.isfinite, [plain[0], *map(_norm, plain[1].values())])):
        # The step that follows names the rows.
        return {"left_out": "the plain loss, or a gradient of it, is not finite either"}
    of_loss, of_gradients = TOLERANCE[precision]
    of_loss = max(of_loss, ROUNDING * loss_rounding)
    largest = max((_norm(gradient) for gradient in plain[1].values()), default=0.0)
    gradients: list[dict[str, Any]] = []
    left_out = []
    for name, expected in plain[1].items():
        own_error, given = (rounding or {}).get(name, 0.0), run[1][name]
        if not own_error <= BLIND and math.isfinite(_norm(given)):
            left_out.append(name)
            continue
        apart = _norm(expected if given is None else given.to(expected.dtype) - expected)
        others = max(abs(of_rank[name] - norms[0][name]) for of_rank in norms)
        # What is next to nothing beside the other gradients is rounding.
        size = max(_norm(expected), 1e-5 * largest)
        error = max(apart, others) / size if size else 0.0 if apart + others == 0 else math.inf
        gradients.append(
            {
                "name": name, "run": norms[0][name], "plain": _norm(expected), "error": error,
                "tolerance": max(of_gradients, ROUNDING * own_error),
            }
        )  # fmt: skip
    if left_out and not gradients:
        return {"left_out": f"all {len(left_out)} gradients that are compared are rounding in this precision"}
    error = abs(run[0] - plain[0]) / max(abs(plain[0]), 1.0)
    # A comparison with NaN is false.
    agrees = error <= of_loss and all(each["error"] <= each["tolerance"] for each in gradients)
    return {
        "loss": {"run": run[0], "plain": plain[0], "error": error},
        "gradients": gradients,
        "precision": precision,
        "tolerance": {"loss": of_loss, "gradients": of_gradients},
        "agrees": agrees,
        **({} if rounding is None else {"rounding": left_out}),
    }


def in_words(found: Mapping[str, Any]) -> str:
    """A certificate in one line."""
    if "left_out" in found:
        return f"certificate: left out, for {found['left_out']}"
    loss = found["loss"]
    worst = max(found["gradients"], key=lambda each: each["error"] / each["tolerance"], default=_NONE)
    same = "=" if found["precision"] == "float32" else "≈"
    values = f"loss {loss['run']:.8g} {same if found['agrees'] else 'against'} {loss['plain']:.8g}"
    if found["agrees"]:
        agree = f"gradients of {len(found['gradients'])} tensors agree to {worst['error']:.0e}"
        rounding = f"; {len(found['rounding'])} more are rounding" if found.get("rounding") else ""
        return f"certificate: {values}, {agree}{rounding}"
    return (
        f"this run does not compute what it should: {values}, and the gradient of {worst['name']} (norm "
        f"{worst['run']:.6g}) is off by {worst['error']:.2g} of the plain one's {worst['plain']:.6g}. Look for what is "
        "wrong with layout: padded, attention, activation_checkpointing, or one rank; --no-certificate (args: "
        "{certificate: false}) trains all the same"
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is drawn at random; behind it the model and the random generators are as they were before."""
    training = [(module, module.training) for module in model.modules()]
    noise = [(source, name, getattr(source, name)) for source, name in sources_of_noise(causal_lm(model))]
    for source, name, _ in noise:
        setattr(source, name, 0.0)
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        for source, name, before in noise:
            setattr(source, name, before)
        for module, was in training:
            module.training = was


def _plain_reference(reference: Reference, fresh: bool) -> Reference:
    """The reference by its own logits; as it was computed beforehand where its model has changed since."""

    @contextmanager
    def forward() -> Iterator[Forward]:
        with reference.forward():
            yield functools.partial(own_logps, reference.model)

    return replace(
        reference, forward=forward, cached=not fresh and reference.cached and not reference.without_adapters
    )


@torch.no_grad()
def _divergence(forward: Forward, reference: Reference, batches: Sequence[Batch]) -> Tensor:
    """The mean log-ratio to the reference of answers to other prompts, a scalar in nats."""
    pairs = zip(batches, reference_logps(reference, batches), strict=True)
    ratios = [
        log_ratios(policy_logps(forward, batch), pair_logps(known, batch)).chosen for batch, known in pairs
    ]
    return torch.cat(ratios).mean() if ratios else torch.zeros(())


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention written out, in place of the fused kernels."""
    inner = causal_lm(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@contextmanager
def _computing_in(dtype: torch.dtype | None, model: nn.Module) -> Iterator[None]:
    """Under autocast to `dtype`; without one in float32 where the weights are, else in their dtype."""
    halves = [parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF]
    dtype = dtype or (halves[0] if halves else None)
    device = next(iter(model.parameters())).device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        yield


def _precision(model: nn.Module, accelerator: Any) -> str:
    """What the run computes in: a key of TOLERANCE."""
    if accelerator.mixed_precision != "no" or any(p.dtype in HALF for p in model.parameters()):
        return "half"
    # TensorFloat-32 has about as many digits as float16.
    return (
        "half" if accelerator.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "float32"
    )


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.double().norm())
