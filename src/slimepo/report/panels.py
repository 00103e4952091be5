"""Panels: figures over the learning rate, distributions before and after, exact match by family of tasks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from slimepo.report.figures import (
    FAINT,
    INK,
    NARROW,
    WIDE,
    End,
    Panel,
    Style,
    figure_of,
    label_ends,
    start_line,
    styles,
    svg,
    toggled,
)
from slimepo.report.groups import Group, Spread, by_rate, by_series, short_names
from slimepo.report.records import Distribution
from slimepo.words import short_number

# Key of a figure after training, title, factor.
RATES = (
    ("exact_match", "Exact match, %", 100),
    ("logps/chosen", "Chosen answers, nats per token", 1),
    ("format_valid", "Valid format, %", 100),
)
# Title, unit, and whether heights are square roots.
SHAPES = {
    "margin": ("Margin of pairs", "nats per token", False),
    "rejected_tokens": ("Tokens of rejected answers", "log-probability, nats (heights: square root)", True),
    "answer_lengths": ("Length of greedy answers", "tokens", False),
}
# Logged gradient norms below which a tail says nothing.
_ENOUGH_NORMS = 20
# Letters of a row's name.
_LONGEST_ROW = 18
FAMILY = "exact_match/"


def rate_panels(groups: Sequence[Group], starts: Mapping[str, float]) -> list[Panel]:
    """Figures after training over the learning rate, a line an objective, where some objective was run at several.

    `starts` are levels of the common start, dashed.
    """
    look, panels = styles(groups), []
    for key, title, scale in RATES:
        lines: dict[str, list[tuple[Group, float, Spread]]] = {}
        for name, together in by_rate(groups).items():
            for group in together:
                rate, value = group.first.learning_rate, group.after(key)
                if rate is not None and rate > 0 and value is not None:
                    scaled = Spread(value.median * scale, value.low * scale, value.high * scale, value.n)
                    lines.setdefault(name, []).append((group, rate, scaled))
        if max(map(len, lines.values()), default=0) < 2:
            continue
        with figure_of(WIDE, 2.7, right=0.74) as (figure, axes):
            axes.set_xscale("log")
            for points in lines.values():
                colour = look[points[0][0].label].colour
                axes.plot(
                    [x for _, x, _ in points], [y.median for *_, y in points], color=colour, linewidth=1.6
                )
                for group, x, y in points:
                    axes.plot([x], [y.median], look[group.label].marker, color=colour, markersize=5.5)
                    if y.n > 1:
                        axes.plot([x, x], [y.low, y.high], color=colour, linewidth=1.2)
            ends = [
                End(points[-1][1], points[-1][2].median, name, look[points[0][0].label].colour)
                for name, points in lines.items()
            ]
            if key in starts:
                start_line(axes, starts[key] * scale)
                ends.append(End(math.inf, starts[key] * scale, "start", INK))
            rates = sorted({x for points in lines.values() for _, x, _ in points})
            axes.set_xticks(rates, [short_number(rate) for rate in rates])
            axes.minorticks_off()
            axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.35)
            axes.set_xlabel("learning rate")
            axes.margins(y=0.08)
            label_ends(axes, ends)
            panels.append(Panel(title, svg(figure, f"rate-{key}", f"{title}, over the learning rate")))
    return panels


def distribution_panels(groups: Sequence[Group]) -> list[Panel]:
    """A panel a quantity, a row a group: before as an outline, after as an area in the group's colour."""
    found = {name for group in groups for record in group.records for name in record.distributions}
    names = [*(name for name in SHAPES if name in found), *sorted(found - SHAPES.keys())]
    look, panels = styles(groups), []
    for name in names:
        title, unit, root = SHAPES.get(name, (name, "", False))
        of = {g.label: [r.distributions[name] for r in g.records if name in r.distributions] for g in groups}
        shown = {label: shapes for label, shapes in reversed(of.items()) if shapes}
        # Of every group and seed the heights before and after.
        drawn = {
            label: [[_heights(s, side, root) for side in (s.before, s.after)] for s in shapes]
            for label, shapes in shown.items()
        }
        highest = max(max(side) for seeds in drawn.values() for both in seeds for side in both)
        scale, height = 0.88 / (highest or 1), 0.55 + 0.36 * len(shown)
        with figure_of(WIDE, height, left=0.3, top=1 - 0.05 / height) as (figure, axes):
            for row, (label, seeds) in enumerate(drawn.items()):
                for at, both in enumerate(seeds):
                    edges = shown[label][at].edges
                    before, after = ([row + scale * value for value in side] for side in both)
                    colour, alpha = look[label].colour, 0.55 / len(seeds)
                    axes.stairs(after, edges, baseline=row, fill=True, color=colour, alpha=alpha)
                    if at == 0:
                        axes.stairs(before, edges, baseline=row, color=INK, linewidth=0.8)
                axes.axhline(row, color=FAINT, linewidth=0.8, zorder=0)
            called = short_names(groups, _LONGEST_ROW)
            labels = [
                n if len(n := called[g]) <= _LONGEST_ROW else n[: _LONGEST_ROW - 1] + "…" for g in shown
            ]
            axes.set_yticks([row + 0.25 for row in range(len(shown))], labels)
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.set_ylim(-0.06, len(shown))
            axes.set_xlabel(unit)
            words = "; ".join(
                f"{label}: median {_median(first, first.before):.3g} before, {_median(first, first.after):.3g} after"
                for label, (first, *_) in reversed(shown.items())
            )
            panels.append(Panel(title, svg(figure, f"ridge-{name}", f"{title} before and after: {words}")))
    return panels


def gradient_tails(groups: Sequence[Group]) -> list[Panel]:
    """How heavy the tail of gradients is: the share of logged steps with a norm above a multiple of the run's median.

    Both axes are logarithmic. A line that falls slowly is a heavy tail's: now and then a step is many times as large as
    the rest (docs/systems.md, clipping for heavy tails). Seeds are pooled; fewer than 20 logged norms make no line.
    """
    multiples: dict[str, list[float]] = {}
    for group in groups:
        for record in group.records:
            norms = [norm for line in record.curve if 0 < (norm := line.get("grad_norm", 0.0)) < math.inf]
            if len(norms) >= _ENOUGH_NORMS:
                middle = statistics.median(norms)
                multiples.setdefault(group.label, []).extend(norm / middle for norm in norms)
    if not multiples:
        return []
    look, places = styles(groups), {group.label: at for at, group in enumerate(groups)}
    with figure_of(WIDE, 2.7, right=0.74) as (figure, axes):
        axes.set_xscale("log")
        for label, found in multiples.items():
            xs = sorted(found)
            ys = [math.log10(1 - at / len(xs)) for at in range(len(xs))]
            with toggled(axes, places[label]):
                axes.plot(xs, ys, color=look[label].colour, linestyle=look[label].line, linewidth=1.5)
        axes.set_yticks([0, -1, -2], ["all", "10 %", "1 %"])
        axes.set_xlabel("gradient norm, multiples of the median")
        largest = "; ".join(f"{label}: up to {max(found):.3g} times" for label, found in multiples.items())
        title = "Share of steps with a larger gradient"
        return [
            Panel(title, svg(figure, "gradient-tails", f"{title} than a multiple of the median: {largest}"))
        ]


def _heights(shape: Distribution, counts: Sequence[float], root: bool) -> list[float]:
    """Shares of all per unit, so that bins of unequal width and unequal numbers of pairs compare.

    root: their square roots, which let a thin tail be seen beside a tall peak.
    """
    total = sum(counts) or 1
    widths = [high - low for low, high in zip(shape.edges, shape.edges[1:], strict=False)]
    shares = [count / total / (width or 1) for count, width in zip(counts, widths, strict=True)]
    return [math.sqrt(share) for share in shares] if root else shares


def _median(shape: Distribution, counts: Sequence[float]) -> float:
    """The middle of the bin that holds the median."""
    half = sum(counts) / 2
    reached = (at for at, seen in enumerate(itertools.accumulate(counts)) if seen >= half)
    at = next(reached, len(counts) - 1)
    return (shape.edges[at] + shape.edges[at + 1]) / 2


def family_panels(groups: Sequence[Group]) -> list[Panel]:
    """Exact match by family before (bar) and after (marker), in percent: a panel a series.

    The families stand in the same order everywhere: the ones that were hardest before at the bottom.
    """
    records = [record for group in groups for record in group.records]
    places = {group.label: at for at, group in enumerate(groups)}
    before = {key: value for record in records for key, value in record.before.items()}
    found = {key for record in records for key in (*record.before, *record.after) if key.startswith(FAMILY)}
    keys = sorted(found, key=lambda key: (before.get(key, 0.0), key))
    look, panels = styles(groups), []
    for name, together in by_series(groups).items():
        shown = [group for group in together if any(group.after(key) for key in keys)]
        if not shown:
            continue
        with figure_of(NARROW, 0.6 + 0.22 * len(keys), left=0.24) as (figure, axes):
            for row, key in enumerate(keys):
                axes.axhline(row, color=FAINT, linewidth=0.6, zorder=0)
                _family(axes, row, key, shown, look, places)
            axes.set_yticks(range(len(keys)), [key.removeprefix(FAMILY) for key in keys])
            axes.set_ylim(-0.7, len(keys) - 0.3)
            axes.set_xlim(-3, 103)
            axes.set_xlabel("exact match, %")
            axes.grid(axis="x", visible=False)
            panels.append(Panel(name, svg(figure, f"family-{name}", f"exact match by family, {name}")))
    return panels


def _family(
    axes: Any,
    row: int,
    key: str,
    groups: Sequence[Group],
    look: Mapping[str, Style],
    places: Mapping[str, int],
) -> None:
    """A family's row: where the first group that knows it started, and where each of the groups came to."""
    start = None
    for place, group in enumerate(groups):
        y = row + 0.3 * ((len(groups) - 1) / 2 - place) / max(1, len(groups) - 1) * 1.4
        was, now, style = group.spread(lambda r: r.before.get(key)), group.after(key), look[group.label]
        start = start or was
        with toggled(axes, places[group.label]):
            if was is not None and now is not None:
                xs = [100 * was.median, 100 * now.median]
                axes.plot(xs, [y, y], color=style.colour, linewidth=1, alpha=0.6)
            if now is not None:
                axes.plot([100 * now.median], [y], style.marker, color=style.colour, markersize=4.2)
    if start is not None:
        axes.plot([100 * start.median] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=1.6)
