"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(results: Sequence[dict[str, Any]], out: Path, console: Console) -> None:
    """What each stage did to the held-out pairs, and where the model is."""
    from rich.table import Table

    table = Table(title="held-out pairs, before → after each stage", title_justify="left")
    for column in ("stage", "steps", "time", "chosen", "rejected", "accuracy", "chosen fell", "under floor"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=column != "stage")
    for result in results:
        table.add_row(result["name"], str(result["steps"]), _clock(result["seconds"]), *_heldout(result))
    console.print(table)
    console.print(
        "chosen, rejected: nats per token; under floor: rejected tokens below -threshold", style="dim"
    )
    console.print(f"model: {out / results[-1]['name'] / 'model'}", highlight=False, soft_wrap=True)


def _heldout(result: dict[str, Any]) -> list[str]:
    if "heldout" not in result:
        return ["-"] * 5
    before, after = result["heldout"]["before"], result["heldout"]["after"]
    return [
        f"{before['logps/chosen']:.3f} → {after['logps/chosen']:.3f}",
        f"{before['logps/rejected']:.3f} → {after['logps/rejected']:.3f}",
        f"{before['accuracy']:.0%} → {after['accuracy']:.0%}",
        f"{result['heldout']['chosen_fell']:.0%}",
        f"{before['rejected_below_floor']:.0%} → {after['rejected_below_floor']:.0%}",
    ]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
