"""Panels that are not curves: distributions before and after, and exact match by family of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from slimepo.report.figures import FAINT, INK, NARROW, WIDE, Panel, Style, figure_of, styles, svg
from slimepo.report.groups import Group, Spread, by_series
from slimepo.report.records import Distribution

# Title, unit, and whether heights are square roots.
_TITLES = {
    "margin": ("Margin of pairs", "nats per token", False),
    "rejected_tokens": ("Tokens of rejected answers", "log-probability, nats (heights: square root)", True),
    "answer_lengths": ("Length of greedy answers", "tokens", False),
}
FAMILY = "exact_match/"


def distribution_panels(groups: Sequence[Group]) -> list[Panel]:
    """A panel a quantity, a row a group: before as an outline, after as an area in the group's colour."""
    names = [name for group in groups for record in group.records for name in record.distributions]
    ordered = sorted(
        set(names), key=lambda name: (list(_TITLES).index(name) if name in _TITLES else 99, name)
    )
    return [_ridges(groups, name) for name in ordered]


def _ridges(groups: Sequence[Group], name: str) -> Panel:
    look = styles(groups)
    found = {g.label: [r.distributions[name] for r in g.records if name in r.distributions] for g in groups}
    shown = {label: shapes for label, shapes in found.items() if shapes}
    title, unit, root = _TITLES.get(name, (name, "", False))
    height = 0.55 + 0.36 * len(shown)
    with figure_of(WIDE, height, left=0.3, top=1 - 0.05 / height) as (figure, axes):
        heights = [
            _heights(d, side, root)
            for shapes in shown.values()
            for d in shapes
            for side in (d.before, d.after)
        ]
        scale = 0.88 / (max(map(max, heights)) or 1)
        for row, (label, shapes) in enumerate(reversed(shown.items())):
            _ridge(axes, row, shapes, look[label], scale, root)
        labels = [label if len(label) <= 20 else label[:19] + "…" for label in reversed(shown)]
        axes.set_yticks([row + 0.25 for row in range(len(shown))], labels)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.06, len(shown))
        axes.set_xlabel(unit)
        words = "; ".join(f"{label}: median {_medians(shapes[0])}" for label, shapes in shown.items())
        return Panel(title, svg(figure, f"ridge-{name}", f"{title} before and after: {words}"))


def _ridge(
    axes: Any, base: float, shapes: Sequence[Distribution], style: Style, scale: float, root: bool
) -> None:
    for at, shape in enumerate(shapes):
        before, after = (
            [base + scale * height for height in _heights(shape, side, root)]
            for side in (shape.before, shape.after)
        )
        axes.stairs(
            after, shape.edges, baseline=base, fill=True, color=style.colour, alpha=0.55 / len(shapes)
        )
        if at == 0:
            axes.stairs(before, shape.edges, baseline=base, color=INK, linewidth=0.8)
    axes.axhline(base, color=FAINT, linewidth=0.8, zorder=0)


def _heights(shape: Distribution, counts: Sequence[float], root: bool) -> list[float]:
    """Densities, or their square roots, which let a thin tail be seen beside a tall peak."""
    return [math.sqrt(value) if root else value for value in _density(shape, counts)]


def _density(shape: Distribution, counts: Sequence[float]) -> list[float]:
    """Share of all per unit, so that bins of unequal width and unequal numbers of pairs compare."""
    total = sum(counts) or 1
    widths = [high - low for low, high in zip(shape.edges, shape.edges[1:], strict=False)]
    return [count / total / (width or 1) for count, width in zip(counts, widths, strict=True)]


def _medians(shape: Distribution) -> str:
    return f"{_median(shape, shape.before):.3g} before, {_median(shape, shape.after):.3g} after"


def _median(shape: Distribution, counts: Sequence[float]) -> float:
    """The middle of the bin that holds the median."""
    half, seen = sum(counts) / 2, 0.0
    for at, count in enumerate(counts):
        seen += count
        if seen >= half:
            return (shape.edges[at] + shape.edges[at + 1]) / 2
    return shape.edges[-1]


def family_panels(groups: Sequence[Group]) -> list[Panel]:
    """Exact match by family before (bar) and after (marker), in percent: a panel a series.

    The families stand in the same order everywhere: the ones that were hardest before at the bottom.
    """
    records = [record for group in groups for record in group.records]
    before = {
        key: value for record in records for key, value in record.before.items() if key.startswith(FAMILY)
    }
    found = {key for record in records for key in (*record.before, *record.after) if key.startswith(FAMILY)}
    keys = sorted(found, key=lambda key: (before.get(key, 0.0), key))
    look, panels = styles(groups), []
    for name, together in by_series(groups).items():
        shown = [group for group in together if any(key in r.after for key in keys for r in group.records)]
        if not shown:
            continue
        with figure_of(NARROW, 0.6 + 0.22 * len(keys), left=0.24) as (figure, axes):
            _dots(axes, shown, keys, look)
            axes.set_yticks(range(len(keys)), [key.removeprefix(FAMILY) for key in keys])
            axes.set_ylim(-0.7, len(keys) - 0.3)
            axes.set_xlim(-3, 103)
            axes.set_xlabel("exact match, %")
            axes.grid(axis="x", visible=False)
            panels.append(Panel(name, svg(figure, f"family-{name}", f"exact match by family, {name}")))
    return panels


def _of(group: Group, key: str, when: Literal["before", "after"]) -> Spread | None:
    return group.spread(lambda record: getattr(record, when).get(key))


def _dots(axes: Any, groups: Sequence[Group], keys: Sequence[str], look: dict[str, Style]) -> None:
    for row, key in enumerate(keys):
        axes.axhline(row, color=FAINT, linewidth=0.6, zorder=0)
        start = None
        for place, group in enumerate(groups):
            y = row + 0.3 * ((len(groups) - 1) / 2 - place) / max(1, len(groups) - 1) * 1.4
            was = _of(group, key, "before")
            now = _of(group, key, "after")
            style = look[group.label]
            start = start or was
            if was is not None and now is not None:
                xs = [100 * was.median, 100 * now.median]
                axes.plot(xs, [y, y], color=style.colour, linewidth=1, alpha=0.6)
            if now is not None:
                axes.plot([100 * now.median], [y], style.marker, color=style.colour, markersize=4.2)
        if start is not None:
            axes.plot([100 * start.median] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=1.6)
