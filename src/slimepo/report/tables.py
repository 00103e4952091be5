"""The report's tables as cells of text: what the page, Markdown and the terminal show alike."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from slimepo.means import mean_of
from slimepo.report.groups import (
    Cell,
    Group,
    change,
    changes,
    group_records,
    plain_label,
    series_label,
    told,
    written,
)
from slimepo.report.records import Record, Source
from slimepo.words import ABSENT, short_number

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable


class Column(NamedTuple):
    """A column of groups: heading on the page, its cells, and the heading in the terminal (none: not there)."""

    head: str
    cell: Callable[[Group], Cell | str]
    short: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a table. `error` says why a run has no result, `note` what its name leaves out."""

    label: str
    cells: tuple[Cell | str, ...]
    note: str = ""
    error: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Headings, the first of them over the labels, and lines with as many cells as the others.

    `same` are headings of columns that are left out, with what stands in all of their cells.
    """

    heads: tuple[str, ...]
    lines: list[Line] = field(default_factory=list)
    same: tuple[tuple[str, Cell | str], ...] = ()


def _after(key: str, form: str, scale: float = 1) -> Callable[[Group], Cell]:
    return lambda group: written(group.after(key), form, scale)


# What became better first, then what became of the chosen answers.
RESULTS = (
    Column("exact match, %", lambda g: change(g, "exact_match", ".1f", 100), "exact, %"),
    Column("chosen, nats/token", lambda g: change(g, "logps/chosen", ".3f"), "chosen"),
    Column("chosen fell, %", lambda g: written(g.spread(lambda r: r.chosen_fell), ".1f", 100), "fell"),
    Column("under floor, %", lambda g: change(g, "rejected_below_floor", ".1f", 100), "floor"),
    Column("rejected, nats/token", lambda g: change(g, "logps/rejected", ".3f"), "reject."),
    Column("chosen likelier, %", lambda g: change(g, "accuracy", ".1f", 100)),
    Column("valid format, %", _after("format_valid", ".1f", 100), "valid"),
    Column("end token, %", _after("end_rate", ".1f", 100), "ends"),
    Column("repaired, %", lambda g: change(g, "repaired", ".1f", 100), "rep'd"),
    Column("cost", lambda g: change(g, "cost", ".4f")),
    Column("repetition, %", _after("repetition", ".1f", 100), "rep."),
)
# Heading, key of a figure after training, digits, factor.
_DIFFERENCES = (
    ("exact match, points", "exact_match", 1, 100),
    ("chosen, nats/token", "logps/chosen", 3, 1),
    ("rejected, nats/token", "logps/rejected", 3, 1),
    ("under floor, points", "rejected_below_floor", 1, 100),
    ("chosen likelier, points", "accuracy", 1, 100),
)
_TERMINAL_NOTES = (
    "exact, chosen, floor, reject.: the change since the start below; chosen, reject.: nats per token",
    "rep.: answers that loop; fell: pairs whose chosen answer became less likely",
    "floor: rejected tokens under the floor of SLIME's rejected term",
)
_SEEDS_NOTE = "several seeds: means, each change from its seed's own start ± its 95 % interval; else medians"


def results(groups: Sequence[Group], sources: Sequence[Source]) -> Table:
    """What training did to held-out data, a line a group, under the line of what all started from.

    A column in which all lines say the same is told apart.
    """
    starts = start_groups(sources)
    shown = [*starts, *groups]
    best = best_group(groups)
    lines = [
        Line(
            group.label,
            tuple(column.cell(group) for column in RESULTS),
            note="" if group in starts else objective_note(group),
            error=trouble(group),
            best=group is best,
        )
        for group in shown
    ]
    table = filled("run", [column.head for column in RESULTS], lines)
    cells = [{line.cells[at] for line in table.lines} for at in range(len(table.heads) - 1)]
    # What has a change is what the page is about, whatever it is.
    folded = [
        at
        for at, each in enumerate(cells)
        if len(lines) > 1 and len(each) == 1 and not any(isinstance(c, Cell) and c.change for c in each)
    ]
    kept = [at for at in range(len(cells)) if at not in folded]
    return Table(
        ("run", *(table.heads[at + 1] for at in kept)),
        [replace(line, cells=tuple(line.cells[at] for at in kept)) for line in table.lines],
        tuple((table.heads[at + 1], cells[at].pop()) for at in folded),
    )


def results_in_terminal(sources: Sequence[Source]) -> TerminalTable:
    """The results of a run, or of one with other seeds, for a terminal of 100 columns or more."""
    from rich import box
    from rich.table import Table as TerminalTable
    from rich.text import Text

    groups = group_records([record for source in sources for record in source.records])
    controls = [group.label for group in groups if group.first.loss == "sft"]
    notes = [f"{group.label} {trouble(group)}" for group in groups if trouble(group)]
    notes += [f"{', '.join(controls)}: the control, plain SFT on the chosen answers"] if controls else []
    several = any(len(group.records) > 1 for group in groups)
    table = TerminalTable(
        title=Text((sources[0].path if len(sources) == 1 else sources[0].path.parent).resolve().name),
        title_justify="left",
        caption=Text("\n".join([*notes, *_TERMINAL_NOTES, *([_SEEDS_NOTE] if several else [])])),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    columns = [column for column in RESULTS if column.short]
    table.add_column("run", overflow="fold", min_width=10)
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    best = best_group(groups)
    for group in [*start_groups(sources), *groups]:
        row = [Text(group.label)]
        for at, cell in enumerate(column.cell(group) for column in columns):
            # A spread over seeds is left out; a change stands below.
            figure, change = (cell.figure, cell.change) if isinstance(cell, Cell) else (cell, "")
            # Of several seeds the others may have figures.
            figure = "stopped" if at == 0 and trouble(group) and figure == ABSENT else figure
            row.append(Text(f"{figure}\n{change}" if change else figure))
        table.add_row(*row, style="bold" if group is best else None)
    return table


def objective_note(group: Group) -> str:
    """Objective, its options, learning rate and seeds: what a run's name leaves out."""
    first = group.first
    name, words = group.label.lower(), []
    if not re.search(rf"\b{re.escape(first.loss.lower())}\b", name):
        words.append(series_label(first.loss))
    options = {key: value for key, value in first.settings.items() if key.startswith("loss_options.")}
    words += [f"{key.removeprefix('loss_options.')} {told(value)}" for key, value in options.items()]
    if first.learning_rate is not None and short_number(first.learning_rate) not in name:
        words.append(f"learning rate {short_number(first.learning_rate)}")
    if len(group.records) > 1:
        words.append("seeds " + ", ".join(str(record.seed) for record in group.records))
    return ", ".join(words)


def trouble(group: Group) -> str:
    """Why runs of a group have no end, in a line; empty where all have one."""
    words = {"failed": "stopped", "unfinished": "not finished", "stopped": "stopped by the monitor"}
    found = [(r, f"{words[r.state]}: {r.note}") for r in group.records if r.state != "finished"]
    if len(group.records) == 1:
        return found[0][1] if found else ""
    return "; ".join(f"seed {record.seed} {text}" for record, text in found)


def best_group(groups: Sequence[Group]) -> Group | None:
    """The group with the highest exact match; None where it was not measured or there is nothing to compare.

    Of groups with other seeds, and so other starts, the one that gained most (`other_seeds`).
    """
    have = [(mean, group) for group in groups if (mean := group.mean("exact_match")) is not None]
    if other_seeds(groups):
        have = [(statistics.fmean(changes(group, "exact_match")), group) for _, group in have]
    return max(have, key=lambda each: each[0])[1] if have else None


def other_seeds(groups: Sequence[Group]) -> bool:
    """Whether groups whose exact match was measured before and after have not all the same seeds."""
    have = [group for group in groups if group.mean("exact_match") is not None]
    seeds = {frozenset(record.seed for record in group.records) for group in have}
    return len(seeds) > 1 and all(changes(group, "exact_match") for group in have)


def start_groups(sources: Sequence[Source]) -> list[Group]:
    """The models that records of a run started from, a group each, a record a run; none where no run compares any."""
    found: dict[str, list[Record]] = {}
    for at, source in enumerate(sources):
        own = [record for record in source.records if record.start and record.before]
        for name in dict.fromkeys(record.start for record in own) if len(own) > 1 else ():
            of_start = [record for record in own if record.start == name]
            first = of_start[0]
            # Of other pairs or tasks, one line would not be true of all.
            if all(same_start(record.before, first.before) for record in of_start):
                start = Record(f"start: {name}", "", "", after=first.before, seed=at)
                found.setdefault(start.name, []).append(start)
    return [Group(name, tuple(records)) for name, records in found.items()]


def start_group(sources: Sequence[Source]) -> Group | None:
    """What all records started from; None where they started from several models, or no run compares any."""
    found = start_groups(sources)
    if len(found) > 1 and all(same_start(each.first.after, found[0].first.after) for each in found):
        # The same model, under other names in other runs.
        return Group("start", tuple(record for group in found for record in group.records))
    return found[0] if len(found) == 1 else None


def common_start(groups: Sequence[Group]) -> dict[str, float]:
    """The figures before training, which are a line in every picture, where all runs have the same; else none."""
    found = [record.before for group in groups for record in group.records if record.before]
    return found[0] if found and all(same_start(each, found[0]) for each in found) else {}


def same_start(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether figures before training are those of one model on one set of pairs and tasks."""
    keys = [key for key in ("logps/chosen", "logps/rejected", "exact_match") if key in one or key in other]
    return bool(keys) and all(
        key in one and key in other and abs(one[key] - other[key]) < 1e-3 for key in keys
    )


def differences(groups: Sequence[Group]) -> Table:
    """How groups differ from the control (else the first), seed by seed: of seeds that both have, from one start.

    Seeds share their start and data, so that a difference is surer than the figures that it is of. Empty where no
    group has two such seeds.
    """
    base = next((group for group in groups if group.first.loss == "sft"), groups[0] if groups else None)
    lines = []
    for group in groups if base else ():
        own = {record.seed: record for record in base.records} if base else {}
        pairs = [
            (r, own[r.seed])
            for r in group.records
            if r.seed in own and same_start(r.before, own[r.seed].before)
        ]
        if group is base or len(pairs) < 2:
            continue
        cells = []
        for _, key, form, scale in _DIFFERENCES:
            moved = mean_of(
                [scale * (r.after[key] - o.after[key]) for r, o in pairs if key in r.after and key in o.after]
            )
            half = f" ± {moved.half:.{form}f}" if moved.n > 1 else ""
            cells.append(f"{moved.value:+z.{form}f}{half}" if moved.n else ABSENT)
        lines.append(Line(plain_label(group), (*cells, str(len(pairs)))))
    heads = [*(head for head, *_ in _DIFFERENCES), "seeds"]
    return (
        filled(f"compared with {plain_label(base)}" if base else "", heads, lines) if lines else Table(("",))
    )


def in_blocks(groups: Sequence[Any], width: int = 6) -> list[tuple[int, int]]:
    """Slices of what stands side by side in one table or picture: at most `width`, as even as can be."""
    blocks = max(1, -(-len(groups) // width))
    each = max(1, -(-len(groups) // blocks))
    return [(at, min(at + each, len(groups))) for at in range(0, len(groups), each)]


def filled(first: str, heads: Sequence[str], lines: Sequence[Line]) -> Table:
    """A table without the columns in which nothing stands."""
    kept = [at for at in range(len(heads)) if any(str(line.cells[at]) != ABSENT for line in lines)]
    shown = [replace(line, cells=tuple(line.cells[at] for at in kept)) for line in lines]
    return Table((first, *(heads[at] for at in kept)), shown)
