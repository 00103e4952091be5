"""Sums of losses and metrics over rows, kept on the device until somebody asks for the means."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimepo.data.batch import Batch
from slimepo.losses import Objective
from slimepo.training.step import response_tokens, row_weight
from slimepo.types import LossOutput


@dataclass
class MetricSums:
    """What has been added up since it was made: (sum, count) over rows by name, and tokens.

    Rows for which a metric is NaN do not count for it; a NaN loss stays one. `loss` is the mean over rows by their
    weights plus every token-averaged part over its tokens, as in `slimepo.losses.step_loss`.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    real_tokens: int = 0
    computed_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, batch: Batch, output: LossOutput, objective: Objective, times: int = 1) -> None:
        """Count a batch, with what the objective returned for it, `times` times; 0 keeps the names and adds nothing."""
        weight = row_weight(objective, batch)
        weights = _wide(torch.ones_like(output.loss) if weight is None else weight)
        found = {"loss": (_wide(output.loss.detach()), weights)}
        for name, value in output.metrics.items():
            there = ~value.isnan()
            found[name] = (_wide(value.detach()).where(there, 0), _wide(there.float()))
        for side, value in output.token_loss.items():
            tokens = torch.tensor(response_tokens(objective, batch)[side], device=value.device)
            found[f"token_loss/{side}"] = (_wide(value.detach()), weights * tokens)
        for name, (value, count) in found.items():
            of_rows = count if name in output.metrics else weights
            total = torch.stack([(value * of_rows).sum(), count.sum()]) * times
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.real_tokens += batch["real_tokens"] * times
        self.computed_tokens += batch["input_ids"].numel() * times

    def add_value(self, name: str, value: Tensor, count: float) -> None:
        """A value of a whole batch, a scalar, that counts so much."""
        total = torch.stack([_wide(value) * count, torch.full_like(_wide(value), count)])
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def reduced(self, accelerator: Any) -> MetricSums:
        """The sums over all ranks; every rank must call this with the same names."""
        if accelerator.num_processes == 1:
            return self
        device = accelerator.device
        parts = [*self.sums.values(), torch.tensor([float(self.real_tokens), float(self.computed_tokens)])]
        total = accelerator.reduce(torch.cat([_wide(p.to(device)).reshape(-1) for p in parts]), "sum").cpu()
        sums = dict(zip(self.sums, total[:-2].view(-1, 2), strict=True))
        real, computed = (int(value) for value in total[-2:])
        return MetricSums(sums, real, computed, self.started)

    def means(self) -> dict[str, float]:
        """Means over rows, those that no row has left out; the loss with its token-averaged parts."""
        if not self.sums:
            return {}
        totals = dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))
        means = {k: v / n for k, (v, n) in totals.items() if n and not k.startswith("token_loss/")}
        parts = [v / (n or 1) for k, (v, n) in totals.items() if k.startswith("token_loss/")]
        return {**means, "loss": means.get("loss", 0.0) + sum(parts)}

    def speed(self, looking: float = 0.0) -> dict[str, float]:
        """Tokens a second since this was made (all ranks, padding left out), and the share that was padding.

        looking: seconds of that time in which nothing was trained.
        """
        seconds = max(time.perf_counter() - self.started - looking, 1e-9)
        return {
            "tokens_per_second": self.real_tokens / seconds,
            "padding_share": 1 - self.real_tokens / max(self.computed_tokens, 1),
        }


def _wide(values: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return values.float() if values.device.type == "mps" else values.double()
