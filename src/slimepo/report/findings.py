"""What the numbers say, in plain words and whatever they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from slimepo.means import Mean, mean_of
from slimepo.report.groups import Group, by_rate, changes, count, percent, plain_label
from slimepo.report.map import BOTH_DOWN, moves
from slimepo.report.records import Source, Warned, by_kind
from slimepo.report.tables import best_group, other_seeds, start_group, trouble
from slimepo.words import short_number

# So many runs are named in a sentence.
_MOST_NAMED = 3
_CONTROL = "plain SFT on the chosen answers"


class Finding(NamedTuple):
    """A sentence or two about the numbers under a short heading, and lines that go with them."""

    head: str
    text: str
    lines: tuple[str, ...] = ()


def findings(groups: Sequence[Group], sources: Sequence[Source]) -> list[Finding]:
    """The page's first words: what stopped, what the monitor warned of, what became better or worse."""
    start = start_group(sources)
    records = [record for group in groups for record in group.records]
    found = []
    if lines := tuple(f"{group.label}: {text}" for group in groups if (text := trouble(group))):
        ended = sum(record.state == "finished" for record in records)
        found.append(Finding("Not to the end", f"{ended} of {len(records)} runs came to their end.", lines))
    lines = tuple(_warned(group) for group in groups if any(record.warnings for record in group.records))
    if lines or any(record.monitor for record in records):
        found.append(Finding("Monitor", "It warned of:" if lines else "It warned of nothing.", lines))
    if best := best_group(groups):
        found.append(Finding("Best exact match", _best_match(best, groups, start)))
    for head, lead, words in _BY_RATE:
        told = {name: words(together) for name, together in by_rate(groups).items()}
        if lines := tuple(f"{name}: {text}" for name, text in told.items() if text):
            found.append(Finding(head, lead, lines))
    valid = [(form.median, group.label) for group in groups if (form := group.after("format_valid"))]
    if valid:
        valid.sort(key=lambda each: each[0])
        ends = [(*valid[-1], "highest"), (*valid[0], "lowest")][: len(valid)]
        shares = [f"{percent(share, 1)} with {label} (the {which})" for share, label, which in ends]
        began = start.after("format_valid") if start else None
        shares += [f"{percent(began.median, 1)} at the start"] if began else []
        found.append(Finding("Format", f"Answers in a valid form: {', '.join(shares)}."))
    if sure := _certainty(groups, start):
        found.append(Finding("How sure", sure))
    return found


def verdict(groups: Sequence[Group]) -> str:
    """What training did, in a few sentences: to right answers, and to chosen and rejected ones."""
    # Of one run its name says nothing.
    several = len(groups) > 1
    matched = [(moved, group) for group in groups if (moved := mean_of(changes(group, "exact_match"))).n]
    sentences = []
    if matched:
        matched.sort(key=lambda each: -each[0].value)
        ends = [matched[0], *matched[1:][-1:]]
        told = " and ".join(
            f"{_moved_by(moved, 100, 1)}{' points' if moved is ends[0][0] else ''}"
            f"{f' with {plain_label(group)}' if several else ''}"
            for moved, group in ends
        )
        most = f", the most and the least of {len(matched)}" if len(matched) > 2 else ""
        sentences.append(f"Right answers on held-out prompts: {told}{most}.")
    found = moves(groups)

    def figures(moved: Sequence[tuple[Mean, Group]], within: str = "{} {}") -> str:
        """Changes, the largest first, each with its group's name."""
        named = [
            within.format(plain_label(group), _moved_by(change, 1, 3)) if several else _moved_by(change, 1, 3)
            for change, group in sorted(moved, key=lambda each: -abs(each[0].value))
        ]
        return _some(named)

    chosen = [(move.chosen, move.group) for move in found]
    for risen, words in ((True, "likelier"), (False, "less likely")):
        if named := [each for each in chosen if _clear(each[0]) and (each[0].value > 0) is risen]:
            sentences.append(f"Chosen answers became {words}, in nats a token: {figures(named)}.")
    if still := [each for each in chosen if not _clear(each[0])]:
        who = "They" if len(still) < len(chosen) else "Chosen answers"
        sentences.append(f"{who} did not clearly move{_with(several, figures(still, '{} ({})'))}.")
    # Of what only sees right answers nobody expects it.
    gaps = [
        (mean_of([up - down for up, down in move.seeds]), move.group)
        for move in found
        if move.group.first.loss != "sft"
    ]
    narrow = [(gap, group) for gap, group in gaps if not (_clear(gap) and gap.value > 0)]
    if narrow:
        told = _with(several, figures(narrow, "{} ({})"))
        sentences.append(f"The gap to rejected answers did not clearly widen{told}.")
    elif gaps and not several:
        # Of several runs the map shows it, and only what did not do so is worth a sentence.
        sentences.append(f"The gap to rejected answers widened: {figures(gaps)}.")
    both = [plain_label(move.group) for move in found if _clear(move.chosen) and move.quadrant == BOTH_DOWN]
    if both:
        who = f"With {', '.join(both)} rejected" if several else "Rejected"
        sentences.append(f"{who} answers fell too: that is unlearning.")
    return " ".join(sentences)


def _with(several: bool, told: str) -> str:
    return f" with {told}" if several else f" ({told} nats a token)"


def _some(told: Sequence[str]) -> str:
    """The first few of several, and how many more there are."""
    more = f" and {len(told) - _MOST_NAMED} more" * (len(told) > _MOST_NAMED)
    return ", ".join(told[:_MOST_NAMED]) + more


def _clear(change: Mean) -> bool:
    """Whether a change is more than chance between seeds; of one seed, more than a hundredth of a nat."""
    return abs(change.value) > (change.half if change.n > 1 else 0.01)


def _moved_by(change: Mean, scale: int, digits: int) -> str:
    half = f" ± {scale * change.half:.{digits}f}" if change.n > 1 else ""
    return f"{scale * change.value:+z.{digits}f}{half}"


def _warned(group: Group) -> str:
    """What the monitor said of a group: of the seed whose chosen answers fell most, and how many seeds it warned of."""
    warned = [record for record in group.records if record.warnings]
    key = "logps/chosen"
    worst = min(
        warned, key=lambda r: r.after[key] - r.before[key] if key in r.after and key in r.before else 0.0
    )
    seeds = f"{len(warned)} of {len(group.records)} seeds, " if len(group.records) > 1 else ""
    return f"{plain_label(group)}: {seeds}{_worst(worst.warnings)}"


def _worst(warnings: Sequence[Warned]) -> str:
    """The last words on what held to the end, or else on the first, and how many there are beside it."""
    found = [each for each in by_kind(warnings) if each[0].kind != "cure"] or by_kind(warnings)
    # Unlearning before all others.
    found.sort(key=lambda each: (each[1].gone is not None, each[0].kind != "unlearning"))
    (first, last), *others = found
    step = "" if first.step is None else f"step {first.step:.0f}, "
    if first.step is not None and last.step is not None and first.step != last.step:
        step = f"from step {first.step:.0f} on; at step {last.step:.0f} "
    gone = "" if last.gone is None else f" (gone at step {last.gone:.0f})"
    over = [end.gone for _, end in others if end.kind == "unlearning" != last.kind and end.gone is not None]
    among = f", among them unlearning until step {max(over):.0f}" if over else ""
    return f"{step}{last.text}{gone}{f' (and {len(others)} more{among})' if others else ''}"


def _match(group: Group) -> str:
    match = group.mean("exact_match")
    return "" if match is None else percent(match, 1)


def _best_match(best: Group, groups: Sequence[Group], start: Group | None) -> str:
    # What others start from is no control to them.
    starts = {(record.source, record.start) for group in groups for record in group.records}
    supervised = [group for group in groups if group.first.loss == "sft"]
    control = best_group([g for g in supervised if (g.first.source, g.first.stage) not in starts])
    others = best_group([group for group in groups if group.first.loss != "sft"])
    text = f"{best.label}{f', the control ({_CONTROL})' if best is control else ''}: {_match(best)}"
    text += f", from {_match(start)} at the start." if start and _match(start) else "."
    if start and _match(start) and best_group([start, best]) is start:
        text = f"No run is better than the start. The nearest is {text}"
    if other_seeds(groups):
        text += " Not all have the same seeds, so that the change since the start decides."
    if best is control and others is not None:
        text += f" Best of those that also see rejected answers: {others.label}, {_match(others)}."
    elif control is not None and best is not control:
        text += f" The control, {_CONTROL}: {_match(control)} at its best ({control.label})."
    return text


def _rate_words(groups: Sequence[Group]) -> str:
    have = [group for group in groups if _match(group) and group.first.learning_rate is not None]
    if len({group.first.learning_rate for group in have}) < 2:
        return ""
    rates = " to ".join(short_number(group.first.learning_rate) for group in (have[0], have[-1]))
    return f"{_match(have[0])} → {_match(have[-1])} ({rates})"


def _fell_words(groups: Sequence[Group]) -> str:
    have = [(fell, g.first.learning_rate) for g in groups if (fell := g.spread(lambda r: r.chosen_fell))]
    return ", ".join(f"{percent(fell.median, 0)} at {short_number(rate)}" for fell, rate in have)


# Head, lead, and the words on groups that differ in the learning rate only.
_BY_RATE: tuple[tuple[str, str, Callable[[Sequence[Group]], str]], ...] = (
    ("Learning rate", "Exact match from the lowest to the highest rate tried:", _rate_words),
    ("Chosen answers", "Share of held-out pairs whose chosen answer became less likely:", _fell_words),
)


def _certainty(groups: Sequence[Group], start: Group | None) -> str:
    records = [record for group in groups for record in group.records]
    prompts = min((record.prompts for record in records if record.prompts), default=0)
    shares = [match.median for group in groups if (match := group.after("exact_match"))]
    shares += [r.after["exact_match"] for r in start.records if "exact_match" in r.after] if start else []
    known = [share for share in shares if 0 <= share <= 1]
    # Runs with other settings are no seeds of one another.
    seeds = max((len({record.seed for record in group.records}) for group in groups), default=0)
    told = f"{seeds} seeds" if seeds > 1 else "One seed of each" if len(groups) > 1 else "One seed"
    pairs = sorted({int(record.heldout) for record in records if record.heldout})
    if prompts < 1 or not known:
        rest = "; another seed was not tried" if seeds < 2 else ""
        amount = " to ".join(count(each) for each in (pairs[0], *pairs[1:][-1:])) if pairs else ""
        return f"{told} and {amount} held-out pair{'' if pairs == [1] else 's'}{rest}." if pairs else ""
    # The share nearest to one half has the widest interval.
    share = min(known, key=lambda share: abs(share - 0.5))
    points = 196 * math.sqrt(share * (1 - share) / prompts)
    rest = " Smaller differences may be chance, and another seed was not tried." if seeds < 2 else ""
    return (
        f"{told} and {count(prompts)} held-out prompts: an exact match {'' if seeds < 2 else 'of each run '}is known "
        f"to about ± {points:.1f} points (95 %).{rest}"
    )
