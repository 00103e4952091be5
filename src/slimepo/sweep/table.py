"""What came of a sweep: figures of every run, means with intervals, differences seed by seed, and what is unfair."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.files import json_lines, read_json, write_text
from slimepo.losses import find_objective, hyperparameters
from slimepo.means import Mean, mean_of
from slimepo.pipeline.folder import made_from
from slimepo.settings import flat
from slimepo.sweep.cells import Cell
from slimepo.sweep.settings import Sweep, arms_of, label
from slimepo.words import ABSENT, nearest, short_number

if TYPE_CHECKING:
    from rich.console import Console

# What a table shows where nothing else is asked for, as far as it was measured.
MEASURES = ("exact_match", "accuracy", "chosen_change", "chosen_fell", "margin", "end_rate", "repetition")
# Settings of an arm that are its own, and no sign of another treatment.
_OWN = ("loss", "name", "loss_options", "reference")
# Arms that saw this much more or less than another did not see the same.
_SAME = 0.02


def figures_of(cell: Cell) -> dict[str, float]:
    """What was measured of a cell: held out, by benchmarks, and at the end of training; nothing while it is not done.

    `chosen_change` and `rejected_change`: of held-out log-probs since the start, in nats a token. Benchmarks:
    `ifeval/prompt_strict` and the like.
    """
    stage = read_json(cell.folder / cell.stage.name / "stage.json")
    if stage is None:
        return {}
    heldout = stage.get("heldout") or {}
    before, after = heldout.get("before", {}), heldout.get("after", {})
    found: dict[str, Any] = {**after, "chosen_fell": heldout.get("chosen_fell")}
    for side in ("chosen", "rejected"):
        if f"logps/{side}" in before and f"logps/{side}" in after:
            found[f"{side}_change"] = after[f"logps/{side}"] - before[f"logps/{side}"]
    for scores in cell.scores:
        benchmark = scores.identity.benchmark
        found |= {f"{benchmark}/{name}": each.value for name, each in scores.measures.items()}
    last: dict[str, Any] = {}
    for line in json_lines(cell.folder / cell.stage.name / "metrics.jsonl"):
        last |= line
    found |= {
        f"train/{key}": value for key, value in last.items() if not key.startswith(("monitor/", "eval_"))
    }
    found |= {"steps": stage["steps"], "seconds": stage["seconds"]}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def write_tables(cells: Sequence[Cell], sweep: Sweep, out: Path, console: Console) -> None:
    """Write runs.csv (a row a run), steps.csv (a row a step of one) and sweep.md (means, intervals, what is not alike).

    Raises:
        InputError: a measure that is asked for was not measured; the tables are written without it.
    """
    figures = {(cell.arm, cell.recipe.seed): figures_of(cell) for cell in cells}
    write_csv(out / "runs.csv", [(cell, figures[cell.arm, cell.recipe.seed]) for cell in cells])
    write_csv(out / "steps.csv", [(cell, line) for cell in cells for line in by_step(cell)])
    known = list(dict.fromkeys(key for found in figures.values() for key in found))
    shown = [name for name in sweep.measures or MEASURES if name in known]
    against = sweep.against or next(iter(arms_of(sweep)))
    rows = rows_of(figures, against, shown, cells)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    notes = [*unfair(cells, figures), *edges(sweep, cells)]
    seeds = f"Means over seeds {', '.join(map(str, sweep.seeds))} with 95 % intervals (Student's t)"
    words = f"{seeds}; Δ is the difference to {against} of the same seed."
    told = ["", "Not alike:", "", *(f"- {note}" for note in notes)] if notes else []
    write_text(out / "sweep.md", "\n".join([words, "", *lines, *told, ""]))
    _print(rows, words, notes, console)
    console.print(f"tables: {out / 'sweep.md'}, every run: {out / 'runs.csv'}")
    # Last, so that what took hours is not lost to a word.
    check_names("measures", sweep.measures, known)


def check_names(key: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Look for the names that a key of the sweep asks for among figures of its runs, `known`; none yet tell nothing.

    Raises:
        InputError: one of them is not there.
    """
    absent = [name for name in asked if name not in known]
    if known and absent:
        measured = ", ".join(name for name in known if not name.startswith("train/"))
        raise InputError(
            f"sweep: {key}: nothing is called {absent[0]!r}{nearest(absent[0], known)}; there are: {measured}. "
            "The runs are kept: the same command with another name goes on from them"
        )


def by_step(cell: Cell) -> list[dict[str, float]]:
    """What the log, the monitor's part of it and the held-out tasks say at each step that they say something of."""
    folder = cell.folder / cell.stage.name
    found: dict[float, dict[str, float]] = {}
    for line in (*json_lines(folder / "answers-by-step.jsonl"), *json_lines(folder / "metrics.jsonl")):
        numbers = {**line, **line.get("figures", {})}
        kept = {key: float(value) for key, value in numbers.items() if type(value) in (int, float)}
        found.setdefault(kept["step"], {}).update(kept)
    return [found[step] for step in sorted(found)]


def write_csv(file: Path, rows: Sequence[tuple[Cell, Mapping[str, float]]]) -> None:
    """A row a line, behind the arm, its point and its seed; a column for every figure that any row has."""
    known = list(dict.fromkeys(key for _, row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "point", "seed", *known])
    for cell, row in rows:
        numbers = [f"{row[key]:.6g}" if key in row else "" for key in known]
        writer.writerow([cell.arm, label(cell.point), cell.recipe.seed, *numbers])
    write_text(file, buffer.getvalue())


def rows_of(
    figures: Mapping[tuple[str, int], Mapping[str, float]],
    against: str,
    shown: Sequence[str],
    cells: Sequence[Cell],
) -> list[list[str]]:
    """The table's cells as text, its header first.

    A mean over fewer runs than are done says so, and a difference that rests on fewer seeds than were asked for.
    """
    rows = [["arm", "at", "seeds", *(word for name in shown for word in (name, "Δ"))]]
    for arm in dict.fromkeys(cell.arm for cell in cells):
        own = [cell for cell in cells if cell.arm == arm]
        of_seed = {cell.recipe.seed: figures[arm, cell.recipe.seed] for cell in own}
        done = {seed: found for seed, found in of_seed.items() if found}
        row = [
            arm,
            label(own[0].point),
            str(len(done)) if len(done) == len(own) else f"{len(done)} of {len(own)}",
        ]
        for name in shown:
            measured = [found[name] for found in done.values() if name in found]
            row.append(_written(mean_of(measured), len(done)))
            others = {seed: figures.get((against, seed), {}) for seed in done}
            differences = [
                found[name] - others[seed][name]
                for seed, found in done.items()
                if name in found and name in others[seed]
            ]
            row.append(ABSENT if arm == against else _written(mean_of(differences), len(own), "+"))
        rows.append(row)
    return rows


def unfair(cells: Sequence[Cell], figures: Mapping[tuple[str, int], Mapping[str, float]]) -> list[str]:
    """What arms differ in beside their objective: settings, terms of their own, rows and tokens learnt from.

    The last two are compared seed by seed, as figures are; told are those of the seed in which arms differ most.
    """
    notes: list[str] = []
    firsts: dict[str, Cell] = {}
    for cell in cells:
        firsts.setdefault(cell.arm, cell)
    settings = {arm: _settings(cell) for arm, cell in firsts.items()}
    for key in dict.fromkeys(key for each in settings.values() for key in each):
        values: dict[str, list[str]] = {}
        for arm, each in settings.items():
            values.setdefault(str(each.get(key, "not set")), []).append(arm)
        if len(values) > 1:
            told = "; ".join(f"{value}: {', '.join(arms)}" for value, arms in values.items())
            notes.append(f"{key} differs ({told})")
    for arm, cell in firsts.items():
        options = cell.stage.loss_options
        weight = (hyperparameters(find_objective(cell.stage.loss).function) | options).get("nll_weight", 0)
        if weight:
            notes.append(f"{arm} has a likelihood term of its own (nll_weight {weight:g})")
    seen: dict[str, dict[int, dict[str, float]]] = {"rows": {}, "tokens": {}}
    for cell in cells:
        for what, amount in _seen(cell, figures[cell.arm, cell.recipe.seed]).items():
            seen[what].setdefault(cell.recipe.seed, {})[cell.arm] = amount
    for what, of_seed in seen.items():
        ratios = {seed: max(found.values()) / max(min(found.values()), 1) for seed, found in of_seed.items()}
        worst = max(ratios, key=lambda seed: ratios[seed], default=None)
        if worst is not None and ratios[worst] > 1 + _SAME:
            told = ", ".join(f"{arm} {amount:,.0f}" for arm, amount in of_seed[worst].items())
            notes.append(f"{what} learnt from with seed {worst}: {told}")
    return notes


def edges(sweep: Sweep, cells: Sequence[Cell]) -> list[str]:
    """Arms whose best point is at the end of what was searched, so that a better one may lie beyond."""
    grid = sweep.search.grid if sweep.search else {}
    numbers = {
        key: values for key, values in grid.items() if {type(value) for value in values} <= {int, float}
    }
    ends = {key: (min(values), max(values)) for key, values in numbers.items() if len(values) > 2}
    return [
        f"{arm}: the best {key} of the search, {short_number(point[key])}, is at its end: a better one may lie beyond"
        for arm, point in {cell.arm: cell.point for cell in cells}.items()
        for key, bounds in ends.items()
        if point.get(key) in bounds
    ]


def _settings(cell: Cell) -> dict[str, Any]:
    """What a cell is made from, without its seed, its objective, and what the search chose."""
    made = flat(made_from(cell.recipe, cell.stage.name))
    chosen = {f"stage.{key}" for key in cell.point}
    return {
        key.removeprefix("stage."): value
        for key, value in made.items()
        if key != "seed"
        and key not in chosen
        and not any(f"{key}.".startswith(f"stage.{own}.") for own in _OWN)
    }


def _seen(cell: Cell, figures: Mapping[str, float]) -> dict[str, float]:
    """Rows and response tokens learnt from: those of the part as often as they were seen, or all that were sampled."""
    if not figures:
        return {}
    seen = {"rows": figures["steps"] * cell.stage.batch_size}
    data = read_json(cell.folder / cell.stage.name / "data.json") or {}
    if "train/sampled/total" in figures:
        seen["tokens"] = figures["train/sampled/total"]
    elif data.get("response_tokens"):
        seen["tokens"] = seen["rows"] * data["response_tokens"] / data["kept"]
    return seen


def _written(mean: Mean, asked: int, sign: str = "") -> str:
    if not mean.n:
        return ABSENT
    digits = max(0, 2 - math.floor(math.log10(max(abs(mean.value), mean.half if mean.half > 0 else 0, 1e-4))))
    value = f"{mean.value:{sign}z.{min(digits, 4)}f}"
    half = "" if math.isnan(mean.half) else f" ± {mean.half:.{min(digits, 4)}f}"
    return f"{value}{half}" + (f" ({mean.n} of {asked})" if mean.n < asked else "")


def _print(rows: Sequence[Sequence[str]], words: str, notes: Sequence[str], console: Console) -> None:
    if console.is_terminal:
        from rich.table import Table

        table = Table(*rows[0])
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    else:
        for row in rows:
            console.print(" | ".join(row))
    console.print(words)
    for note in notes:
        console.print(f"not alike: {note}", style="yellow")
