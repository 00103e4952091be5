"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.monitor.verdicts import heldout_facts

if TYPE_CHECKING:
    from rich.console import Console

_FIGURES = (
    ("chosen, nats per token", "logps/chosen", "{:z.3f}"),
    ("rejected, nats per token", "logps/rejected", "{:z.3f}"),
    ("margin, nats per token", "margin", "{:z.3f}"),
    ("chosen likelier than rejected", "accuracy", "{:.1%}"),
    ("rejected tokens under the floor", "rejected_below_floor", "{:.1%}"),
)


def print_summary(results: Sequence[dict[str, Any]], out: Path, console: Console) -> None:
    """What each stage did to the held-out pairs, and where the model is."""
    from rich.table import Table

    counts = {str(r["heldout"]["pairs"]) for r in results if "heldout" in r}
    title = f"{' / '.join(sorted(counts)) or 'no'} held-out pairs, before → after"
    table = Table(title=title, title_justify="left")
    table.add_column()
    for result in results:
        table.add_column(result["name"], justify="right", no_wrap=True)
    for label, key, form in _FIGURES:
        table.add_row(label, *(_change(result, key, form) for result in results))
    table.add_row("pairs whose chosen answer fell", *(_fell(result) for result in results))
    table.add_row("steps, time", *(f"{r['steps']}, {_clock(r['seconds'])}" for r in results))
    console.print(table)
    for result in results:
        stopped = (result.get("monitor") or {}).get("stopped")
        if stopped:
            console.print(
                f"{result['name']} was stopped at step {stopped['step']}: {stopped['message']}",
                style="yellow",
            )  # fmt: skip
    for number, fact in enumerate(final_facts(results[-1]), 1):
        console.print(f"{number}. {fact}")
    page = out / "report.html"
    for what, where in {
        "run folder": out,
        "model": out / results[-1]["name"] / "model",
        "report": page if page.exists() else f"slimepo report {out}",
    }.items():
        console.print(f"{what}: {where}")


def final_facts(result: dict[str, Any]) -> list[str]:
    """What matters most about a stage, in plain words: its monitor's facts, else those of its held-out pairs."""
    monitor = result.get("monitor")
    if monitor is not None:
        return list(monitor["facts"])
    return heldout_facts(result["heldout"]) if "heldout" in result else []


def _change(result: dict[str, Any], key: str, form: str) -> str:
    if "heldout" not in result:
        return "-"
    if key not in result["heldout"]["after"]:
        return "-"
    before, after = result["heldout"]["before"][key], result["heldout"]["after"][key]
    return f"{form.format(before)} → {form.format(after)}"


def _fell(result: dict[str, Any]) -> str:
    return f"{result['heldout']['chosen_fell']:.1%}" if "heldout" in result else "-"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
