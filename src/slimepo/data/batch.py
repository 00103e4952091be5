"""Tokenised pairs to batches: what the model reads, and where in it the response tokens stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from slimepo.data.packing import Packing, first_fit_decreasing, pack, packed_cost
from slimepo.errors import InputError
from slimepo.types import PairLogps

if TYPE_CHECKING:
    from slimepo.data.tokenize import TokenizedPair

SIDES = ("chosen", "rejected")
Layout = Literal["padded", "packed", "shared"]
LAYOUTS = ("auto", "padded", "packed", "shared")


class PairBatch(TypedDict):
    """A batch of pairs: one padded row a response, or one packed row (`packing` is not None).

    `predict_at`, `targets` and `slots` list the response tokens: the flat position in `input_ids` whose
    hidden state predicts the token, the token's id, and its flat place in a `[sides, pairs, width]` tensor.
    """

    input_ids: Tensor  # [rows, tokens], int64
    predict_at: Tensor  # [N], int64
    targets: Tensor  # [N], int64
    slots: Tensor  # [N], int64
    packing: Packing | None
    pairs: int
    width: int
    sides: tuple[str, ...]
    response_tokens: list[list[int]]  # [sides][pairs], plain numbers that need no look at the device
    real_tokens: int
    row_ids: list[str]
    reference: (
        Tensor | None
    )  # [N], float32: log-probs of the same tokens under the reference, if known beforehand
    mismatched: PairBatch | None  # answers to other prompts, on the chosen side


@dataclass(frozen=True)
class StepCollator:
    """Turns the pairs of one optimizer step into its micro-batches.

    A micro-batch holds `micro_batch_size` pairs, or as many as fit into `max_tokens` where that is given
    (padding counts). How a step is cut changes nothing else: its loss is normalised over the whole step.
    """

    micro_batch_size: int
    sides: tuple[str, ...] = SIDES
    pad_token_id: int = 0
    layout: Layout = "padded"
    max_tokens: int | None = None

    def __call__(self, pairs: Sequence[TokenizedPair]) -> list[PairBatch]:
        return [self.batch([pairs[i] for i in index]) for index in self.cut(pairs)]

    def batch(self, pairs: Sequence[TokenizedPair]) -> PairBatch:
        """The given pairs as one batch, with their mismatched answers where they have such."""
        batch = self._collate(pairs, self.sides)
        others = [as_chosen(pair) for pair in pairs if pair.mismatched is not None]
        return {**batch, "mismatched": self._collate(others, ("chosen",))} if others else batch

    def _collate(self, pairs: Sequence[TokenizedPair], sides: tuple[str, ...]) -> PairBatch:
        if self.layout == "padded":
            return collate(pairs, sides, self.pad_token_id)
        return collate_packed(pairs, sides, shared=self.layout == "shared")

    def cut(self, pairs: Sequence[TokenizedPair]) -> list[list[int]]:
        """Which of the pairs stand in each micro-batch."""
        order = sorted(range(len(pairs)), key=lambda i: length(pairs[i], self.sides), reverse=True)
        if self.max_tokens is None:
            size = self.micro_batch_size
            return [order[start : start + size] for start in range(0, len(order), size)]
        if self.layout == "padded":
            return _cut_by_padded_size(
                order,
                [length(p, self.sides) * len(given_sides(p, self.sides)) for p in pairs],
                self.max_tokens,
            )
        cost = packed_cost(self.layout == "shared", self.sides)
        return first_fit_decreasing([cost(pair) for pair in pairs], self.max_tokens)


def length(pair: TokenizedPair, sides: tuple[str, ...] = SIDES) -> int:
    """Tokens of the longest of the pair's rows that are read."""
    return len(pair.prompt) + max(len(getattr(pair, side)) for side in sides)


def given_sides(pair: TokenizedPair, sides: Sequence[str] = SIDES) -> list[str]:
    """Those of the sides on which the pair has a response."""
    return [side for side in sides if len(getattr(pair, side))]


def as_chosen(pair: TokenizedPair) -> TokenizedPair:
    """The pair's mismatched answer as a row of its own, on the chosen side."""
    if pair.mismatched is None:
        raise InputError(f"row {pair.row_id} has no mismatched answer")
    known = pair.reference.get("mismatched") if pair.reference else None
    reference = None if known is None else {"chosen": known}
    return replace(
        pair, chosen=pair.mismatched, rejected=pair.rejected[:0], mismatched=None, reference=reference
    )


def collate(
    pairs: Sequence[TokenizedPair], sides: tuple[str, ...] = SIDES, pad_token_id: int = 0
) -> PairBatch:
    """One padded batch: the chosen rows first, then the rejected rows, padded on the right.

    A response that is not there takes no row. No attention mask is needed: attention is causal and the padding
    stands behind every real token.
    """
    rows = [(side, i) for side in sides for i, pair in enumerate(pairs) if len(getattr(pair, side))]
    longest = max(len(pairs[i].prompt) + len(getattr(pairs[i], side)) for side, i in rows)
    input_ids = np.full((len(rows), longest), pad_token_id, dtype=np.int64)
    predict_at = [[np.zeros(0, dtype=np.int64)] * len(pairs) for _ in sides]
    real = 0
    for row, (side, index) in enumerate(rows):
        prompt, response = pairs[index].prompt, getattr(pairs[index], side)
        start, stop = len(prompt), len(prompt) + len(response)
        input_ids[row, :start], input_ids[row, start:stop] = prompt, response
        predict_at[sides.index(side)][index] = row * longest + np.arange(start - 1, stop - 1)
        real += stop
    return _batch(pairs, sides, input_ids, predict_at, real, None)


def collate_packed(
    pairs: Sequence[TokenizedPair], sides: tuple[str, ...] = SIDES, shared: bool = True
) -> PairBatch:
    """All pairs in one row without padding; with `shared` the prompt of a pair stands in it once."""
    row = pack(pairs, sides, shared)
    return _batch(pairs, sides, row.ids.astype(np.int64)[None], row.predict_at, len(row.ids), row.packing)


def _batch(
    pairs: Sequence[TokenizedPair],
    sides: tuple[str, ...],
    input_ids: np.ndarray,
    predict_at: list[list[np.ndarray]],
    real_tokens: int,
    packing: Packing | None,
) -> PairBatch:
    without_prompt = [pair.row_id for pair in pairs if len(pair.prompt) == 0]
    if without_prompt:
        raise InputError(
            f"row {without_prompt[0]}: the prompt has no token, so nothing predicts the first response token"
        )
    responses = [[getattr(pair, side) for pair in pairs] for side in sides]
    width = max(len(r) for side in responses for r in side)
    slots = [
        (side * len(pairs) + index) * width + np.arange(len(response))
        for side, rows in enumerate(responses)
        for index, response in enumerate(rows)
    ]
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        predict_at=_flat([places for side in predict_at for places in side]),
        targets=_flat([response for side in responses for response in side]),
        slots=_flat(slots),
        packing=packing,
        pairs=len(pairs),
        width=width,
        sides=sides,
        response_tokens=[[len(r) for r in side] for side in responses],
        real_tokens=real_tokens,
        row_ids=[pair.row_id for pair in pairs],
        reference=_reference(pairs, sides),
        mismatched=None,
    )


def _reference(pairs: Sequence[TokenizedPair], sides: tuple[str, ...]) -> Tensor | None:
    if any(pair.reference is None for pair in pairs):
        return None
    known = [
        pair.reference[side] for side in sides for pair in pairs if pair.reference and side in pair.reference
    ]
    return torch.from_numpy(np.concatenate(known))


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


def _cut_by_padded_size(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows sorted by falling length so that a batch, padded to its longest, stays within the budget."""
    parts: list[list[int]] = []
    for item in order:
        if parts and sizes[parts[-1][0]] * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def _flat(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
