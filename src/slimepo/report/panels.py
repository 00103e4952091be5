"""Panels: over the steps of training and the learning rate (seeds are a band), before and after, by family of tasks."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimepo.report.figures import FAINT, INK, NARROW, WIDE, Panel, Style, figure_of, start_line, styles, svg
from slimepo.report.groups import Group, Spread, by_rate, by_series
from slimepo.report.records import Distribution, Record
from slimepo.words import short_number

# Metric, title. Those of an objective's own that are not here are drawn under their names.
MAIN = (
    ("logps/chosen", "Chosen answers, nats per token"),
    ("logps/rejected", "Rejected answers, nats per token"),
    ("margin", "Margin, nats per token"),
    ("loss", "Loss"),
    ("loss/chosen", "Loss: chosen term"),
    ("loss/rejected", "Loss: rejected term"),
    ("loss/distance", "Loss: distance term"),
    ("loss/preference", "Loss: preference term"),
    ("loss/nll", "Loss: likelihood term"),
    ("tokens_per_second", "Tokens per second"),
)
# Of answers that are sampled while a stage trains.
SAMPLED = (
    ("reward", "Reward of samples"),
    ("reward/std", "Spread of rewards in a group"),
    ("reward/equal", "Groups of equal reward"),
    ("preferred", "Samples preferred to the opponent's answers"),
    ("sampled/entropy", "Entropy of the policy, nats per token"),
    ("sampled/kl", "KL to the start (or the reference), nats per token"),
    ("sampled/distinct", "Distinct samples of a prompt"),
    ("sampled/identical", "Prompts whose samples are all the same"),
    ("sampled/tokens", "Length of samples, tokens"),
    ("sampled/tokens/max", "Longest sample, tokens"),
    ("sampled/finished", "Samples that end"),
    ("sampled/pairs", "Pairs a prompt"),
    ("sampled/total", "Tokens sampled so far"),
    ("logps/sampled", "Samples that are learned from, nats per token"),
    ("kl", "Penalty on leaving the reference, nats per token"),
    ("clipped", "Clipped tokens"),
    ("ratio", "Ratio to the policy that sampled"),
    ("sampler/mismatch", "Sampler and trainer apart, nats per token"),
    ("time/sample", "Sampling, seconds a step"),
    ("time/reward", "Rewards, seconds a step"),
    ("time/score", "Scoring samples, seconds a step"),
    ("time/train", "Forward and backward, seconds a step"),
)
# Shares of the held-out tasks, where these were answered while a stage trained.
ANSWERED = (
    ("exact_match", "Exact match on held-out tasks, %"),
    ("format_valid", "Valid format, %"),
    ("end_rate", "Answers that end, %"),
)
WATCHED = (
    ("heldout/chosen_change", "Change of chosen answers since the start, nats per token"),
    ("heldout/rejected_change", "Change of rejected answers since the start, nats per token"),
    ("heldout/chosen_fell", "Pairs whose chosen answer is less likely than at the start"),
    ("heldout/rejected_below_floor", "Rejected tokens under the floor"),
    ("heldout/past_soft_margin", "Pairs past SLIME's soft margin"),
    ("heldout/past_hard_margin", "Pairs past SLIME's hard margin"),
    ("heldout/entropy", "Entropy of the policy at chosen tokens, nats"),
    ("heldout/rejected_p1", "Rejected tokens: lowest percent, nats"),
    ("gradient_share/chosen", "Gradient share of the chosen term"),
    ("gradient_share/rejected", "Gradient share of the rejected term"),
    ("gradient_share/distance", "Gradient share of the distance term"),
    ("entanglement", "Entanglement of the two answers' gradients"),
    ("generation/length", "Length of the probe's answers, tokens"),
    ("generation/finished", "Probe's answers that end"),
    ("generation/repeated", "Probe's answers: repeated 4-grams"),
)
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
FAMILY = "exact_match/"
_NO_CURVES = ("step", "epoch", "learning_rate", "total_flos", "num_input_tokens_seen")
# Parts that a long curve is cut into; of each, three points are drawn.
_PARTS = 100

Lines = Callable[[Record], Sequence[Mapping[str, float]]]


def logged(record: Record) -> Sequence[Mapping[str, float]]:
    """The log lines of a record."""
    return record.curve


def answered(record: Record) -> Sequence[Mapping[str, float]]:
    """What a record's held-out tasks came to while it trained."""
    return record.answered


def watched(record: Record) -> Sequence[Mapping[str, float]]:
    """What the monitor saw of a record's held-out pairs; of its training pairs where none are held out."""
    lines = record.monitor
    if any(key.startswith("heldout/") for line in lines for key in line):
        return lines
    return [{key.replace("train/", "heldout/"): value for key, value in line.items()} for line in lines]


def other_metrics(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Every other metric that was logged, under its own name."""
    keys = {key for group in groups for record in group.records for line in record.curve for key in line}
    others = keys - {key for key, _ in (*MAIN, *SAMPLED)} - set(_NO_CURVES)
    return [(key, key) for key in sorted(others) if not key.startswith(("monitor/", "train_"))]


def curve_panels(
    groups: Sequence[Group],
    lines: Lines,
    metrics: Sequence[tuple[str, str]],
    starts: Mapping[str, float] | None = None,
) -> list[Panel]:
    """Metrics over the steps, a line a group: the median of its seeds with a band from lowest to highest.

    A metric that no run has is left out; `starts` are levels of the common start, dashed.
    """
    look, panels = styles(groups), []
    for key, title in metrics:
        drawn = {group.label: points for group in groups if (points := band(group, lines, key))}
        if not drawn:
            continue
        with figure_of(WIDE, 2.3) as (figure, axes):
            for group in groups:
                if group.label in drawn:
                    # Where runs stop that did not come to their end.
                    stopped = [_points(r, lines, key) for r in group.records if r.state != "finished"]
                    _line(axes, drawn[group.label], look[group.label], [each[-1] for each in stopped if each])
            start_line(axes, (starts or {}).get(key))
            axes.set_xlabel("step")
            axes.margins(x=0.03, y=0.08)
            ends = "; ".join(f"{label} ends at {points[-1][1].median:.3g}" for label, points in drawn.items())
            panels.append(Panel(title, svg(figure, f"curve-{key}", f"{title}, over the steps: {ends}")))
    return panels


def _line(
    axes: Any, points: Sequence[tuple[float, Spread]], style: Style, stopped: Sequence[tuple[float, float]]
) -> None:
    xs, ys = [step for step, _ in points], [value.median for _, value in points]
    if any(value.n > 1 for _, value in points):
        low, high = [value.low for _, value in points], [value.high for _, value in points]
        axes.fill_between(xs, low, high, color=style.colour, alpha=0.16, linewidth=0)
    axes.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=1.5)
    axes.plot(xs[-1:], ys[-1:], style.marker, color=style.colour, markersize=4.5)
    for x, y in stopped:
        axes.plot([x], [y], "x", color=INK, markersize=7, markeredgewidth=1.6)


def band(group: Group, lines: Lines, key: str) -> list[tuple[float, Spread]]:
    """Step, and the metric over the seeds that came so far.

    Seeds log at different steps: each is read off its own line between two points, and none is carried on past its
    last. The band ends where the first of the seeds that came to their end does.
    """
    seeds = [_points(record, lines, key) for record in group.records]
    ended = zip(seeds, group.records, strict=True)
    ends = [points[-1][0] for points, record in ended if points and record.state == "finished"]
    last = min(ends, default=math.inf)
    within = [[point for point in points if point[0] <= last] for points in seeds]
    kept = sorted({step for points in within for step in _thinned(points)})
    found = [(step, [value for points in seeds if (value := _at(points, step)) is not None]) for step in kept]
    return [(step, Spread(statistics.median(v), min(v), max(v), len(v))) for step, v in found if v]


def _points(record: Record, lines: Lines, key: str) -> list[tuple[float, float]]:
    """Steps and values in rising order; of two lines at one step the later."""
    return sorted(
        {line["step"]: line[key] for line in lines(record) if key in line and "step" in line}.items()
    )


def _at(points: Sequence[tuple[float, float]], step: float) -> float | None:
    """The value at a step, linear between two points; None outside of them."""
    place = bisect.bisect_left(points, (step, -math.inf))
    if place < len(points) and points[place][0] == step:
        return points[place][1]
    if place in (0, len(points)):
        return None
    (low, was), (high, now) = points[place - 1], points[place]
    return was + (now - was) * (step - low) / (high - low)


def _thinned(points: Sequence[tuple[float, float]]) -> list[float]:
    """The steps of a curve; of a long one the first of each part, its lowest, its highest, and the last of all."""
    if len(points) <= 3 * _PARTS:
        return [step for step, _ in points]
    size, value = -(-len(points) // _PARTS), operator.itemgetter(1)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    drawn = [point for part in parts for point in (part[0], min(part, key=value), max(part, key=value))]
    return [step for step, _ in (*drawn, points[-1])]


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
            ends = [(points[-1][2].median, name) for name, points in lines.items()]
            if key in starts:
                start_line(axes, starts[key] * scale)
                ends.append((starts[key] * scale, "start"))
            rates = sorted({x for points in lines.values() for _, x, _ in points})
            axes.set_xticks(rates, [short_number(rate) for rate in rates])
            axes.minorticks_off()
            axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.35)
            axes.set_xlabel("learning rate")
            axes.margins(y=0.08)
            _label_ends(axes, ends)
            panels.append(Panel(title, svg(figure, f"rate-{key}", f"{title}, over the learning rate")))
    return panels


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
            labels = [label if len(label) <= 20 else label[:19] + "…" for label in shown]
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
                _family(axes, row, key, shown, look)
            axes.set_yticks(range(len(keys)), [key.removeprefix(FAMILY) for key in keys])
            axes.set_ylim(-0.7, len(keys) - 0.3)
            axes.set_xlim(-3, 103)
            axes.set_xlabel("exact match, %")
            axes.grid(axis="x", visible=False)
            panels.append(Panel(name, svg(figure, f"family-{name}", f"exact match by family, {name}")))
    return panels


def _family(axes: Any, row: int, key: str, groups: Sequence[Group], look: Mapping[str, Style]) -> None:
    """A family's row: where the first group that knows it started, and where each of the groups came to."""
    start = None
    for place, group in enumerate(groups):
        y = row + 0.3 * ((len(groups) - 1) / 2 - place) / max(1, len(groups) - 1) * 1.4
        was, now, style = group.spread(lambda r: r.before.get(key)), group.after(key), look[group.label]
        start = start or was
        if was is not None and now is not None:
            xs = [100 * was.median, 100 * now.median]
            axes.plot(xs, [y, y], color=style.colour, linewidth=1, alpha=0.6)
        if now is not None:
            axes.plot([100 * now.median], [y], style.marker, color=style.colour, markersize=4.2)
    if start is not None:
        axes.plot([100 * start.median] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=1.6)
