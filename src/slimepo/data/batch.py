"""Tokenised pairs to batches: what the model reads, and where in it the response tokens stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

from slimepo.types import PairLogps

if TYPE_CHECKING:
    from slimepo.data.tokenize import TokenizedPair

SIDES = ("chosen", "rejected")


class PairBatch(TypedDict):
    """A batch of pairs, padded to one row a response.

    `predict_at`, `targets` and `slots` list the response tokens: the flat position in `input_ids` whose
    hidden state predicts the token, the token's id, and its flat place in a `[sides, pairs, width]` tensor.
    """

    input_ids: Tensor  # [rows, tokens], int64
    predict_at: Tensor  # [N], int64
    targets: Tensor  # [N], int64
    slots: Tensor  # [N], int64
    pairs: int
    width: int
    sides: tuple[str, ...]
    response_tokens: list[list[int]]  # [sides][pairs], plain numbers that need no look at the device
    real_tokens: int
    row_ids: list[str]


@dataclass(frozen=True)
class StepCollator:
    """Turns the pairs of one optimizer step into its micro-batches.

    Rows of a step are sorted by length before they are cut into micro-batches, which saves padding and
    changes nothing else: the loss of a step is normalised over the whole step.
    """

    micro_batch_size: int
    sides: tuple[str, ...] = SIDES
    pad_token_id: int = 0

    def __call__(self, pairs: Sequence[TokenizedPair]) -> list[PairBatch]:
        ordered = sorted(pairs, key=length, reverse=True)
        return [
            collate(ordered[start : start + self.micro_batch_size], self.sides, self.pad_token_id)
            for start in range(0, len(ordered), self.micro_batch_size)
        ]


def length(pair: TokenizedPair) -> int:
    """Tokens of the longer of the pair's two rows."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def collate(
    pairs: Sequence[TokenizedPair], sides: tuple[str, ...] = SIDES, pad_token_id: int = 0
) -> PairBatch:
    """One padded batch: the chosen rows first, then the rejected rows, padded on the right.

    No attention mask is needed: attention is causal and the padding stands behind every real token.
    """
    responses = [[getattr(pair, side) for pair in pairs] for side in sides]
    width = max(len(r) for side in responses for r in side)
    tokens = max(len(p.prompt) + len(r) for side in responses for p, r in zip(pairs, side, strict=True))
    input_ids = np.full((len(sides) * len(pairs), tokens), pad_token_id, dtype=np.int64)
    predict_at, targets, slots, real = [], [], [], 0
    for row, (side, index) in enumerate((s, i) for s in range(len(sides)) for i in range(len(pairs))):
        prompt, response = pairs[index].prompt, responses[side][index]
        start, stop = len(prompt), len(prompt) + len(response)
        input_ids[row, :start], input_ids[row, start:stop] = prompt, response
        predict_at.append(row * tokens + np.arange(start - 1, stop - 1))
        targets.append(response)
        slots.append(row * width + np.arange(len(response)))
        real += stop
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        predict_at=_flat(predict_at),
        targets=_flat(targets),
        slots=_flat(slots),
        pairs=len(pairs),
        width=width,
        sides=sides,
        response_tokens=[[len(r) for r in side] for side in responses],
        real_tokens=real,
        row_ids=[pair.row_id for pair in pairs],
    )


def pair_logps(logps: Tensor, batch: PairBatch) -> PairLogps:
    """Put the flat log-probs `[N]` of a batch's response tokens back into pairs."""
    shape = (len(batch["sides"]), batch["pairs"], batch["width"])
    size = shape[0] * shape[1] * shape[2]
    slots = batch["slots"]
    values = logps.new_zeros(size).index_copy(0, slots, logps).view(shape)
    mask = torch.zeros(size, dtype=torch.bool, device=logps.device).index_fill(0, slots, True).view(shape)
    side = {name: (values[i], mask[i]) for i, name in enumerate(batch["sides"])}
    absent = (logps.new_zeros(shape[1], 0), mask.new_zeros(shape[1], 0))
    chosen, rejected = side.get("chosen", absent), side.get("rejected", absent)
    return PairLogps(chosen[0], chosen[1], rejected[0], rejected[1])


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, by_length: bool) -> list[int]:
    """The order in which rows are visited, a function of seed and epoch alone.

    With `by_length`, rows of similar length meet in a batch: windows of 50 shuffled batches are sorted by
    length, cut into batches, and the batches are shuffled again.
    """
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(digest, "big"))
    order: list[int] = random.permutation(len(lengths)).tolist()
    if not by_length:
        return order
    window = 50 * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    # A short batch must stay last, or it would shift the borders of all that follow it.
    short = [b for b in batches if len(b) < batch_size]
    full = [b for b in batches if len(b) == batch_size]
    return [row for i in random.permutation(len(full)) for row in full[i]] + [row for b in short for row in b]


def _flat(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
