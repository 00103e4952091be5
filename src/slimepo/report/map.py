"""The displacement map: how far training moved chosen and rejected answers, an arrow a group of runs.

Methods that only widen the gap between the two often do so by making both less likely. The map shows at a glance
which ones did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

from slimepo.means import Mean, mean_of
from slimepo.report.figures import INK, MOST_NAMED, Panel, figure_of, png, styles, svg, toggled
from slimepo.report.groups import Group, changes, short_names

# In inches. On a phone it is shrunk to four fifths, and its text stays readable.
_WIDTH, _HEIGHT = 4.7, 3.7
_LONGEST_NAME = 22
# Of the legend.
_LINE = 0.165
# Whether chosen and rejected answers became likelier, and what that is called.
BOTH_DOWN = "both down: unlearning"
QUADRANTS = {
    (True, False): "chosen up, rejected down",
    (True, True): "both up",
    (False, False): BOTH_DOWN,
    (False, True): "chosen down, rejected up",
}


class Move(NamedTuple):
    """What became of a group's held-out answers, in nats a token; `seeds` are what the means are of."""

    group: Group
    chosen: Mean
    rejected: Mean
    seeds: tuple[tuple[float, float], ...]

    @property
    def quadrant(self) -> str:
        return QUADRANTS[self.chosen.value > 0, self.rejected.value > 0]


def moves(groups: Sequence[Group]) -> list[Move]:
    """The groups whose chosen and rejected answers were scored before and after training."""
    found = []
    for group in groups:
        sides = [changes(group, f"logps/{side}") for side in ("chosen", "rejected")]
        if sides[0] and len(sides[0]) == len(sides[1]):
            found.append(Move(group, mean_of(sides[0]), mean_of(sides[1]), tuple(zip(*sides, strict=True))))
    return found


def map_panel(groups: Sequence[Group]) -> Panel | None:
    """The map as a panel of the page; None where nothing was scored before and after."""
    found = moves(groups)
    if not found:
        return None
    height = _HEIGHT + _below(found)
    with figure_of(_WIDTH, height, left=0.135, bottom=(0.44 + _below(found)) / height) as (figure, axes):
        _draw(axes, found, groups)
        words = "; ".join(
            f"{move.group.label}: chosen {move.chosen.value:+.3f}, rejected {move.rejected.value:+.3f}, {move.quadrant}"
            for move in found
        )
        return Panel(
            "Where training moved the answers", svg(figure, "map", f"nats per token since the start: {words}")
        )


def map_picture(groups: Sequence[Group], title: str) -> bytes | None:
    """The map as a PNG, for a model card or a README."""
    found = moves(groups)
    if not found:
        return None
    height = _HEIGHT + _below(found)
    bottom, top = (0.44 + _below(found)) / height, 1 - 0.42 / height
    with figure_of(_WIDTH, height, left=0.135, bottom=bottom, top=top) as (figure, axes):
        _draw(axes, found, groups)
        axes.set_title("\n".join(wrap(title, 62, max_lines=2, placeholder=" …")), fontsize=8.25, loc="left")
        return png(figure)


def _below(found: Sequence[Move]) -> float:
    """Inches for the legend under the map, of more groups than can be named in it."""
    return 0.0 if len(found) <= MOST_NAMED else 0.08 + _LINE * math.ceil(len(found) / 2)


def _draw(axes: Any, found: Sequence[Move], groups: Sequence[Group]) -> None:
    named = len(found) <= MOST_NAMED
    points = [(0.0, 0.0), *(point for move in found for point in move.seeds)]
    for side, (limit, label) in enumerate(
        ((axes.set_xlim, axes.set_xlabel), (axes.set_ylim, axes.set_ylabel))
    ):
        values = [point[side] for point in points]
        reach = max(map(abs, values)) or 0.01
        # The origin is never at the edge: what did not happen is seen too.
        least, most = min(*values, -0.4 * reach) - 0.3 * reach, max(*values, 0.4 * reach) + 0.3 * reach
        # Names stand beyond the tips.
        room = 0.5 * (most - least) if named and side == 0 else 0.0
        limit(
            least - room * any(move.chosen.value < 0 for move in found),
            most + room * any(move.chosen.value >= 0 for move in found),
        )
        label(f"change of {('chosen', 'rejected')[side]} answers, nats per token")
    for zero in (axes.axhline, axes.axvline):
        zero(0, color=INK, linewidth=0.9, alpha=0.75)
    # Above the dotted line the gap between the two has become narrower.
    axes.axline((0, 0), slope=1, color=INK, linewidth=0.9, linestyle=(0, (1, 3)), alpha=0.6)
    for (right, top), name in QUADRANTS.items():
        axes.text(
            0.985 if right else 0.015, 0.98 if top else 0.02, name.replace(", ", ",\n").replace(": ", ":\n"),
            transform=axes.transAxes, fontsize=7.5, alpha=0.7, ha="right" if right else "left",
            va="top" if top else "bottom", weight="normal" if right or top else "bold",
        )  # fmt: skip
    drawn = styles(groups)
    places = {group.label: at for at, group in enumerate(groups)}
    for move in found:
        style, tip = drawn[move.group.label], (move.chosen.value, move.rejected.value)
        with toggled(axes, places[move.group.label]):
            axes.plot([0, tip[0]], [0, tip[1]], color=style.colour, linewidth=1.8, linestyle=style.line)
            if len(move.seeds) > 1:
                cloud = zip(*move.seeds, strict=True)
                axes.plot(*cloud, ".", color=style.colour, alpha=0.6, markersize=5, markeredgewidth=0)
            axes.plot(*tip, style.marker, color=style.colour, markersize=6.5)
    names = short_names(groups, _LONGEST_NAME)
    if named:
        _name(axes, found, places, names)
        return
    for move in found:
        style = drawn[move.group.label]
        axes.plot(
            [], [], color=style.colour, linewidth=1.8, linestyle=style.line, marker=style.marker, markersize=5,
            label=names[move.group.label],
        )  # fmt: skip
    # Under the label of the axis.
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.1, 0.0), bbox_transform=axes.figure.transFigure, ncol=2, frameon=False,
        fontsize=7.5,
    )  # fmt: skip


def _name(axes: Any, found: Sequence[Move], places: Mapping[str, int], names: Mapping[str, str]) -> None:
    """Names beside the tips, pushed apart from the lowest upwards so that none lies on another."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    height = 0.055 * (high - low)
    last = low - height
    for move in sorted(found, key=lambda each: each.rejected.value):
        last = max(move.rejected.value, last + height)
        label, outwards = names[move.group.label], 1 if move.chosen.value >= 0 else -1
        with toggled(axes, places[move.group.label]):
            axes.text(
                move.chosen.value + outwards * 0.025 * (right - left), last,
                label if len(label) <= _LONGEST_NAME else f"{label[: _LONGEST_NAME - 2]} …",
                ha="left" if outwards > 0 else "right", va="center", fontsize=8,
            )  # fmt: skip
