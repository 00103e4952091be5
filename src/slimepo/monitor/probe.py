"""What the monitor measures on a model: log-probs with entropy, gradients of loss terms, greedy answers."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimepo.data.batch import SIDES, StepCollator, collate, given_sides, length
from slimepo.data.tokenize import TokenizedPair
from slimepo.losses import count, step_loss
from slimepo.losses.common import mean_logps
from slimepo.model.generate import Completion, generate
from slimepo.model.logps import policy_logps, token_stats
from slimepo.model.modes import measuring
from slimepo.model.tryout import to_device
from slimepo.monitor.displacement import SideScores, looping, repeated, share
from slimepo.types import LossOutput, PairLogps

# The weights of SLIME's three terms, by the names that its metrics give them.
SLIME_TERMS = {"chosen": "chosen_weight", "rejected": "rejected_weight", "distance": "distance_weight"}


def sample(rows: Sequence[TokenizedPair], size: int, seed: int) -> list[TokenizedPair]:
    """`size` rows, or all, by a hash of their content and the seed: whatever the order of the rows."""
    return heapq.nsmallest(size, rows, key=lambda row: _digest(row, seed))


def prompts_for(rows: Sequence[TokenizedPair], size: int, seed: int) -> list[TokenizedPair]:
    """Rows whose prompts are answered: by hash, of one length where `size` rows have it, for these run side by side."""
    differing: dict[bytes, TokenizedPair] = {}
    for row in sorted(rows, key=lambda row: _digest(row, seed)):
        differing.setdefault(row.prompt.tobytes(), row)
    chosen: dict[int, list[TokenizedPair]] = defaultdict(list)
    for row in differing.values():
        same = chosen[len(row.prompt)]
        same.append(row)
        if len(same) == size:
            return same
    return list(differing.values())[:size]


def end_token(rows: Sequence[TokenizedPair]) -> int | None:
    """The token that most of the trained answers end in; None where fewer than half of them share one."""
    answers = [getattr(row, side) for row in rows for side in given_sides(row)]
    if not answers:
        return None
    token, times = Counter(int(answer[-1]) for answer in answers).most_common(1)[0]
    return token if 2 * times >= len(answers) else None


def score_sample(
    model: nn.Module, rows: Sequence[TokenizedPair], collator: StepCollator, batch_size: int
) -> tuple[SideScores, SideScores]:
    """Log-probs, entropies and hits of both sides of rows, in their order; in eval mode, without gradients."""
    sides = tuple(side for side in SIDES if any(len(getattr(row, side)) for row in rows))
    collator = replace(collator, sides=sides)
    plain = [replace(row, mismatched=None, reference=None) for row in rows]
    device = next(model.parameters()).device
    empty = np.zeros(0)
    found = {side: [(empty, empty, empty)] * len(rows) for side in SIDES}
    order = sorted(range(len(rows)), key=lambda i: length(rows[i], sides), reverse=True)
    with measuring(model) as forward:
        for first in range(0, len(order), batch_size):
            index = order[first : first + batch_size]
            batch = to_device(collator.batch([plain[i] for i in index]), device)
            stats = token_stats(forward, batch)
            table = (
                torch.stack([stats.logps.double(), stats.entropy.double(), stats.hit.double()]).cpu().numpy()
            )
            lengths = [n for side in batch["response_tokens"] for n in side]
            parts = iter(np.split(table, np.cumsum(lengths)[:-1], axis=1))
            for side in sides:
                for i in index:
                    logps, entropy, hit = next(parts)
                    found[side][i] = (logps, entropy, hit)
    chosen, rejected = (SideScores(*map(list, zip(*found[side], strict=True))) for side in SIDES)
    return chosen, rejected


def gradient_norms(
    loss: Callable[..., LossOutput], options: Mapping[str, Any], chosen: SideScores, rejected: SideScores
) -> dict[str, float]:
    """The L2 norm of each SLIME term's gradient with respect to the per-token log-probs of the sample.

    The sample is taken as one step: the loss is its mean over these pairs. A term is had by itself by setting the
    weights of the others to 0, so that every variant of the objective is measured by its own code.
    """
    policy = _as_pair_logps(chosen, rejected)
    norms = {}
    for term in SLIME_TERMS:
        others = {weight: 0.0 for name, weight in SLIME_TERMS.items() if name != term}
        with torch.enable_grad():
            leaves = replace(
                policy,
                chosen=policy.chosen.clone().requires_grad_(),
                rejected=policy.rejected.clone().requires_grad_(),
            )
            value = step_loss(loss(leaves, None, **{**options, **others}), count(leaves))
            gradients = torch.autograd.grad(value, [leaves.chosen, leaves.rejected], allow_unused=True)
        norms[term] = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    return norms


def entanglement(model: nn.Module, rows: Sequence[TokenizedPair]) -> dict[str, Any]:
    """How much the gradients of a pair's two answers point the same way (arXiv 2410.13828).

    With g_w and g_l the gradients of the mean log-prob per token of the chosen and the rejected answer with respect
    to the parameters that train, the ratio of a pair is <g_w, g_l> / min(|g_w|^2, |g_l|^2). Above 1, a step that raises
    the one and lowers the other by equal weights cannot do both: one gradient drags the other answer along.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    ratios = []
    with measuring(model) as forward, torch.enable_grad():
        for row in rows:
            gradients = []
            # A forward pass for each: the fused head frees what it kept in its one backward pass.
            for side in SIDES:
                batch = to_device(collate([replace(row, mismatched=None, reference=None)], (side,)), device)
                logps = policy_logps(forward, batch)
                value = mean_logps(getattr(logps, side), getattr(logps, f"{side}_mask")).sum()
                gradients.append(torch.autograd.grad(value, trained, allow_unused=True))
            w, l = gradients  # noqa: E741
            ratios.append(round(_dot(w, l) / max(min(_dot(w, w), _dot(l, l)), 1e-30), 6))
    return {"pairs": len(ratios), "ratio": ratios, "above": share(np.array(ratios) > 1, np.array(ratios))}


def greedy_answers(
    model: nn.Module,
    prompts: Sequence[TokenizedPair],
    end_token_id: int,
    max_new_tokens: int,
    decode: Callable[[Sequence[int]], str] | None,
    valid: Callable[[str, str], bool] | None,
) -> dict[str, Any]:
    """Answer prompts greedily: lengths, whether they end, how much they repeat; text where there is a tokenizer."""
    with measuring(model):
        completions = generate(
            model,
            [row.prompt.tolist() for row in prompts],
            end_token_ids={end_token_id},
            max_new_tokens=max_new_tokens,
        )
    answers = [
        _answer(row, completion, decode, valid)
        for row, (completion,) in zip(prompts, completions, strict=True)
    ]
    checked = [a["valid"] for a in answers if a["valid"] is not None]
    return {
        "length": _mean([a["tokens"] for a in answers]),
        "finished": _mean([a["finished"] for a in answers]),
        "repeated": _mean([a["repeated"] for a in answers]),
        "looping": _mean([a["looping"] for a in answers]),
        "valid": _mean(checked) if checked else None,
        "answers": answers,
    }


def _answer(
    row: TokenizedPair,
    completion: Completion,
    decode: Callable[[Sequence[int]], str] | None,
    valid: Callable[[str, str], bool] | None,
) -> dict[str, Any]:
    ids = completion.token_ids[:-1] if completion.finished else completion.token_ids
    text = None if decode is None else decode(ids)
    judged = None if valid is None or text is None else completion.finished and valid(row.row_id, text)
    return {
        "row_id": row.row_id,
        "tokens": len(completion.token_ids),
        "finished": completion.finished,
        "repeated": round(repeated(ids), 6),
        "looping": looping(ids),
        "valid": judged,
        "text": text,
    }


def _as_pair_logps(chosen: SideScores, rejected: SideScores) -> PairLogps:
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


def _digest(row: TokenizedPair, seed: int) -> bytes:
    hashed = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for ids in (row.prompt, row.chosen, row.rejected):
        hashed.update(len(ids).to_bytes(4, "big") + ids.tobytes())
    return hashed.digest()


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
