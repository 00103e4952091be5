"""How a picture is drawn: small SVG panels that follow the page's colours, in light and dark.

Colours are those of Okabe and Ito (darker on a light page, lighter on a dark one), as variables of the page's style
sheet; what colour alone does not tell apart, line style and marker do. A panel is drawn at the width of a phone, so
that its text stays readable there and a wide screen shows several in a row. matplotlib is imported when the first
picture is drawn.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any, NamedTuple

from slimepo.errors import InputError
from slimepo.report.groups import Group, by_series

# Stand-ins that matplotlib writes and `_svg` replaces by what the page's style sheet decides.
INK, FAINT = "#010101", "#020202"
COLOURS = tuple(f"#0{at}0{at}0{at}" for at in range(3, 9))
_PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--rule)"} | {
    colour: f"var(--c{at})" for at, colour in enumerate(COLOURS)
}
# The well-known objectives always have the same colour, the others what is left.
_OWN_COLOURS = {"SLIME": 0, "DPO": 1, "SimPO": 2, "SFT": 3}
_DASHES = ((5, 2), (1.2, 1.2), (6, 1.5, 1.2, 1.5), (8, 3), (3, 3))
LINES: tuple[Any, ...] = ("-", *((0, dashes) for dashes in _DASHES))
MARKERS = ("o", "s", "^", "D", "v", "P")
_HOUSE_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    # A run's name is text, whatever dollar signs are in it.
    "text.parse_math": False,
    "font.size": 8.25,
    "text.color": INK,
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.linewidth": 0.6,
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}
# With more lines than these, names at their ends would lie on each other: the legend has them.
MOST_NAMED = 8
LONGEST_NAME = 14
# From so far to the right on a line has its name at its end.
_LATE = 0.75
# In inches: three wide or four narrow panels stand beside each other on a desktop, one on a phone.
WIDE, NARROW = 3.75, 2.9


@dataclass(frozen=True)
class Style:
    """How a group is drawn."""

    colour: str
    line: Any
    marker: str


@dataclass(frozen=True)
class Panel:
    """One picture: a title for its caption, and SVG that is safe to put into a page; none where all is in the title.

    `change` is a second drawing, of changes since the start, where levels start apart; empty where they do not.
    """

    title: str
    svg: str
    change: str = ""


class End(NamedTuple):
    """The end of a line that is to have its name beside it; `group` is the place of what hides with a group."""

    x: float
    y: float
    name: str
    colour: str
    group: int | None = None


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """One style a group, by its label; no two groups have the same (up to 36).

    Colour says the objective, line and marker its variants (by learning rate), and where there are more objectives than
    colours those that share one. One objective alone, or too many variants, go through the colours in their order, and
    line and marker change with each round.
    """
    together = by_series(groups)
    own = {name: at for name, at in _OWN_COLOURS.items() if name in together}
    free = [at for at in (4, 5, 3, 2, 1, 0) if at not in own.values()]
    others = itertools.chain(free, itertools.cycle((4, 5, 3, 2, 1, 0)))
    own |= {name: next(others) for name in together if name not in own}
    found: dict[str, Style] = {}
    used: Counter[int] = Counter()
    for name, variants in together.items():
        for group in variants:
            turn = used[own[name]]
            found[group.label] = Style(
                COLOURS[own[name]], LINES[turn % len(LINES)], MARKERS[turn % len(MARKERS)]
            )
            used[own[name]] += 1
    if len(together) > 1 and max(used.values()) <= len(LINES):
        return found
    rounds = [divmod(at, len(COLOURS)) for at in range(len(groups))]
    return {
        group.label: Style(COLOURS[colour], LINES[turn % len(LINES)], MARKERS[turn % len(MARKERS)])
        for group, (turn, colour) in zip(groups, rounds, strict=True)
    }


def swatch(style: Style | None = None) -> str:
    """A key for a legend, as inline SVG; without a style the dashed line of the start."""
    with figure_of(0.42, 0.16, left=0, right=1, bottom=0, top=1) as (figure, axes):
        axes.set_axis_off()
        axes.set_ylim(-1, 1)
        if style is None:
            axes.plot([0, 2], [0, 0], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        else:
            axes.plot([0, 2], [0, 0], color=style.colour, linewidth=1.8, linestyle=style.line)
            axes.plot([1], [0], style.marker, color=style.colour, markersize=5)
        return svg(figure, f"swatch-{style}", "", shown=False)


@contextmanager
def figure_of(
    width: float,
    height: float,
    *,
    left: float = 0.145,
    right: float = 0.975,
    bottom: float | None = None,
    top: float | None = None,
    polar: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """A figure in the page's style and its axes; sizes in inches.

    Raises:
        InputError: the extra `report` (matplotlib) is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "the page's figures need matplotlib, which is not installed: pip install 'slimepo[report]'"
        ) from error
    with matplotlib.rc_context(_HOUSE_STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height))
        axes = figure.subplots(subplot_kw={"projection": "polar"} if polar else None)
        bottom = 0.44 / height if bottom is None else bottom
        top = 1 - 0.1 / height if top is None else top
        figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top)
        yield figure, axes


def svg(figure: Any, salt: str, label: str, shown: bool = True) -> str:
    """The figure as an <svg> element: no ids that clash with another figure's, no metadata, page colours.

    label: what a reader who does not see the picture is told.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        # The reader's browser draws the letters, whatever matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # What belongs to a group of runs keeps its mark, by which the page shows and hides it.
    text = re.sub(r"<g id=\"(g\d+)\"", r'<g class="\1"', text)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0]), text)
    points = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert points is not None
    width, height = (math.ceil(float(side) * 96 / 72) for side in points.groups())
    words = f'role="img" aria-label="{escape(label)}"' if shown else 'aria-hidden="true"'
    opening = f'<svg {points.group()} width="{width}" height="{height}" {words}>'
    return (opening + text[text.index(">") + 1 :]).strip()


def png(figure: Any) -> bytes:
    """The figure as a picture on white, in the colours of the light page."""
    from matplotlib.colors import to_hex

    sheet = (resources.files("slimepo.report") / "template.html.j2").read_text(encoding="utf-8")
    # The first of each name: a dark page has others.
    light = dict(reversed(re.findall(r"--(\w+): (#\w+)", sheet)))
    printed = {stand_in: light[f"c{at}"] for at, stand_in in enumerate(COLOURS)}
    printed |= {INK: light["ink"], FAINT: light["rule"]}
    for artist in figure.findobj():
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if hasattr(artist, f"get_{part}") and hasattr(artist, f"set_{part}"):
                colour = getattr(artist, f"get_{part}")()
                if isinstance(colour, str | tuple) and to_hex(colour) in printed:
                    getattr(artist, f"set_{part}")(printed[to_hex(colour)])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _tag(tag: str) -> str:
    """A tag with shorter numbers and the page's colours; words between tags stay as they are."""
    # A tenth of a point is finer than a screen shows, and half the size.
    tag = re.sub(r"(?<=[ \n\"LMCQ])(-?\d+\.\d)\d+", r"\1", tag)
    for colour, page_colour in _PAGE_COLOURS.items():
        tag = tag.replace(colour, page_colour)
    return tag


@contextmanager
def toggled(axes: Any, group: int | None) -> Iterator[None]:
    """What is drawn inside belongs to the group at this place of the page, and hides with it."""
    there = set(axes.get_children())
    yield
    for artist in axes.get_children():
        if group is not None and artist not in there:
            artist.set_gid(f"g{group}")
            if thread := getattr(artist, "arrow_patch", None):
                thread.set_gid(f"g{group}")


def label_ends(axes: Any, ends: Sequence[End]) -> None:
    """Names right of the lines' ends, pushed apart until none covers another, each with a thread to its line.

    A line that ends early has none: a thread from there would look like a line of its own.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    across = axes.transData + axes.transAxes.inverted()
    ends = [end for end in ends if across.transform((min(end.x, right), end.y))[0] > _LATE]
    gap = (high - low) * 0.157 / (axes.figure.get_figheight() - 0.54)
    rising = sorted(ends, key=lambda end: end.y)
    places = spread_out([end.y for end in rising], gap, low, high)
    for end, place in zip(rising, places, strict=True):
        name = end.name if len(end.name) <= LONGEST_NAME else end.name[: LONGEST_NAME - 1] + "…"
        with toggled(axes, end.group):
            axes.annotate(
                name, xy=(min(end.x, right), end.y), xytext=(1.02, place), annotation_clip=False, va="center",
                textcoords=axes.get_yaxis_transform(),
                arrowprops={
                    "arrowstyle": "-", "color": end.colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0,
                    "relpos": (0, 0.5),
                },
            )  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def spread_out(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for names that belong to these rising heights: as near as can be, none nearer to another than `gap`.

    Names that would lie on each other stand in a stack, whose middle is at their mean height, between `low` and `high`.
    """

    def bottom(stack: Sequence[float]) -> float:
        tall = (len(stack) - 1) * gap
        return max(low, min(statistics.fmean(stack) - tall / 2, high - tall))

    stacks: list[list[float]] = []
    for height in heights:
        stacks.append([height])
        while len(stacks) > 1 and bottom(stacks[-1]) < bottom(stacks[-2]) + len(stacks[-2]) * gap:
            last = stacks.pop()
            stacks[-1] += last
    return [bottom(stack) + at * gap for stack in stacks for at in range(len(stack))]


def start_line(axes: Any, level: float | None) -> None:
    """The dashed line of where training began."""
    if level is not None:
        axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
