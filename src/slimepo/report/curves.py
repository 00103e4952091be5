"""Curves over the steps of training, a line a group: what was logged, what was sampled, what the monitor saw."""

from __future__ import annotations

import bisect
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimepo.report.figures import (
    INK,
    LONGEST_NAME,
    MOST_NAMED,
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
from slimepo.report.groups import Group, Spread, short_names
from slimepo.report.records import Record

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
    ("sampled/cost", "Cost of samples"),
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
    ("heldout/chosen", "Chosen answers, nats per token"),
    ("heldout/rejected", "Rejected answers, nats per token"),
    ("heldout/margin", "Margin, nats per token"),
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
# What a run costs, of which a change since its start says nothing.
_COSTS = ("tokens_per_second", "sampled/total", "time/")
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

    Where runs start from different levels, a panel has a second drawing, of changes since each run's own start. What
    never moved in any run is told in a title alone, and a metric that no run has is left out. `starts` are levels of
    the common start, dashed.
    """
    panels = []
    for key, title in metrics:
        drawn = {group.label: points for group in groups if (points := band(group, lines, key))}
        if not drawn:
            continue
        levels = {value for each in drawn.values() for _, spread in each for value in spread[:3]}
        if len(levels) == 1 and len(next(iter(drawn.values()))) > 1:
            panels.append(Panel(f"{title} {levels.pop():.3g}", ""))
            continue
        firsts = [own[0][1] for g in groups for r in g.records if (own := _points(r, lines, key))]
        differ = max(firsts) - min(firsts) > 1e-6 and not key.startswith(_COSTS)
        ends = "; ".join(f"{label} ends at {points[-1][1].median:.3g}" for label, points in drawn.items())
        level = _drawing(groups, lines, key, (starts or {}).get(key), f"{title}, over the steps: {ends}")
        change = ""
        if differ:
            moved = {g.label: points[-1][1].median for g in groups if (points := band(g, lines, key, True))}
            ends = "; ".join(f"{label} ends at {value:+.3g}" for label, value in moved.items())
            words = f"{title}, change since the start, over the steps: {ends}"
            change = _drawing(groups, lines, key, 0.0, words, since_start=True)
        panels.append(Panel(title, level, change))
    return panels


def _drawing(
    groups: Sequence[Group],
    lines: Lines,
    key: str,
    start: float | None,
    words: str,
    since_start: bool = False,
) -> str:
    look, names = styles(groups), short_names(groups, LONGEST_NAME)
    drawn = {g.label: points for g in groups if (points := band(g, lines, key, since_start))}
    named = 1 < len(drawn) <= MOST_NAMED
    # Many bands on each other would be grey.
    shade = 0.16 if len(drawn) <= 4 else 0.1
    with figure_of(WIDE, 2.3, right=0.76 if named else 0.975) as (figure, axes):
        for at, group in enumerate(groups):
            if group.label in drawn:
                with toggled(axes, at):
                    # Where runs stop that did not come to their end.
                    ended = [
                        _points(r, lines, key, since_start) for r in group.records if r.state != "finished"
                    ]
                    _line(
                        axes,
                        drawn[group.label],
                        look[group.label],
                        [each[-1] for each in ended if each],
                        shade,
                    )
        start_line(axes, start)
        axes.set_xlabel("step")
        axes.margins(x=0.03, y=0.08)
        if named:
            ends = [
                End(drawn[label][-1][0], drawn[label][-1][1].median, names[label], look[label].colour, at)
                for at, label in enumerate(group.label for group in groups)
                if label in drawn
            ]
            label_ends(axes, ends)
        return svg(figure, f"curve-{key}-{since_start}", words)


def _line(
    axes: Any,
    points: Sequence[tuple[float, Spread]],
    style: Style,
    stopped: Sequence[tuple[float, float]],
    shade: float,
) -> None:
    xs, ys = [step for step, _ in points], [value.median for _, value in points]
    if any(value.n > 1 for _, value in points):
        low, high = [value.low for _, value in points], [value.high for _, value in points]
        axes.fill_between(xs, low, high, color=style.colour, alpha=shade, linewidth=0)
    axes.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=1.5)
    axes.plot(xs[-1:], ys[-1:], style.marker, color=style.colour, markersize=4.5)
    for x, y in stopped:
        axes.plot([x], [y], "x", color=INK, markersize=7, markeredgewidth=1.6)


def band(group: Group, lines: Lines, key: str, since_start: bool = False) -> list[tuple[float, Spread]]:
    """Step, and the metric over the seeds that came so far, or its change since each seed's first line.

    Seeds log at different steps: each is read off its own line between two points, and none is carried on past its
    last. The band ends where the first of the seeds that came to their end does.
    """
    seeds = [_points(record, lines, key, since_start) for record in group.records]
    ended = zip(seeds, group.records, strict=True)
    ends = [points[-1][0] for points, record in ended if points and record.state == "finished"]
    last = min(ends, default=math.inf)
    within = [[point for point in points if point[0] <= last] for points in seeds]
    kept = sorted({step for points in within for step in _thinned(points)})
    found = [(step, [value for points in seeds if (value := _at(points, step)) is not None]) for step in kept]
    return [(step, Spread(statistics.median(v), min(v), max(v), len(v))) for step, v in found if v]


def _points(record: Record, lines: Lines, key: str, since_start: bool = False) -> list[tuple[float, float]]:
    """Steps and values in rising order; of two lines at one step the later."""
    found = {line["step"]: line[key] for line in lines(record) if key in line and "step" in line}
    points = sorted(found.items())
    return [(step, value - points[0][1]) for step, value in points] if since_start else points


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
