"""Rows to batches: what the model reads, and where in it the response tokens stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from slimepo.data.packing import Packing, first_fit_decreasing, pack, packed_cost
from slimepo.data.rows import MISMATCHED, PAIR, Row, length
from slimepo.errors import InputError
from slimepo.types import PairLogps, SampleLogps

Layout = Literal["padded", "packed", "shared"]
LAYOUTS = ("auto", "padded", "packed", "shared")


class Batch(TypedDict):
    """A batch of rows: one padded line a response, or one packed line (`packing` is not None).

    `predict_at`, `targets` and `scatter_index` list the response tokens: the flat position in `input_ids` whose
    hidden state predicts the token, the token's id, and its flat place in a `[positions, rows, width]` tensor.
    """

    input_ids: Tensor  # [lines, tokens], int64
    predict_at: Tensor  # [N], int64
    targets: Tensor  # [N], int64
    scatter_index: Tensor  # [N], int64
    packing: Packing | None
    rows: int
    width: int
    positions: tuple[int, ...]  # of the responses in it
    response_tokens: list[list[int]]  # [positions][rows], plain numbers that need no look at the device
    real_tokens: int
    row_ids: list[str]
    values: dict[str, Tensor]  # those that all rows have, and weight: [rows] or [rows, positions], float32
    token_values: dict[str, Tensor]  # likewise, [N] in the order of `targets`


class Step(TypedDict):
    """One optimizer step: its micro-batches, batches of the answers to other prompts that it has, and its rows."""

    batches: list[Batch]
    mismatched: list[Batch]
    rows: list[Row]


Laid = TypeVar("Laid", Batch, Step)


@dataclass(frozen=True)
class StepCollator:
    """Turns the rows of one optimizer step into its micro-batches.

    A micro-batch holds `micro_batch_size` rows, or as many as fit into `max_tokens` where that is given
    (padding counts). How a step is cut changes nothing else: its loss is normalised over the whole step.
    """

    micro_batch_size: int
    positions: tuple[int, ...] = PAIR
    pad_token_id: int = 0
    layout: Layout = "padded"
    max_tokens: int | None = None

    def __call__(self, rows: Sequence[Row]) -> Step:
        beside, others = (
            replace(self, positions=(MISMATCHED,)),
            [r for r in rows if len(r.response(MISMATCHED))],
        )
        return Step(
            batches=[self.batch([rows[i] for i in index]) for index in self.cut(rows)],
            mismatched=[beside.batch([others[i] for i in index]) for index in beside.cut(others)],
            rows=list(rows),
        )

    def halved(self) -> StepCollator:
        """One whose micro-batches are half as large, a row at the least."""
        tokens = None if self.max_tokens is None else max(1, self.max_tokens // 2)
        return replace(self, micro_batch_size=max(1, self.micro_batch_size // 2), max_tokens=tokens)

    def batch(self, rows: Sequence[Row], positions: tuple[int, ...] | None = None) -> Batch:
        """The given rows as one batch of the responses at `positions`, the collator's own where it is None."""
        positions = self.positions if positions is None else positions
        if self.layout == "padded":
            return collate(rows, positions, self.pad_token_id)
        return collate_packed(rows, positions, shared=self.layout == "shared")

    def cut(self, rows: Sequence[Row]) -> list[list[int]]:
        """Which of the rows stand in each micro-batch."""
        lengths = [length(row, self.positions) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: lengths[i], reverse=True)
        if self.max_tokens is None:
            size = self.micro_batch_size
            return [order[start : start + size] for start in range(0, len(order), size)]
        if self.layout == "padded":
            lines = [sum(len(row.response(position)) > 0 for position in self.positions) for row in rows]
            return _cut_by_padded_size(order, lengths, lines, self.max_tokens)
        costs = [packed_cost(row, self.positions, self.layout == "shared") for row in rows]
        return first_fit_decreasing(costs, self.max_tokens)


def collate(rows: Sequence[Row], positions: tuple[int, ...] = PAIR, pad_token_id: int = 0) -> Batch:
    """One padded batch, a line a response: position after position, padded on the right.

    A response that is not there takes no line. No attention mask is needed: attention is causal and the padding
    stands behind every real token.
    """
    lines = [
        (place, index, row.prompt_ids, response)
        for place, position in enumerate(positions)
        for index, row in enumerate(rows)
        if len(response := row.response(position))
    ]
    longest = max(len(prompt) + len(response) for *_, prompt, response in lines)
    input_ids = np.full((len(lines), longest), pad_token_id, dtype=np.int64)
    predict_at = [[np.zeros(0, dtype=np.int64)] * len(rows) for _ in positions]
    real = 0
    for line, (place, index, prompt, response) in enumerate(lines):
        start, stop = len(prompt), len(prompt) + len(response)
        input_ids[line, :start], input_ids[line, start:stop] = prompt, response
        predict_at[place][index] = line * longest + np.arange(start - 1, stop - 1)
        real += stop
    return _batch(rows, positions, input_ids, predict_at, real, None)


def collate_packed(rows: Sequence[Row], positions: tuple[int, ...] = PAIR, shared: bool = True) -> Batch:
    """All rows in one line without padding; with `shared` the prompt of a row stands in it once."""
    line = pack(rows, positions, shared)
    input_ids = line.ids.astype(np.int64)[None]
    return _batch(rows, positions, input_ids, line.predict_at, len(line.ids), line.packing)


def _batch(
    rows: Sequence[Row],
    positions: tuple[int, ...],
    input_ids: np.ndarray,
    predict_at: list[list[np.ndarray]],
    real_tokens: int,
    packing: Packing | None,
) -> Batch:
    without_prompt = [row.id for row in rows if len(row.prompt_ids) == 0]
    if without_prompt:
        raise InputError(
            f"row {without_prompt[0]}: the prompt has no token, so nothing predicts the first response token"
        )
    responses = [[row.response(position) for row in rows] for position in positions]
    width = max(len(response) for of_position in responses for response in of_position)
    scatter_index = [
        (place * len(rows) + index) * width + np.arange(len(response))
        for place, of_position in enumerate(responses)
        for index, response in enumerate(of_position)
    ]
    values, token_values = _values(rows, positions)
    # Every row counts once unless it says otherwise.
    values["weight"] = torch.tensor([float(row.values.get("weight", 1)) for row in rows], dtype=torch.float32)  # type: ignore[arg-type]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        predict_at=_flat([places for of_position in predict_at for places in of_position]),
        targets=_flat([response for of_position in responses for response in of_position]),
        scatter_index=_flat(scatter_index),
        packing=packing,
        rows=len(rows),
        width=width,
        positions=positions,
        response_tokens=[[len(response) for response in of_position] for of_position in responses],
        real_tokens=real_tokens,
        row_ids=[row.id for row in rows],
        values=values,
        token_values=token_values,
    )


def _values(rows: Sequence[Row], positions: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What all rows have: numbers a row or a response, and numbers a token."""
    values, token_values = {}, {}
    for name in [name for name in rows[0].values if all(name in row.values for row in rows)]:
        given: list[Any] = [row.values[name] for row in rows]
        if isinstance(given[0], tuple):
            read = [(row, of_row, p) for p in positions for row, of_row in zip(rows, given, strict=True)]
            parts = [of_row[p] if p < len(of_row) else of_row[0][:0] for _, of_row, p in read]
            # Values that do not cover all that is read here are none: whoever asks for them is told so by name.
            if all(len(part) == len(row.response(p)) for part, (row, _, p) in zip(parts, read, strict=True)):
                token_values[name] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        elif np.ndim(given[0]) == 0:
            values[name] = torch.tensor([float(value) for value in given], dtype=torch.float32)
        else:
            table = [[of_row[i] if i < len(of_row) else 0.0 for i in positions] for of_row in given]
            values[name] = torch.tensor(table, dtype=torch.float32)
    return values, token_values


def sample_logps(logps: Tensor, batch: Batch) -> SampleLogps:
    """Put the flat log-probs `[N]` of a batch's response tokens back into responses, position after position."""
    shape = (len(batch["positions"]) * batch["rows"], batch["width"])
    index = batch["scatter_index"]
    values = logps.new_zeros(shape[0] * shape[1]).index_copy(0, index, logps)
    mask = torch.zeros(len(values), dtype=torch.bool, device=logps.device).index_fill(0, index, True)
    return SampleLogps(values.view(shape), mask.view(shape))


def pair_logps(logps: Tensor, batch: Batch) -> PairLogps:
    """Put the flat log-probs `[N]` of a batch's response tokens back into pairs.

    The first of the batch's positions becomes the chosen side, the second the rejected one.
    """
    flat = sample_logps(logps, batch)
    shape = (len(batch["positions"]), batch["rows"], batch["width"])
    values, mask = flat.logps.view(shape), flat.mask.view(shape)
    if shape[0] == 1:
        return PairLogps(values[0], mask[0], values.new_zeros(shape[1], 0), mask.new_zeros(shape[1], 0))
    return PairLogps(values[0], mask[0], values[1], mask[1])


def last_response(logps: Tensor, batch: Batch) -> SampleLogps:
    """The log-probs of the response at the last of the batch's positions, `[rows, tokens]`."""
    flat = sample_logps(logps, batch)
    return SampleLogps(flat.logps[-batch["rows"] :], flat.mask[-batch["rows"] :])


def to_device(batch: Laid, device: torch.device) -> Laid:
    """The batch or step with its tensors on `device`."""
    from accelerate.utils import send_to_device

    return cast("Laid", send_to_device(batch, device))


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


def _cut_by_padded_size(
    order: Sequence[int], lengths: Sequence[int], lines: Sequence[int], budget: int
) -> list[list[int]]:
    """Cut rows sorted by falling length so that a batch, its lines padded to its longest, stays within the budget."""
    parts: list[list[int]] = []
    for item in order:
        if parts and lengths[parts[-1][0]] * sum(lines[i] for i in [*parts[-1], item]) <= budget:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def _flat(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
