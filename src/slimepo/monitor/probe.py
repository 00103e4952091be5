"""What the monitor measures on a model: log-probs with entropy, gradients of loss terms, greedy answers."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimepo.data.batch import StepCollator, collate, to_device
from slimepo.data.rows import CHOSEN, PAIR, Row
from slimepo.losses import count, slime, step_loss
from slimepo.losses.common import mean_logps
from slimepo.model.generate import generate
from slimepo.model.logps import policy_logps
from slimepo.model.modes import scoring
from slimepo.model.score import score_rows
from slimepo.monitor.displacement import SideScores, looping, repeated
from slimepo.types import PairLogps

# The weights of SLIME's three terms, by the names that its metrics give them.
SLIME_TERMS = {"chosen": "chosen_weight", "rejected": "rejected_weight", "distance": "distance_weight"}


def sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Rows that hold `count` chosen answers, by a hash of their content and the seed: whatever the order of the rows.

    Judged rows have one answer each, and not all a chosen one: four times as many rows at most.
    """
    drawn = heapq.nsmallest(4 * count, rows, key=lambda row: _digest(row, seed))
    with_chosen = [at for at, row in enumerate(drawn, 1) if len(row.response(CHOSEN))]
    return drawn[: with_chosen[count - 1] if len(with_chosen) >= count else len(drawn)]


def prompts_for(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Rows with prompts that differ, drawn in the same way."""
    differing: dict[bytes, Row] = {}
    for row in sorted(rows, key=lambda row: _digest(row, seed)) if count else []:
        differing.setdefault(row.prompt_ids.tobytes(), row)
    return list(differing.values())[:count]


def end_token(rows: Sequence[Row]) -> int | None:
    """The token that most of the answers end in; None where fewer than half of them share one."""
    answers = [answer for row in rows for i in PAIR if len(answer := row.response(i))]
    ((token, times),) = Counter(int(answer[-1]) for answer in answers).most_common(1) or [(0, -1)]
    return token if 2 * times >= len(answers) else None


def score_sample(
    model: nn.Module, rows: Sequence[Row], collator: StepCollator
) -> tuple[SideScores, SideScores]:
    """Log-probs, entropies and top-1 of both sides of rows, in their order; in eval mode, without gradients."""
    both = replace(collator, positions=PAIR)
    with scoring(model) as forward:
        found = score_rows(forward, rows, both, next(model.parameters()).device, stats=True)
    sides = [[of_row[position].astype(np.float64) for of_row in found] for position in PAIR]
    chosen, rejected = (SideScores(*(list(x) for x in zip(*side, strict=True))) for side in sides)
    return chosen, rejected


def gradient_share(
    options: Mapping[str, Any], chosen: SideScores, rejected: SideScores
) -> dict[str, float] | None:
    """How hard each of SLIME's terms pulls: the L2 norm of its gradient with respect to the sample's log-probs, over
    the sum of the three norms; None where all are 0.

    The sample is taken as one step: the loss is its mean over these pairs. A term is had by itself by setting the
    weights of the others to 0, so that every variant of the objective is measured by its own code.
    """
    policy = as_pair_logps(chosen, rejected)
    norms = {}
    for term in SLIME_TERMS:
        others = {weight: 0.0 for name, weight in SLIME_TERMS.items() if name != term}
        with torch.enable_grad():
            leaves = replace(
                policy,
                chosen=policy.chosen.clone().requires_grad_(),
                rejected=policy.rejected.clone().requires_grad_(),
            )
            value = step_loss(slime(leaves, None, **{**options, **others}), count(leaves))
            gradients = torch.autograd.grad(value, [leaves.chosen, leaves.rejected], allow_unused=True)
        norms[term] = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    total = sum(norms.values())
    return {term: round(norm / total, 6) for term, norm in norms.items()} if total > 0 else None


def entanglement(model: nn.Module, rows: Sequence[Row]) -> list[float]:
    """How much the gradients of a pair's two answers point the same way (arXiv 2410.13828).

    With g_w and g_l the gradients of the mean log-prob per token of the chosen and the rejected answer with respect
    to the parameters that train, the ratio of a pair is <g_w, g_l> / min(|g_w|^2, |g_l|^2). Above 1, a step that raises
    the one and lowers the other by equal weights cannot do both: one gradient drags the other answer along.
    """
    return [round(wl / max(min(ww, ll), 1e-30), 6) for ww, wl, ll in gradient_products(model, rows)]


def gradient_products(model: nn.Module, rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """|g_w|^2, <g_w, g_l> and |g_l|^2 of each pair, with the gradients of `entanglement`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    products = []
    with scoring(model) as forward, torch.enable_grad():
        for row in rows:
            gradients = []
            # A forward pass for each: the fused head frees what it kept in its one backward pass.
            for position in PAIR:
                logps = policy_logps(forward, to_device(collate([row], (position,)), device))
                value = mean_logps(logps.chosen, logps.chosen_mask).sum()
                gradients.append(torch.autograd.grad(value, trained, allow_unused=True))
            w, l = gradients  # noqa: E741
            products.append((_dot(w, w), _dot(w, l), _dot(l, l)))
    return products


def greedy_answers(
    model: nn.Module,
    prompts: Sequence[Row],
    end_token_id: int,
    max_new_tokens: int,
    decode: Callable[[list[int]], str | None],
    valid: Callable[[str, str], bool] | None,
) -> dict[str, Any]:
    """Answer prompts greedily: lengths, whether they end, how much they repeat; text where there is a tokenizer."""
    with scoring(model):
        completions = generate(
            model,
            [row.prompt_ids.tolist() for row in prompts],
            end_token_ids={end_token_id},
            max_new_tokens=max_new_tokens,
        )
    answers: list[dict[str, Any]] = []
    for row, (completion,) in zip(prompts, completions, strict=True):
        ids = completion.token_ids[:-1] if completion.finished else completion.token_ids
        text = decode(ids)
        answers.append(
            {
                "row_id": row.id,
                "tokens": len(completion.token_ids),
                "finished": completion.finished,
                "repeated": round(repeated(ids), 6),
                "looping": looping(ids),
                "valid": completion.finished and valid(row.id, text) if valid and text is not None else None,
                "text": text,
            }
        )  # fmt: skip

    def mean(key: str) -> float | None:
        told = [answer[key] for answer in answers if answer[key] is not None]
        return round(sum(told) / len(told), 6) if told else None

    return {
        "length": mean("tokens"),
        **{key: mean(key) for key in ("finished", "repeated", "looping", "valid")},
        "answers": answers,
    }


def as_pair_logps(chosen: SideScores, rejected: SideScores) -> PairLogps:
    """The log-probs of both sides of pairs as an objective reads them, in float64."""
    sides = []
    for scores in (chosen, rejected):
        rows = [torch.from_numpy(tokens) for tokens in scores.logps]
        values = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        sides += [values, torch.arange(values.shape[1])[None] < lengths[:, None]]
    return PairLogps(*sides)


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    return sum(
        float((x.float() * y.float()).sum())
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    )


def _digest(row: Row, seed: int) -> bytes:
    hashed = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for ids in (row.prompt_ids, *(row.response(i) for i in PAIR)):
        hashed.update(len(ids).to_bytes(4, "big") + ids.tobytes())
    return hashed.digest()
