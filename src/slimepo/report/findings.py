"""What the numbers say, in plain words and whatever they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from slimepo.report.groups import Group, Spread, by_rate, count, percent
from slimepo.report.records import Record, Source, Warned, short_number
from slimepo.report.tables import best_group, exact_match, start_group, trouble

_CONTROL = "plain SFT on the chosen answers"


class Finding(NamedTuple):
    """A sentence or two about the numbers under a short heading, and lines that go with them."""

    head: str
    text: str
    lines: tuple[str, ...] = ()


def findings(groups: Sequence[Group], sources: Sequence[Source]) -> list[Finding]:
    """The page's first words: what stopped, what the monitor warned of, what became better or worse."""
    start = start_group(sources)
    began = exact_match(start) if start else None
    made = [
        _troubles(groups),
        _warnings(groups),
        _best_match(groups, began),
        _by_rate(
            "Learning rate", "Exact match from the lowest to the highest rate tried:", groups, _rate_words
        ),
        _chosen(groups),
        _format(groups, start),
        _certainty(sources, [value.median for g in groups if (value := exact_match(g))]),
    ]
    return [finding for finding in made if finding is not None]


def _troubles(groups: Sequence[Group]) -> Finding | None:
    lines = tuple(f"{group.label}: {text}" for group in groups if (text := trouble(group)))
    ended = sum(record.state == "finished" for group in groups for record in group.records)
    total = sum(len(group.records) for group in groups)
    return Finding("Not to the end", f"{ended} of {total} runs came to their end.", lines) if lines else None


def _warnings(groups: Sequence[Group]) -> Finding | None:
    lines = []
    for group in groups:
        for record in group.records:
            if record.warnings:
                lines.append(f"{record.name}: {_worst(record.warnings)}")
    if not lines and not any(record.monitor for group in groups for record in group.records):
        return None
    return Finding("Monitor", "It warned of:" if lines else "It warned of nothing.", tuple(lines))


def _worst(warnings: Sequence[Warned]) -> str:
    """The last words on the first warning that held to the end, or on the first, and how many there are beside it."""
    found: dict[tuple[str, str], list[Warned]] = {}
    for warned in warnings:
        found.setdefault((warned.kind, warned.rows), []).append(warned)
    told = next((each for each in found.values() if each[-1].gone is None), next(iter(found.values())))
    first, last = told[0], told[-1]
    step = "" if first.step is None else f"step {first.step:.0f}, "
    if first.step is not None and last.step is not None and first.step != last.step:
        step = f"from step {first.step:.0f} on; at step {last.step:.0f} "
    gone = "" if last.gone is None else f" (gone at step {last.gone:.0f})"
    return f"{step}{last.text}{gone}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}"


def _best_match(groups: Sequence[Group], start: Spread | None) -> Finding | None:
    best = best_group(groups)
    if best is None:
        return None
    control = best_group([group for group in groups if group.first.loss == "sft"])
    others = best_group([group for group in groups if group.first.loss != "sft"])
    text = f"{best.label}{f', the control ({_CONTROL})' if best is control else ''}: {_match(best)}"
    text += f", from {percent(start.median, 1)} at the start." if start is not None else "."
    if start is not None and _median(best) <= start.median:
        text = f"No run is better than the start. The nearest is {text}"
    if best is control and others is not None:
        text += f" Best of those that also see rejected answers: {others.label}, {_match(others)}."
    elif control is not None:
        text += f" The control, {_CONTROL}: {_match(control)} at its best ({control.label})."
    return Finding("Best exact match", text)


def _by_rate(
    head: str, lead: str, groups: Sequence[Group], words: Callable[[list[Group]], str]
) -> Finding | None:
    told = [(name, words(together)) for name, together in by_rate(groups).items()]
    lines = tuple(f"{name}: {text}" for name, text in told if text)
    return Finding(head, lead, lines) if lines else None


def _rate_words(groups: list[Group]) -> str:
    have = [group for group in groups if exact_match(group) and group.first.learning_rate is not None]
    if len({group.first.learning_rate for group in have}) < 2:
        return ""
    low, high = have[0], have[-1]
    rates = f"{short_number(low.first.learning_rate)} to {short_number(high.first.learning_rate)}"
    return f"{_match(low)} → {_match(high)} ({rates})"


def _chosen(groups: Sequence[Group]) -> Finding | None:
    lead = "The chosen answer became less likely in so many held-out pairs:"
    return _by_rate("Chosen answers", lead, groups, _fell_words)


def _fell_words(groups: list[Group]) -> str:
    have = [(fell, short_number(group.first.learning_rate)) for group in groups if (fell := _fell(group))]
    return ", ".join(f"{percent(fell.median, 0)} at {rate}" for fell, rate in have)


def _format(groups: Sequence[Group], start: Group | None) -> Finding | None:
    have = sorted(((f.median, group) for group in groups if (f := _valid(group))), key=lambda each: each[0])
    if not have:
        return None
    ends = [(have[-1], "highest")] + ([(have[0], "lowest")] if len(have) > 1 else [])
    told = [f"{percent(share, 1)} with {group.label} (the {which})" for (share, group), which in ends]
    began = _valid(start) if start else None
    told += [f"{percent(began.median, 1)} at the start"] if began else []
    return Finding("Format", f"Answers in a valid form: {', '.join(told)}.")


def _certainty(sources: Sequence[Source], shares: Sequence[float]) -> Finding | None:
    records = [record for source in sources for record in source.records]
    prompts = min((record.prompts for record in records if record.prompts), default=0)
    start = start_group(sources)
    starts = [r.after["exact_match"] for r in start.records if "exact_match" in r.after] if start else []
    known = [share for share in (*shares, *starts) if 0 <= share <= 1]
    if not prompts or prompts < 1 or not known:
        return None
    # The share nearest to one half has the widest interval.
    share = min(known, key=lambda share: abs(share - 0.5))
    points = 196 * math.sqrt(share * (1 - share) / prompts)
    seeds = len({record.seed for record in records})
    told = "One seed" if seeds < 2 else f"{seeds} seeds"
    rest = " Smaller differences may be chance, and another seed was not tried." if seeds < 2 else ""
    each = "" if seeds < 2 else "of each run "
    return Finding(
        "How sure",
        f"{told} and {count(prompts)} held-out prompts: an exact match {each}is known to about ± {points:.1f} "
        f"points (95 %).{rest}",
    )


def _match(group: Group) -> str:
    return percent(_median(group), 1)


def _median(group: Group) -> float:
    value: Spread = exact_match(group)
    return value.median


def _fell(group: Group) -> Spread | None:
    return group.spread(_chosen_fell)


def _chosen_fell(record: Record) -> float | None:
    return record.chosen_fell


def _valid(group: Group) -> Spread | None:
    return group.spread(lambda record: record.after.get("format_valid"))
