"""One optimizer step: its micro-batches through the model and the objective, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimepo.data.batch import Batch, Step, last_response, pair_logps, sample_logps, to_device
from slimepo.data.rows import SIDES
from slimepo.errors import InputError
from slimepo.kernels import TokenStats
from slimepo.losses import Counts, Objective, step_loss
from slimepo.losses.common import log_ratios
from slimepo.losses.table import LossFunction
from slimepo.model.logps import balance_of, policy_logps, response_logps, token_stats
from slimepo.model.modes import Forward, scoring
from slimepo.parallel.agree import any_rank
from slimepo.parallel.engines import precision, shards
from slimepo.training.reference import Reference, reference_logps
from slimepo.types import LossOutput, SampleLogps
from slimepo.words import first_line


class OutOfMemory(RuntimeError):
    """A micro-batch was too large on one of the ranks; no weight has changed, and all of them raise this."""


class Done(NamedTuple):
    """A step that has been taken: its loss, and the objective's outputs by micro-batch (this rank's part).

    Of the batches the first so many are `counted`; what is behind them kept other ranks company. `balances` are the
    balance losses of the model's experts, where they are a part of the loss.
    """

    loss: Tensor
    batches: list[Batch]
    outputs: list[LossOutput]
    counted: int
    balances: list[Tensor]


def train_step(
    model: nn.Module,
    step: Step,
    spare: Step,
    objective: Objective,
    loss: LossFunction,
    reference: Reference | None,
    accelerator: Any,
    balance: float = 0.0,
) -> Done:
    """Forward and backward of one optimizer step.

    The loss of a step is the weighted mean of the rows' losses over the global batch, all micro-batches m on all
    ranks k. With W the sum of all weights, counted over all ranks before anything is computed::

        L = sum_k L_k,    L_k = sum_m (1 / W) sum_i w_i L_i

    (and likewise for what is averaged over tokens). Each micro-batch is sent backward with its own term of L_k, so
    that how rows are shared out over micro-batches and ranks changes nothing. Ranks' gradients are averaged by DDP and
    their losses by the Trainer, so both are multiplied by the number of ranks here. What a rank does to keep others
    company counts 0 times (`evened`).

    `balance`: what the balance loss of a mixture of experts is multiplied by. It is computed by micro-batch, as
    transformers does, and a micro-batch counts by its share of the step's tokens.
    """
    counts = step_counts(step["batches"], objective, accelerator)
    if not counts.rows and accelerator.scaler is None:
        # No rank has anything to learn from. Without gradients the optimizer leaves the weights as they are; with those
        # of a loss of 0 its momentum would still move them. (fp16's scaler wants gradients.)
        return Done(torch.zeros((), device=accelerator.device), [], [], 0, [])
    counted = {what: len(step[what]) for what in ("batches", "mismatched")}
    step = to_device(evened(step, spare, accelerator), accelerator.device)
    batches = step["batches"]
    references, divergence = beside_the_policy(
        model, step, objective, reference, accelerator, counted["mismatched"]
    )
    losses, outputs, balances = [], [], []
    if balance:
        tokens = float(sum(batch["real_tokens"] for batch in batches[: counted["batches"]]))
        balance /= max(accelerator.reduce(torch.tensor(tokens, device=accelerator.device), "sum").item(), 1.0)
    # fp16's scaler multiplies the loss that is sent backward, which the balance loss is not a part of.
    scaled = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
    for i, (batch, known) in enumerate(zip(batches, references, strict=True)):
        last = i == len(batches) - 1
        scale = accelerator.num_processes if i < counted["batches"] else 0
        # DDP averages gradients over ranks once, with the last micro-batch. In parts they are averaged with each: put
        # off, every rank would hold all of them meanwhile.
        accelerator.gradient_state._set_sync_gradients(last)
        # Where ranks wait for each other in the backward pass, all of them must come as far.
        meets = accelerator.num_processes > 1 and (last or shards(accelerator))
        share = balance * batch["real_tokens"] * scale
        too_large = ""
        with nullcontext() if last or shards(accelerator) else accelerator.no_sync(model):
            try:
                with precision(accelerator):
                    logps = policy_tokens(model, batch, objective, share * scaled if balance else None)
                output = output_of(objective, loss, logps, batch, known, divergence)
                value = step_loss(output, counts, row_weight(objective, batch)) * scale
                if not meets:
                    accelerator.backward(value)
            except (RuntimeError, MemoryError) as error:
                if shards(accelerator) or not is_out_of_memory(error):
                    raise
                too_large = first_line(error)
            if (meets or too_large) and any_rank(bool(too_large)):
                # Not within the handler: its error holds on to all that was computed.
                raise OutOfMemory(too_large or "on another rank")
            if meets:
                accelerator.backward(value)
        if balance:
            balances.append(balance_of(accelerator.unwrap_model(model)))
        losses.append(value.detach() + (share * balances[-1] if balance else 0.0))
        outputs.append(output)
    return Done(torch.stack(losses).sum(), batches, outputs, counted["batches"], balances)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help: the device, or the CPU, had no room for what was asked."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)


def meet_again(model: DistributedDataParallel, batch: Batch, accelerator: Any) -> None:
    """Have DDP's ranks end a pass together, of one small batch, where they have left a step at different places.

    Which numbers ranks exchange in a pass hangs on how the last one ended. The gradients are of no use.
    """
    model.require_forward_param_sync = True
    accelerator.gradient_state._set_sync_gradients(True)
    with precision(accelerator):
        logps = response_logps(model, to_device(batch, accelerator.device))
    accelerator.backward(0 * logps.sum())


def evened(step: Step, spare: Step, accelerator: Any) -> Step:
    """The step with batches at its end that count 0 times, so that ranks that wait for each other take as many passes.

    With DDP a rank without rows alone needs one, from `spare`: gradients meet once a step. Where weights or gradients
    are in parts every pass is one of all ranks.
    """
    if not shards(accelerator):
        return step if step["batches"] else spare
    count = torch.tensor([len(step["batches"]), len(step["mismatched"])], device=accelerator.device)
    batches, mismatched = accelerator.gather(count[None]).amax(dim=0).tolist()

    def filled(own: list[Batch], others: list[Batch], most: int) -> list[Batch]:
        return [*own, *[(own or others)[0] for _ in range(most - len(own))]]

    return {
        "batches": filled(step["batches"], spare["batches"], batches),
        "mismatched": filled(step["mismatched"], spare["mismatched"], mismatched),
        "rows": step["rows"],
    }


def beside_the_policy(
    model: nn.Module,
    step: Step,
    objective: Objective,
    reference: Reference | None,
    accelerator: Any,
    counted: int | None = None,
) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """Reference log-probs `[N]` of each micro-batch and the divergence of the step, in the precision of training.

    None where the objective does not ask: switching a large model between its modes takes time. Every rank must call
    this; of the answers to other prompts the first `counted` batches make the divergence, or all.
    """
    if reference is None or not {"reference", "divergence"} & set(objective.asks):
        return [None] * len(step["batches"]), None
    with precision(accelerator):
        divergence = None
        if "divergence" in objective.asks:
            # Ranks are not averaged over here: the model inside the wrapper of DDP.
            with scoring(accelerator.unwrap_model(model), own_precision=False) as forward:
                divergence = mean_log_ratio(forward, reference, step["mismatched"], accelerator, counted)
        return reference_logps(reference, step["batches"]), divergence


def policy_tokens(
    forward: Callable[..., Any], batch: Batch, objective: Objective, balance: float | None = None
) -> Tensor | TokenStats:
    """What the policy says of the batch's response tokens: their log-probs `[N]`, or more where the objective asks."""
    return (token_stats if "collision" in objective.asks else response_logps)(forward, batch, balance)


def output_of(
    objective: Objective,
    loss: LossFunction,
    policy: Tensor | TokenStats,
    batch: Batch,
    reference: Tensor | None,
    divergence: Tensor | None,
) -> LossOutput:
    """The objective on a batch of whose response tokens this is what `policy_tokens` gives, with all that it asks for.

    Log-probs of `behaviour` that the rows do not bring are those of the policy: it is what has sampled them.

    Raises:
        InputError: the rows lack a value that the objective asks for.
    """
    view = pair_logps if objective.positions else sample_logps
    logps = policy.logps if isinstance(policy, TokenStats) else policy
    tokens = {"behaviour": logps.detach(), **batch["token_values"]}
    if reference is not None:
        tokens["reference"] = reference
    if isinstance(policy, TokenStats):
        tokens["collision"] = policy.collision
    given: dict[str, Any] = {}
    for name in objective.asks:
        if name == "divergence":
            given[name] = divergence
        elif name == "gold":
            given[name] = last_response(logps, batch)
        elif name in tokens:
            found = view(tokens[name], batch)
            given[name] = found.logps if isinstance(found, SampleLogps) and name == "advantages" else found
        elif name in batch["values"]:
            value = batch["values"][name]
            given[name] = value if objective.positions else _of_responses(value, batch)
        else:
            raise InputError(f"row {batch['row_ids'][0]} has no value {name!r}, and this loss asks for it")
    return loss(view(logps, batch), **given)


def _of_responses(value: Tensor, batch: Batch) -> Tensor:
    """A number of each row, or of each of its responses, as one of every sample: position after position."""
    wide = value if value.dim() == 2 else value[:, None].expand(-1, len(batch["positions"]))
    return wide.T.flatten()


def row_weight(objective: Objective, batch: Batch) -> Tensor | None:
    """How much each row counts, `[rows]`, of samples each response; None where the objective sees to that itself."""
    if "weight" in objective.asks:
        return None
    weight = batch["values"]["weight"]
    if objective.positions:
        return weight
    there = torch.tensor(batch["response_tokens"], device=weight.device) > 0  # [positions, rows]
    return (weight * there).flatten()


def response_tokens(objective: Objective, batch: Batch) -> dict[str, list[int]]:
    """Tokens of each row's response by the keys of `LossOutput.token_loss`; of samples those of each response."""
    of_position = batch["response_tokens"]
    if not objective.positions:
        return {"sampled": list(itertools.chain(*of_position))}
    return dict(zip(SIDES, of_position, strict=False))


def step_counts(batches: Sequence[Batch], objective: Objective, accelerator: Any = None) -> Counts:
    """What the sums of a step are divided by; over all ranks where their accelerator is given."""
    sides = SIDES if objective.positions else ("sampled",)
    local = torch.zeros(1 + len(sides), dtype=torch.float64)
    for batch in batches:
        tokens = [*response_tokens(objective, batch).values()]
        weight = row_weight(objective, batch)
        weights = torch.ones(len(tokens[0])) if weight is None else weight
        table = torch.tensor([[1.0] * len(tokens[0]), *tokens], dtype=torch.float64)
        local[: len(table)] += table @ weights.cpu().double()
    if accelerator is not None and accelerator.num_processes > 1:
        # MPS has no float64; counts are far below 2**24, which float32 holds exactly.
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        local = accelerator.reduce(local.to(accelerator.device, dtype), "sum")
    rows, *tokens_of = local.tolist()
    return Counts(rows, dict(zip(sides, tokens_of, strict=True)))


def mean_log_ratio(
    forward: Forward,
    reference: Reference,
    batches: Sequence[Batch],
    accelerator: Any,
    counted: int | None = None,
) -> Tensor:
    """The mean log-ratio to the reference of answers to other prompts, over all ranks; a scalar in nats.

    Every rank must call this. The first `counted` batches are averaged over, or all.
    """
    parts = [torch.zeros(2, device=accelerator.device)]
    for batch, known in zip(batches, reference_logps(reference, batches), strict=True):
        ratios = log_ratios(policy_logps(forward, batch), pair_logps(known, batch)).chosen
        parts.append(torch.stack([ratios.sum(), torch.full_like(ratios[0], len(ratios))]))
    averaged = parts if counted is None else parts[: 1 + counted]
    total, count = accelerator.reduce(torch.stack(averaged).sum(dim=0), "sum")
    mean: Tensor = total / count.clamp(min=1)
    return mean


def non_finite_rows(done: Done) -> list[str]:
    """Ids of the rows whose loss is not finite, or a token-averaged part of it."""
    bad: list[str] = []
    for batch, output in zip(done.batches, done.outputs, strict=True):
        finite = torch.isfinite(output.loss)
        for sums in output.token_loss.values():
            finite = finite & torch.isfinite(sums)
        # Responses go by position.
        ids = itertools.islice(itertools.cycle(batch["row_ids"]), len(finite))
        bad += [row for row, ok in zip(ids, finite.tolist(), strict=True) if not ok]
    return list(dict.fromkeys(bad))
