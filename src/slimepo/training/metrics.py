"""Sums of losses and metrics over pairs, kept on the device until somebody asks for the means."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimepo.data.batch import Batch
from slimepo.data.rows import CHOSEN, REJECTED
from slimepo.losses import Counts
from slimepo.types import LossOutput


@dataclass
class MetricSums:
    """What has been added up since it was made: (sum, count) over pairs by name, and plain counts.

    Pairs for which a metric is NaN do not count for it; a NaN loss stays one. `loss` is the mean over pairs plus
    every token-averaged part over its tokens, as in `slimepo.losses.step_loss`.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    pairs: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    real_tokens: int = 0
    computed_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, batch: Batch, output: LossOutput, weight: int = 1) -> None:
        """Count a batch `weight` times; 0 keeps the names and adds nothing."""
        values = {**output.metrics, "loss": output.loss}
        values |= {f"token_loss/{side}": sums for side, sums in output.token_loss.items()}
        for name, value in values.items():
            value = _wide(value.detach())
            there = ~value.isnan() if name in output.metrics else torch.ones_like(value, dtype=torch.bool)
            total = torch.stack([value.where(there, 0).sum(), there.sum().to(value.dtype)]) * weight
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        tokens = side_tokens(batch)
        self.pairs += batch["rows"] * weight
        self.chosen_tokens += tokens["chosen"] * weight
        self.rejected_tokens += tokens["rejected"] * weight
        self.real_tokens += batch["real_tokens"] * weight
        self.computed_tokens += batch["input_ids"].numel() * weight

    def reduced(self, accelerator: Any) -> MetricSums:
        """The sums over all ranks; every rank must call this with the same names."""
        if accelerator.num_processes == 1:
            return self
        facts = [self.pairs, self.chosen_tokens, self.rejected_tokens, self.real_tokens, self.computed_tokens]
        device = accelerator.device
        parts = [*self.sums.values(), *(torch.tensor(float(fact)) for fact in facts)]
        total = accelerator.reduce(torch.cat([_wide(p.to(device)).reshape(-1) for p in parts]), "sum").cpu()
        sums = dict(zip(self.sums, total[: 2 * len(self.sums)].view(-1, 2), strict=True))
        pairs, chosen, rejected, real, computed = (int(value) for value in total[2 * len(sums) :])
        return MetricSums(sums, pairs, chosen, rejected, real, computed, self.started)

    def means(self) -> dict[str, float]:
        """Means over pairs, those that no pair has left out; the loss with its token-averaged parts."""
        totals = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        means = {k: v / n for k, (v, n) in totals.items() if n and not k.startswith("token_loss/")}
        tokens = {"chosen": self.chosen_tokens, "rejected": self.rejected_tokens}
        for side, count in tokens.items():
            means["loss"] += totals.get(f"token_loss/{side}", (0.0, 0))[0] / max(count, 1)
        return means

    def speed(self) -> dict[str, float]:
        """Tokens a second since this was made (all ranks, padding left out), and the share that was padding."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "tokens_per_second": self.real_tokens / seconds,
            "padding_share": 1 - self.real_tokens / max(self.computed_tokens, 1),
        }


def _wide(values: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return values.float() if values.device.type == "mps" else values.double()


def side_tokens(batch: Batch) -> dict[str, int]:
    """Response tokens of a batch by side; known without looking at the device."""
    chosen, rejected = (sum(map(sum, batch["response_tokens"][i : i + 1])) for i in (CHOSEN, REJECTED))
    return {"chosen": chosen, "rejected": rejected}


def pair_counts(batches: Sequence[Batch], accelerator: Any = None) -> Counts:
    """Pairs and response tokens of a step's micro-batches; over all ranks where their accelerator is given."""
    tokens = [side_tokens(batch) for batch in batches]
    pairs = sum(batch["rows"] for batch in batches)
    local = Counts(pairs, sum(t["chosen"] for t in tokens), sum(t["rejected"] for t in tokens))
    if accelerator is None or accelerator.num_processes == 1:
        return local
    # Counts of a step are far below 2**24, so float32 holds them exactly on every device.
    counts = torch.tensor(local, dtype=torch.float32, device=accelerator.device)
    return Counts(*accelerator.reduce(counts, "sum").tolist())


def non_finite_rows(batches: Sequence[Batch], outputs: Sequence[LossOutput]) -> list[str]:
    """Ids of the rows whose loss is not finite, or a token-averaged part of it."""
    bad: list[str] = []
    for batch, output in zip(batches, outputs, strict=True):
        finite = torch.isfinite(output.loss)
        for sums in output.token_loss.values():
            finite = finite & torch.isfinite(sums)
        bad += [row for row, ok in zip(batch["row_ids"], finite.tolist(), strict=True) if not ok]
    return bad
