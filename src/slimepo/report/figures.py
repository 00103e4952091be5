"""The pictures of a report: small SVG panels that follow the page's colours, in light and dark.

Objective = colour (Okabe-Ito), learning rate = line style and marker. A panel is drawn at the width of a
phone, so that its text stays readable there and a wide screen shows several in a row. matplotlib is
imported when the first picture is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from slimepo.errors import InputError

_COLOURS = {"slime": "#009E73", "dpo": "#0072B2", "simpo": "#D55E00", "sft": "#CC79A7"}
_FREE_COLOURS = ("#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
_LINES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (8, 3)),
    (0, (3, 3)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P")
# Stand-ins that matplotlib writes and `_svg` replaces by what the page's style sheet decides.
_INK, _FAINT, _PAPER = "#010101", "#020202", "#030303"
_PAGE_COLOURS = {_INK: "currentColor", _FAINT: "var(--rule)", _PAPER: "var(--paper)"}
# In inches: three wide or four narrow panels stand beside each other on a desktop, one on a phone.
_WIDE, _NARROW = 3.75, 2.9
_MOST_POINTS = 150


@dataclass(frozen=True)
class Run:
    """One run of a result, cleaned: every number in it is finite, and what was absent is None or empty."""

    name: str
    objective: str
    series: str
    learning_rate: float | None
    options: dict[str, Any] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    chosen_fell: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float | None = None
    steps: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Style:
    """How a run is drawn: `colour` says the objective, `line` and `marker` the learning rate."""

    colour: str
    line: Any
    marker: str


@dataclass(frozen=True)
class Panel:
    """One picture: a title for its caption, and SVG that is safe to put into a page."""

    title: str
    svg: str


def styles(runs: Sequence[Run]) -> dict[str, Style]:
    """One style a run, by its name."""
    colours: dict[str, str] = {}
    free = 0
    for run in runs:
        if run.series in colours:
            continue
        wanted = _COLOURS.get(run.objective)
        if wanted is None or wanted in colours.values():
            wanted = _FREE_COLOURS[free % len(_FREE_COLOURS)]
            free += 1
        colours[run.series] = wanted
    rates = learning_rates(runs)
    places = {run.name: rates.index(run.learning_rate) if run.learning_rate in rates else 0 for run in runs}
    return {
        run.name: Style(
            colours[run.series],
            _LINES[places[run.name] % len(_LINES)],
            _MARKERS[places[run.name] % len(_MARKERS)],
        )
        for run in runs
    }


def learning_rates(runs: Sequence[Run]) -> list[float]:
    """The learning rates that occur, rising."""
    return sorted({run.learning_rate for run in runs if run.learning_rate is not None})


def series(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in learning rate only, together, the lowest rate first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.series, []).append(run)
    return {name: sorted(group, key=lambda run: run.learning_rate or 0.0) for name, group in groups.items()}


def over_learning_rate(
    runs: Sequence[Run], key: str, start: float | None, title: str, scale: float = 1.0
) -> Panel | None:
    """A metric after training over the learning rate, one line a series; `start` is drawn as a dashed line.

    None when no run has the metric.
    """
    look = styles(runs)
    lines = {name: [run for run in group if _drawable(run, key)] for name, group in series(runs).items()}
    lines = {name: group for name, group in lines.items() if group}
    if not lines:
        return None
    with _house_style():
        figure, axes = _figure(_WIDE, 2.7, right=0.74)
        axes.set_xscale("log")
        ends = []
        for name, group in lines.items():
            xs = [run.learning_rate for run in group]
            ys = [run.after[key] * scale for run in group]
            axes.plot(xs, ys, color=look[group[0].name].colour, linewidth=1.6)
            for run, x, y in zip(group, xs, ys, strict=True):
                axes.plot([x], [y], look[run.name].marker, color=look[run.name].colour, markersize=5.5)
            ends.append((ys[-1], name))
        if start is not None:
            axes.axhline(start * scale, color=_INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
            ends.append((start * scale, "SFT start"))
        _rate_axis(axes, learning_rates([run for group in lines.values() for run in group]))
        axes.margins(y=0.08)
        _label_ends(axes, ends)
        return Panel(title, _svg(figure, f"rate-{key}", f"{title}, over the learning rate"))


def training_curves(runs: Sequence[Run], start: Mapping[str, float]) -> list[Panel]:
    """Chosen and rejected log-prob per token over steps: a panel a series, all panels on the same scales.

    start: the log-probs of the model that training started from, dashed.
    """
    look = styles(runs)
    keys = ("logps/chosen", "logps/rejected")
    drawn = {name: [run for run in group if _has_curve(run, keys)] for name, group in series(runs).items()}
    limits = {
        key: _limits([point[key] for run in runs for point in run.curve if key in point]) for key in keys
    }
    panels = []
    for name, group in drawn.items():
        if not group:
            continue
        with _house_style():
            figure, pair = _figure(_NARROW, 3.4, rows=2, left=0.18)
            for axes, key in zip(pair, keys, strict=True):
                if not _curves(axes, group, key, look):
                    axes.text(0.5, 0.5, "not part of this objective", transform=axes.transAxes, ha="center")
                _start_line(axes, start.get(key))
                axes.set_ylabel(key.removeprefix("logps/"))
                if limits[key] is not None:
                    axes.set_ylim(limits[key])
            pair[-1].set_xlabel("step")
            panels.append(Panel(name, _svg(figure, f"curve-{name}", f"log-probs while training, {name}")))
    return panels


def family_dots(runs: Sequence[Run], prefix: str = "exact_match/") -> list[Panel]:
    """Exact match by family before (bar) and after (marker), in percent: a panel a series.

    The families stand in the same order everywhere: the ones that were hardest before at the bottom.
    """
    look = styles(runs)
    before = {key: value for run in runs for key, value in run.before.items() if key.startswith(prefix)}
    found = {key for run in runs for key in (*run.before, *run.after) if key.startswith(prefix)}
    keys = sorted(found, key=lambda key: (before.get(key, 0.0), key))
    panels = []
    for name, group in series(runs).items():
        shown = [run for run in group if any(key in run.after for key in keys)]
        if not shown:
            continue
        with _house_style():
            figure, axes = _figure(_NARROW, 0.6 + 0.22 * len(keys), left=0.24)
            _dots(axes, shown, keys, look)
            axes.set_yticks(range(len(keys)), [key.removeprefix(prefix) for key in keys])
            axes.set_ylim(-0.7, len(keys) - 0.3)
            axes.set_xlim(-3, 103)
            axes.set_xlabel("exact match, %")
            axes.grid(axis="x", visible=False)
            panels.append(Panel(name, _svg(figure, f"family-{name}", f"exact match by family, {name}")))
    return panels


def swatch(style: Style | None = None, *, line: bool = True, neutral: bool = False) -> str:
    """A key for a legend, as inline SVG; without a style the dashed line of the start."""
    with _house_style():
        figure, axes = _figure(0.42, 0.16, left=0, right=1, bottom=0, top=1)
        axes.set_axis_off()
        axes.set_ylim(-1, 1)
        if style is None:
            axes.plot([0, 2], [0, 0], color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
        else:
            colour = _INK if neutral else style.colour
            axes.plot([0, 2], [0, 0], color=colour, linewidth=1.8, linestyle=style.line if line else "-")
            if line:
                axes.plot([1], [0], style.marker, color=colour, markersize=5)
        return _svg(figure, f"swatch-{style}-{line}-{neutral}", "", shown=False)


def _drawable(run: Run, key: str) -> bool:
    return run.learning_rate is not None and run.learning_rate > 0 and key in run.after


def _has_curve(run: Run, keys: Sequence[str]) -> bool:
    return any("step" in point and key in point for point in run.curve for key in keys)


def _curves(axes: Any, group: Sequence[Run], key: str, look: Mapping[str, Style]) -> bool:
    """Draws one line a run; whether there was any."""
    drawn = False
    for run in group:
        points = [(point["step"], point[key]) for point in run.curve if "step" in point and key in point]
        if not points:
            continue
        drawn = True
        points = points[:: max(1, len(points) // _MOST_POINTS)]
        xs, ys = zip(*points, strict=True)
        style = look[run.name]
        axes.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=1.5)
        axes.plot(xs[-1:], ys[-1:], style.marker, color=style.colour, markersize=5)
        if run.error:
            axes.annotate("stopped", (xs[-1], ys[-1]), (5, -3), textcoords="offset points")
    return drawn


def _start_line(axes: Any, level: float | None) -> None:
    if level is not None:
        axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)


def _dots(axes: Any, group: Sequence[Run], keys: Sequence[str], look: Mapping[str, Style]) -> None:
    for row, key in enumerate(keys):
        axes.axhline(row, color=_FAINT, linewidth=0.6, zorder=0)
        for place, run in enumerate(group):
            y = row + 0.3 * ((len(group) - 1) / 2 - place) / max(1, len(group) - 1) * 1.4
            was, now = run.before.get(key), run.after.get(key)
            style = look[run.name]
            if was is not None and now is not None:
                axes.plot([100 * was, 100 * now], [y, y], color=style.colour, linewidth=1, alpha=0.6)
            if now is not None:
                axes.plot([100 * now], [y], style.marker, color=style.colour, markersize=4.2)
        start = next((run.before[key] for run in group if key in run.before), None)
        if start is not None:
            axes.plot([100 * start] * 2, [row - 0.36, row + 0.36], color=_INK, linewidth=1.6)


def _rate_axis(axes: Any, rates: Sequence[float]) -> None:
    axes.set_xticks(rates, [short_rate(rate) for rate in rates])
    axes.minorticks_off()
    axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.35)
    axes.set_xlabel("learning rate")


def short_rate(rate: float | None) -> str:
    """A learning rate in the fewest characters: 1e-4, 5e-7, 2.5e-5."""
    if rate is None:
        return "–"
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if rate and not 0.1 <= rate < 1000 else f"{rate:g}"


def _label_ends(axes: Any, ends: Sequence[tuple[float, str]]) -> None:
    """Names right of the lines' ends, pushed apart until none covers another."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.068
    rising = sorted(ends)
    places: list[float] = []
    for y, _ in rising:
        places.append(max(y, places[-1] + gap) if places else y)
    # Half of what the topmost was pushed up is taken back from all that were pushed with it.
    for at in range(len(places) - 1, -1, -1):
        ceiling = places[at + 1] - gap if at + 1 < len(places) else max(high, rising[-1][0])
        places[at] = min(places[at], ceiling)
    right = axes.get_xlim()[1]
    for (_, name), place in zip(rising, places, strict=True):
        text = name if len(name) <= 14 else name[:13] + "…"
        axes.annotate(
            text, (right, place), (3, 0), textcoords="offset points", va="center", annotation_clip=False
        )


def _limits(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room


def _figure(
    width: float,
    height: float,
    *,
    rows: int = 1,
    left: float = 0.145,
    right: float = 0.975,
    bottom: float | None = None,
    top: float | None = None,
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, 1, sharex=rows > 1)
    bottom = 0.44 / height if bottom is None else bottom
    top = 1 - 0.1 / height if top is None else top
    figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top, hspace=0.14)
    return figure, axes


def _house_style() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "the page's figures need matplotlib, which is not installed: pip install 'slimepo[report]'"
        ) from error
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            # A run's name is text, whatever dollar signs are in it.
            "text.parse_math": False,
            "font.size": 8.25,
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _FAINT,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.facecolor": "none",
            "grid.color": _FAINT,
            "grid.linewidth": 0.6,
            "xtick.color": _FAINT,
            "ytick.color": _FAINT,
            "xtick.labelcolor": _INK,
            "ytick.labelcolor": _INK,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
        }
    )


def _svg(figure: Any, salt: str, label: str, shown: bool = True) -> str:
    """The figure as an <svg> element: no ids that clash with another figure's, no metadata, page colours."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = text.replace("xlink:href", "href")
    for colour, page_colour in _PAGE_COLOURS.items():
        text = text.replace(colour, page_colour)
    points = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert points is not None
    width, height = (math.ceil(float(side) * 96 / 72) for side in points.groups())
    words = f'role="img" aria-label="{escape(label)}"' if shown else 'aria-hidden="true"'
    return re.sub(
        r"^<svg[^>]*>", f'<svg {points.group()} width="{width}" height="{height}" {words}>', text
    ).strip()
