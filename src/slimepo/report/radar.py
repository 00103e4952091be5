"""MT-Bench by category as a radar plot: an axis a category, a closed line a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from slimepo.evaluation.benchmarks.mt_bench import CATEGORIES, category_table
from slimepo.report.benchmarks import ScoreColumn
from slimepo.report.figures import COLOURS, INK, LINES, MARKERS, WIDE, Panel, Style, figure_of, styles, svg
from slimepo.report.groups import Group
from slimepo.report.tables import settings_blocks

# More lines than these cannot be followed in one picture, and fewer axes span no area.
_MOST_MODELS, _FEWEST_CATEGORIES = 6, 3
_TOP = 10.0


def model_styles(column: ScoreColumn, groups: Sequence[Group]) -> dict[str, Style]:
    """One style a model: that of its run where the run is on the page too, else one that is left.

    Models of one group (seeds) share its colour and differ in line and marker.
    """
    look = styles(groups)
    of_run = {
        f"{Path(record.source).resolve().name}-{record.stage}": look[group.label]
        for group in groups
        for record in group.records
    }
    wanted = {label: of_run.get(run) for label, run in column.runs.items()}
    used = {style.colour for style in wanted.values() if style}
    free = sorted(COLOURS, key=lambda colour: colour in used)
    found: dict[str, Style] = {}
    for label in sorted(wanted, key=lambda label: wanted[label] is None):
        own = wanted[label]
        shapes = list(zip(LINES, MARKERS, strict=True))
        others = [Style(colour, *shape) for shape in shapes for colour in ([own.colour] if own else free)]
        choice = [own, *others] if own else others
        left = (style for style in choice if style not in found.values())
        found[label] = next(left, choice[len(found) % len(choice)])
    return {label: found[label] for label in column.runs}


def radar_panels(column: ScoreColumn, title: str, look: Mapping[str, Style]) -> list[Panel]:
    """The models of a column overlaid, at most six a picture; none where fewer than three categories are scored."""
    rows = category_table(column.scores)
    names = [name for name in CATEGORIES if any(name in row for row in rows)]
    if len(names) < _FEWEST_CATEGORIES:
        return []
    blocks = settings_blocks(rows, _MOST_MODELS)
    panels = []
    for at, (first, last) in enumerate(blocks, 1):
        models = {
            str(row["model"]): [float(row.get(name, math.nan)) for name in names] for row in rows[first:last]
        }
        part = f" ({at} of {len(blocks)})" if len(blocks) > 1 else ""
        drawn = _radar(f"{title}{part}", names, models, look)
        panels.append(Panel(f"Mean rating, 0 to 10{part}", drawn))
    return panels


def _radar(
    title: str, names: Sequence[str], models: Mapping[str, Sequence[float]], look: Mapping[str, Style]
) -> str:
    angles = [2 * math.pi * at / len(names) for at in range(len(names))]
    # Ratings beyond the scale count as they are.
    top = max([_TOP, *(value for values in models.values() for value in values if value == value)])
    with figure_of(WIDE, 3.1, left=0.2, right=0.8, bottom=0.13, top=0.87, polar=True) as (figure, axes):
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        for label, values in models.items():
            style, closed = look[label], [*values, values[0]]
            axes.plot(
                [*angles, angles[0]],
                closed,
                color=style.colour,
                linewidth=1.4,
                linestyle=style.line,
                marker=style.marker,
                markersize=3.6,
            )
            # A category without a score is a gap, not a zero.
            if not any(math.isnan(value) for value in values):
                axes.fill([*angles, angles[0]], closed, color=style.colour, alpha=0.07, linewidth=0)
        axes.set_ylim(0, top)
        axes.set_xticks(angles, [""] * len(names))
        axes.set_yticks([2, 4, 6, 8, 10], ["2", "4", "6", "8", "10"], fontsize=7)
        axes.set_rlabel_position(math.degrees(angles[1]) / 2)
        for name, angle in zip(names, angles, strict=True):
            across, up = math.sin(angle), math.cos(angle)
            side = "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
            height = "center" if abs(up) < 0.1 else "bottom" if up > 0 else "top"
            axes.text(angle, 1.06 * top, name, ha=side, va=height, color=INK)
        said = "; ".join(
            f"{label}: {', '.join(f'{n} {v:.2f}' for n, v in zip(names, values, strict=True) if v == v)}"
            for label, values in models.items()
        )
        return svg(figure, f"radar-{title}", f"{title}, mean ratings of 0 to {top:g}: {said}")
