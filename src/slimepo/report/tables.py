"""The report's tables as text cells: what the page, Markdown and the terminal show alike."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from slimepo.report.groups import (
    Group,
    after,
    change,
    count,
    duration,
    group_records,
    percent,
    series_label,
    size,
    told,
    written,
)
from slimepo.report.records import ABSENT, Record, Source, mapping, number, numbers, short_number

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable


class Column(NamedTuple):
    """A column of the results: heading on the page, heading in the terminal (none: not there), and its cells."""

    head: str
    short: str
    cell: Callable[[Group], str]


@dataclass(frozen=True)
class Line:
    """One line of a table. `error` says why a run has no result, `note` what its name leaves out."""

    label: str
    cells: tuple[str, ...]
    note: str = ""
    error: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Headings, the first of them over the labels, and lines with as many cells as the others."""

    heads: tuple[str, ...]
    lines: list[Line] = field(default_factory=list)


COLUMNS = (
    Column("exact match, %", "exact, %", lambda g: change(g, "exact_match", ".1f", 100)),
    Column("valid format, %", "valid", lambda g: after(g, "format_valid", ".1f", 100)),
    Column("end token, %", "ends", lambda g: after(g, "end_rate", ".1f", 100)),
    Column("repetition, %", "rep.", lambda g: after(g, "repetition", ".1f", 100)),
    Column("chosen, nats/token", "chosen", lambda g: change(g, "logps/chosen", ".2f")),
    Column("rejected, nats/token", "reject.", lambda g: after(g, "logps/rejected", ".2f")),
    Column("margin, nats/token", "", lambda g: after(g, "margin", ".2f")),
    Column("chosen likelier, %", "", lambda g: after(g, "accuracy", ".1f", 100)),
    Column("chosen fell, %", "fell", lambda g: written(g.spread(lambda r: r.chosen_fell), ".1f", 100)),
    Column("under floor, %", "floor", lambda g: after(g, "rejected_below_floor", ".1f", 100)),
)
_TERMINAL_NOTES = (
    "exact, chosen: before → after; chosen, reject.: nats per token",
    "rep.: answers that loop; fell: pairs whose chosen answer became less likely",
    "floor: rejected tokens under the floor of SLIME's rejected term",
)
_SEEDS_NOTE = (
    "several seeds: medians; in brackets the smallest and the largest change since a seed's own start"
)


def results(groups: Sequence[Group], sources: Sequence[Source]) -> Table:
    """What training did to held-out data, a line a group, under the line of what all started from."""
    start = start_group(sources)
    shown = [*([start] if start else []), *groups]
    cells = {group.label: [column.cell(group) for column in COLUMNS] for group in shown}
    kept = [at for at in range(len(COLUMNS)) if any(cells[group.label][at] != ABSENT for group in shown)]
    best = best_group(groups)
    lines = [
        Line(
            group.label,
            tuple(cells[group.label][at] for at in kept),
            note="" if group is start else objective_note(group),
            error=trouble(group),
            best=group is best,
        )
        for group in shown
    ]
    return Table(("run", *(COLUMNS[at].head for at in kept)), lines)


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
    columns = [column for column in COLUMNS if column.short]
    table.add_column("run", overflow="fold", min_width=10)
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    start, best = start_group(sources), best_group(groups)
    for group in [*([start] if start else []), *groups]:
        cells = [column.cell(group) for column in columns]
        # Of several seeds the others may have figures.
        cells = ["stopped", *cells[1:]] if trouble(group) and cells[0] == ABSENT else cells
        row = map(Text, (group.label, *map(_narrow, cells)))
        table.add_row(*row, style="bold" if group is best else None)
    return table


def _narrow(cell: str) -> str:
    """A cell without its spread over seeds; that of a change stands below it."""
    median, bracket, spread = cell.partition(" (")
    return f"{median}\n({spread}" if bracket and "→" in median else median


def objective_note(group: Group) -> str:
    """Objective, its options, learning rate and seeds: what a run's name leaves out."""
    first = group.first
    options = {
        k.removeprefix("loss_options."): v for k, v in first.settings.items() if k.startswith("loss_options.")
    }
    name, words = group.label.lower(), []
    if not re.search(rf"\b{re.escape(first.loss.lower())}\b", name):
        words.append(series_label(first.loss))
    words += [f"{key} {told(value)}" for key, value in options.items()]
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
    """The group with the highest exact match; None where it was not measured or there is nothing to compare."""
    have = [(value.median, group) for group in groups if (value := exact_match(group)) is not None]
    return max(have, key=lambda each: each[0])[1] if have else None


def exact_match(group: Group) -> Any:
    """The exact match of a group over its seeds."""
    return group.spread(lambda record: record.after.get("exact_match"))


def start_group(sources: Sequence[Source]) -> Group | None:
    """The models that the records of a run all started from, a record a run; None where no run compares any."""
    found: list[Record] = []
    for source in sources:
        own = [record for record in source.records if record.start and record.before]
        if len(own) > 1 and all(same_start(record.before, own[0].before) for record in own):
            first = own[0]
            found.append(Record(f"start: {first.start}", "", "", "", after=first.before, seed=len(found)))
    names = {record.name for record in found}
    return Group(names.pop() if len(names) == 1 else "start", "", tuple(found)) if found else None


def same_start(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether figures before training are those of one model on one set of pairs and tasks."""
    keys = [key for key in ("logps/chosen", "logps/rejected", "exact_match") if key in one or key in other]
    return bool(keys) and all(
        key in one and key in other and abs(one[key] - other[key]) < 1e-3 for key in keys
    )


def speed(groups: Sequence[Group], sources: Sequence[Source]) -> Table:
    """Tokens per second, steps, time, memory: medians over the log lines and seeds; time of what came before."""
    rows = [
        (
            group.label,
            (
                count(_median(group, "tokens_per_second")),
                _share(_median(group, "padding_share")),
                written(group.spread(lambda r: r.steps), ",.0f"),
                duration(seconds.median) if (seconds := group.spread(lambda r: r.seconds)) else ABSENT,
                size(memory.high) if (memory := group.spread(lambda r: r.peak_memory)) else ABSENT,
                str(group.first.facts.get("layout") or ABSENT),
                count(group.first.facts.get("trained_parameters")),
            ),
        )
        for group in groups
    ]
    before = {
        name: [s.seconds[name] for s in sources if name in s.seconds] for s in sources for name in s.seconds
    }
    rows += [
        (name, (ABSENT, ABSENT, ABSENT, duration(statistics.median(times)), ABSENT, ABSENT, ABSENT))
        for name, times in before.items()
    ]
    heads = ("tokens/s", "padding, %", "steps", "time", "peak memory", "layout", "trained parameters")
    return _filled("run", heads, rows)


def data_facts(groups: Sequence[Group], sources: Sequence[Source]) -> Table:
    """Rows by part, what was kept and what was dropped, a line a group."""
    data = {str(source.path): source.data for source in sources}
    reasons = list(
        dict.fromkeys(key for group in groups for record in group.records for key in record.dropped)
    )
    heads = [
        "rows read",
        "malformed",
        "held-out pairs",
        "trained on",
        *(f"dropped: {reason}" for reason in reasons),
    ]
    rows = []
    for group in groups:
        first = group.first
        facts = data.get(first.source, {})
        rows.append(
            (
                group.label,
                (
                    count(facts.get("rows")),
                    count(facts.get("malformed")),
                    count(first.heldout),
                    count(first.kept),
                    *(
                        count(first.dropped.get(reason, 0.0 if first.kept is not None else None))
                        for reason in reasons
                    ),
                ),
            )
        )
    return _filled("run", heads, rows)


def pair_facts(sources: Sequence[Source]) -> Table:
    """How the pairs that runs made themselves came about, a line a set."""
    found = [
        (
            f"{source.path.resolve().name}/{name}" if len(sources) > 1 else name,
            which,
            mapping(facts.get(which)),
        )
        for source in sources
        for name, facts in source.pairs.items()
        for which in ("train", "heldout")
        if mapping(facts.get(which))
    ]
    keys = list(dict.fromkeys(key for *_, counts in found for key in counts))
    rows = []
    for label, which, counts in found:
        cells = []
        for key in keys:
            # What happened to pairs is told as a share of them too.
            share = key.endswith(("_chosen", "_rejected")) and number(counts.get("pairs"))
            part = (
                f" ({percent(counts[key] / counts['pairs'], 1)})" if share and number(counts.get(key)) else ""
            )
            cells.append(count(counts.get(key)) + part)
        rows.append((f"{label}, {'for training' if which == 'train' else 'held out'}", cells))
    words = {
        "tasks": "tasks sampled",
        "gold_chosen": "chosen is the given answer (no sample was right)",
        "invalid_rejected": "rejected is wrong in form",
    }
    return _filled("pairs", [words.get(key, key) for key in keys], rows)


def settings_blocks(groups: Sequence[Any], width: int = 6) -> list[tuple[int, int]]:
    """Slices of the groups that stand side by side in one table or picture: at most `width`, as even as can be."""
    blocks = max(1, -(-len(groups) // width))
    each = max(1, -(-len(groups) // blocks))
    return [(at, min(at + each, len(groups))) for at in range(0, len(groups), each)]


def _median(group: Group, key: str) -> float | None:
    # The first line has what a start costs (compiling, warming up) in it.
    lines = [line[key] for r in group.records for line in (r.curve[1:] or r.curve) if key in numbers(line)]
    return statistics.median(lines) if lines else None


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}"


def _filled(first: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """A table without the columns in which nothing stands."""
    kept = [at for at in range(len(heads)) if any(cells[at] != ABSENT for _, cells in rows)]
    lines = [Line(label, tuple(cells[at] for at in kept)) for label, cells in rows]
    return Table((first, *(heads[at] for at in kept)), lines if kept else [])
