"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.monitor.verdicts import heldout_facts

if TYPE_CHECKING:
    from rich.console import Console

# What is held out, in words: label, key, form.
FIGURES = (
    ("chosen, nats per token", "logps/chosen", "{:z.3f}"),
    ("rejected, nats per token", "logps/rejected", "{:z.3f}"),
    ("margin, nats per token", "margin", "{:z.3f}"),
    ("chosen likelier than rejected", "accuracy", "{:.1%}"),
    ("rejected tokens under the floor", "rejected_below_floor", "{:.1%}"),
    ("right answers to tasks", "exact_match", "{:.1%}"),
    ("answers of valid form", "format_valid", "{:.1%}"),
    ("answers that end", "end_rate", "{:.1%}"),
    ("answers that the repair changed", "repaired", "{:.1%}"),
    ("cost of valid answers", "cost", "{:.4g}"),
)
# What a stage's time went to, but for what it took to set up; `before` is not in it.
TIMES = {"training": ["training"], "monitor": ["monitor"], "held out": ["answers_by_step", "after"]}


def print_summary(results: Sequence[dict[str, Any]], out: Path, console: Console) -> None:
    """What each stage did to the held-out pairs and tasks, and where the model is."""
    from rich.table import Table

    held = [result.get("heldout", {}) for result in results]
    counts = [
        f"{' / '.join(found)} held-out {what if found != ['1'] else what[:-1]}"
        for what in ("pairs", "prompts")
        if (found := sorted({str(each[what]) for each in held if what in each}))
    ]
    table = Table(title=f"{', '.join(counts) or 'no held-out pairs'}, before → after", title_justify="left")
    table.add_column()
    for result in results:
        table.add_column(result["name"], justify="right", no_wrap=True)
    for label, key, form in FIGURES:
        cells = [
            f"{form.format(each['before'][key])} → {form.format(each['after'][key])}"
            if key in each.get("after", {})
            else "-"
            for each in held
        ]
        if key.startswith("logps") or any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    fell = [f"{each['chosen_fell']:.1%}" if "chosen_fell" in each else "-" for each in held]
    table.add_row("pairs whose chosen answer fell", *fell)
    table.add_row("steps, time", *(f"{r['steps']}, {_minutes(r['seconds'])}" for r in results))
    for label, parts in TIMES.items():
        # A stage of an earlier version has no parts.
        spent = [sum(r["times"][part] for part in parts) if "times" in r else None for r in results]
        table.add_row(f"  of it {label}", *("-" if each is None else _minutes(each) for each in spent))
    console.print(table)
    for result in results:
        stopped = (result.get("monitor") or {}).get("stopped")
        if stopped:
            told = f"{result['name']} was stopped at step {stopped['step']}: {stopped['message']}"
            console.print(told, style="yellow")
    for number, fact in enumerate(final_facts(results[-1]), 1):
        console.print(f"{number}. {fact}")
    page = out / "report.html"
    for what, where in {
        "run folder": out,
        "model": out / results[-1]["name"] / "model",
        "report": page if page.exists() else f"slimepo report {out}",
    }.items():
        console.print(f"{what}: {where}")


def _minutes(seconds: float) -> str:
    return "{}:{:02d}".format(*divmod(round(seconds), 60))


def final_facts(result: dict[str, Any]) -> list[str]:
    """What matters most about a stage, in plain words: its monitor's facts, else those of its held-out pairs."""
    monitor = result.get("monitor")
    if monitor is not None:
        return list(monitor["facts"])
    return heldout_facts(result["heldout"]) if "pairs" in result.get("heldout", {}) else []
