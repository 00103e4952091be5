"""How the figures came about, as tables: speed, data, pairs that runs made, searches, first numbers compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from slimepo.pipeline.console import TIMES
from slimepo.report.groups import Cell, Group, count, duration, percent, size, told, written
from slimepo.report.records import Source, items, mapping, number, numbers
from slimepo.report.tables import Column, Line, Table, filled
from slimepo.words import ABSENT


def _part(parts: Sequence[str], group: Group) -> str:
    """The time of these parts of a stage, the median of the runs that know it."""
    known = [sum(record.times.get(part, 0.0) for part in parts) for record in group.records if record.times]
    return duration(statistics.median(known)) if known else ABSENT


SPEED = (
    Column("tokens/s", lambda g: count(_median(g, "tokens_per_second"))),
    Column(
        "padding, %", lambda g: ABSENT if (p := _median(g, "padding_share")) is None else f"{100 * p:.1f}"
    ),
    Column("steps", lambda g: written(g.spread(lambda r: r.steps), ",.0f")),
    Column("time", lambda g: duration(s.median) if (s := g.spread(lambda r: r.seconds)) else ABSENT),
    *(Column(f"of it {label}", partial(_part, parts)) for label, parts in TIMES.items()),
    Column("peak memory", lambda g: size(m.high) if (m := g.spread(lambda r: r.peak_memory)) else ABSENT),
    Column("layout", lambda g: g.first.layout or ABSENT),
    Column("trained parameters", lambda g: count(g.first.trained_parameters)),
    Column("ranks", lambda g: count(g.first.certificate.get("ranks"))),
)
# Points of a search that a table has room for.
_MOST_POINTS = 8


def speed(groups: Sequence[Group], sources: Sequence[Source]) -> Table:
    """Tokens per second, steps, time, memory: medians over the log lines and seeds; time of what came before."""
    lines = [Line(group.label, tuple(column.cell(group) for column in SPEED)) for group in groups]
    times: dict[str, list[float]] = {}
    for source in sources:
        for name, seconds in source.seconds.items():
            times.setdefault(name, []).append(seconds)
    for name, each in times.items():
        took = duration(statistics.median(each))
        lines.append(Line(name, tuple(took if column.head == "time" else ABSENT for column in SPEED)))
    return filled("run", [column.head for column in SPEED], lines)


def data_facts(groups: Sequence[Group], sources: Sequence[Source]) -> Table:
    """What became of the rows of the data, a line a group: every one of them is in one of the columns."""
    data = {str(source.path): source.data for source in sources}
    records = [record for group in groups for record in group.records]
    reasons = list(dict.fromkeys(key for record in records for key in record.dropped))
    reasons_heldout = list(dict.fromkeys(key for record in records for key in record.dropped_heldout))
    lines = []
    for group in groups:
        first, facts = group.first, data.get(group.first.source, {})
        rows, malformed = number(facts.get("rows")), number(facts.get("malformed"))
        ties, unjudged = (number(facts.get(key)) for key in ("ties", "without_verdict"))
        # What could be read is counted behind all that could not.
        counts = [None if rows is None else rows + sum(each or 0 for each in (malformed, ties, unjudged))]
        counts += [
            malformed,
            ties or None,
            unjudged or None,
            number(facts.get("in_no_part")) or None,
            first.kept,
        ]
        counts += [first.dropped.get(reason, None if first.kept is None else 0.0) for reason in reasons]
        counts += [first.heldout, *(first.dropped_heldout.get(reason, 0.0) for reason in reasons_heldout)]
        lines.append(Line(group.label, tuple(map(count, counts))))
    heads = ["rows in the file", "malformed", "ties", "without a verdict", "in no part", "trained on"]
    heads += [f"dropped: {reason}" for reason in reasons]
    heads += ["held-out pairs", *(f"held out, dropped: {reason}" for reason in reasons_heldout)]
    return filled("run", heads, lines)


def pair_facts(sources: Sequence[Source]) -> Table:
    """How the pairs that runs made themselves came about, a line a set."""
    sets: list[tuple[str, dict[str, Any]]] = []
    for source in sources:
        for name, facts in source.pairs.items():
            label = f"{source.path.resolve().name}/{name}" if len(sources) > 1 else name
            for part, words in (("train", "for training"), ("heldout", "held out")):
                if counts := mapping(facts.get(part)):
                    sets.append((f"{label}, {words}", counts))
    keys = list(dict.fromkeys(key for _, counts in sets for key in counts))
    lines = []
    for label, counts in sets:
        cells, pairs = [], number(counts.get("pairs"))
        for key in keys:
            amount = number(counts.get(key))
            # What happened to pairs is told as a share of them too.
            shared = pairs and amount is not None and key.endswith(("_chosen", "_rejected"))
            share = percent((amount or 0) / pairs, 1) if pairs and shared else ""
            cells.append(Cell(count(amount), spread=share))
        lines.append(Line(label, tuple(cells)))
    told = {
        "tasks": "tasks sampled",
        "gold_chosen": "chosen is the given answer (no sample was right)",
        "invalid_rejected": "rejected is wrong in form",
    }
    return filled("pairs", [told.get(key, key) for key in keys], lines)


def certificates(groups: Sequence[Group]) -> Table:
    """The first step's loss and gradients beside plainly computed ones, a line a run that was compared."""
    lines = []
    for record in (record for group in groups for record in group.records if record.certificate):
        told_of = record.certificate
        loss, apart = (
            numbers(told_of.get("loss")),
            [numbers(each) for each in items(told_of.get("gradients"))],
        )
        # The one that is the furthest off for what it may be, and how many could not be compared.
        apart = [each for each in apart if "error" in each]
        worst = max(apart, key=lambda each: each["error"] / each.get("tolerance", 1.0), default={})
        rounding = len(items(told_of.get("rounding")))
        allowed = numbers(told_of.get("tolerance"))
        verdict = {"True": "agrees", "False": "not as computed plainly"}.get(str(told_of.get("agrees")), "")
        cells = [
            verdict or str(told_of.get("left_out") or ABSENT),
            *(f"{loss[key]:.6g}" if key in loss else ABSENT for key in ("run", "plain")),
            f"{loss['error']:.0e}" if "error" in loss else ABSENT,
            f"{worst['error']:.0e}" if worst else ABSENT,
            f"{worst.get('tolerance', allowed.get('gradients', 0)):.0e}" if worst else ABSENT,
            str(rounding) if rounding else ABSENT,
            str(told_of.get("precision") or ABSENT),
            *(count(told_of.get(key)) for key in ("rows", "ranks")),
        ]
        lines.append(Line(record.name, tuple(cells)))
    heads = (
        "verdict",
        "loss of the run",
        "computed plainly",
        "apart by",
        "gradients apart by",
        "allowed",
        "left out as rounding",
        "precision",
        "rows",
        "ranks",
    )
    return filled("run", heads, lines)


def searched(searches: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Table]]:
    """What sweeps tried before their seeds, a line an arm: a title and a table each; the best is said to be taken."""
    found = []
    for name, search in searches.items():
        arms, by = mapping(search.get("arms")), str(search.get("by"))
        tried = {
            arm: {
                _point(mapping(each.get("point"))): number(each.get(by))
                for each in map(mapping, items(points))
            }
            for arm, points in arms.items()
        }
        heads = list(dict.fromkeys(point for points in tried.values() for point in points))[:_MOST_POINTS]
        lines = []
        for arm, points in tried.items():
            known = [value for value in points.values() if value is not None]
            best = (min if search.get("smallest") else max)(known, default=None)
            cells = [
                Cell(ABSENT)
                if (value := points.get(head)) is None
                else Cell(f"{value:.4g}", spread="taken" if value == best else "")
                for head in heads
            ]
            lines.append(Line(arm, tuple(cells)))
        if lines:
            seeds = ", ".join(map(str, items(search.get("seeds"))))
            found.append(
                (
                    f"{name}: {by.replace('_', ' ')} of each point tried (seeds {seeds})",
                    Table(("arm", *heads), lines),
                )
            )
    return found


def _median(group: Group, key: str) -> float | None:
    # The first line has what a start costs (compiling, warming up) in it.
    lines = [line[key] for r in group.records for line in (r.curve[1:] or r.curve) if key in line]
    return statistics.median(lines) if lines else None


def _point(point: Mapping[str, Any]) -> str:
    """`learning rate 1e-4` of `learning_rate: 1e-4`."""
    return ", ".join(
        f"{key.rpartition('.')[2].replace('_', ' ')} {told(value)}" for key, value in point.items()
    )
