"""What is done when chosen answers are unlearnt: a lower learning rate, or a stronger anchor."""

from __future__ import annotations

from typing import Any

from slimepo.monitor.record import MonitorRecord

# Each time. A rate at which answers are unlearnt is often ten times too high, and there are few looks.
RATE_FACTOR = 0.25
ANCHOR_FACTOR = 4.0


def still_falls(record: MonitorRecord) -> bool:
    """Whether chosen answers that a warning of unlearning is about have fallen further since the look before."""
    before, now = record.of_kind("probe")[-2:]
    return any(
        on and kind == "unlearning" and now[rows]["chosen_change"] < before[rows]["chosen_change"]
        for (kind, rows), on in record.on.items()
        if rows is not None
    )


def lower_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Every learning rate times `factor`, now and in all that the schedule has to come; a checkpoint has it so too."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    # Accelerate's stands around the schedule itself. What it gave last is what the log has next.
    schedule = getattr(scheduler, "scheduler", scheduler)
    for rates in ("base_lrs", "_last_lr"):
        if hasattr(schedule, rates):
            setattr(schedule, rates, [rate * factor for rate in getattr(schedule, rates)])
