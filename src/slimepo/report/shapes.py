"""Panels that are not curves: distributions before and after, and exact match by family of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from slimepo.report.figures import FAINT, INK, NARROW, WIDE, Panel, Style, figure_of, styles, svg
from slimepo.report.groups import Group, Spread, by_series
from slimepo.report.records import Distribution

_TITLES = {
    "margin": ("Margin of pairs", "nats per token"),
    "rejected_tokens": ("Tokens of rejected answers", "log-probability, nats"),
    "answer_lengths": ("Length of answers", "tokens"),
    "chosen_lengths": ("Length of chosen answers", "tokens"),
    "rejected_lengths": ("Length of rejected answers", "tokens"),
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
    shown = [(g, [r.distributions[name] for r in g.records if name in r.distributions]) for g in groups]
    shown = [(group, found) for group, found in shown if found]
    title, unit = _TITLES.get(name, (name, ""))
    height = 0.55 + 0.42 * len(shown)
    with figure_of(WIDE, height, left=0.03, top=1 - 0.05 / height) as (figure, axes):
        tallest = max(
            (max(_density(d, d.before) + _density(d, d.after)) for _, found in shown for d in found),
            default=1,
        )
        for row, (group, found) in enumerate(shown):
            _ridge(axes, len(shown) - 1 - row, found, look[group.label], tallest or 1)
            axes.annotate(
                group.label if len(group.label) <= 26 else group.label[:25] + "…",
                (0.0, len(shown) - 1 - row + 0.62),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize=7.5,
            )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.1, len(shown) + 0.02)
        axes.set_xlabel(unit)
        words = "; ".join(
            f"{g.label}: median {_median(f[0], f[0].before):.3g} before, {_median(f[0], f[0].after):.3g} after"
            for g, f in shown
        )
        return Panel(title, svg(figure, f"ridge-{name}", f"{title} before and after: {words}"))


def _ridge(axes: Any, base: float, found: Sequence[Distribution], style: Style, tallest: float) -> None:
    for at, each in enumerate(found):
        after = [base + 0.86 * value / tallest for value in _density(each, each.after)]
        before = [base + 0.86 * value / tallest for value in _density(each, each.before)]
        axes.stairs(after, each.edges, baseline=base, fill=True, color=style.colour, alpha=0.55 / len(found))
        if at == 0:
            axes.stairs(before, each.edges, baseline=base, color=INK, linewidth=0.9)
    axes.axhline(base, color=FAINT, linewidth=0.8, zorder=0)


def _density(shape: Distribution, counts: Sequence[float]) -> list[float]:
    """Share of all per unit, so that bins of unequal width and unequal numbers of pairs compare."""
    total = sum(counts) or 1
    widths = [high - low for low, high in zip(shape.edges, shape.edges[1:], strict=False)]
    return [count / total / (width or 1) for count, width in zip(counts, widths, strict=True)]


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
