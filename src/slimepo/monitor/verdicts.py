"""When the monitor speaks up: thresholds and plain words, over the figures of a probe and those of step 0.

Every kind has a threshold at which it comes on and a milder one at which it goes off again, so that a figure that
hovers at the threshold is reported once. docs/monitor.md argues for the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimepo.monitor.settings import FEWEST_PAIRS, Kind

Figures = Mapping[str, Any]
# What is warned of, and of which set; None where it is of no set.
Warned = tuple[Kind, str | None]


@dataclass(frozen=True)
class Verdict:
    """What one kind of warning comes to: whether it holds now, about which rows, and in what words."""

    kind: Kind
    holds: bool
    rows: str | None
    message: str


# Nats per token. exp(-0.1) = 0.9: over 100 tokens the whole answer becomes e^10 = 22,000 times less likely.
FELL_ON, FELL_OFF = 0.1, 0.05
# Share of the pairs that must have fallen: an average that a few pairs pull down is another story.
FELL_SHARE = 0.5
# Standard errors by which the fall must stand out from the spread over pairs. With a dozen pairs chance exceeds 2 of
# them in 4 looks out of 100, 3 in less than one (Student's t), and a run is looked at many times.
FELL_ERRORS = 3.0
# Share of rejected tokens, as a rise since step 0.
UNDER_ON, UNDER_OFF = 0.25, 0.2
# Fall of the 5th percentile of rejected tokens since step 0, in nats: e^5 = 148 times less likely.
PERCENTILE_ON, PERCENTILE_OFF = 5.0, 4.0
# Share of greedy answers that loop, or do not end, as a rise since step 0.
BROKEN_ON, BROKEN_OFF = 0.5, 0.25
# Nats per token, absolute (e^0.1 = 1.1 choices a token), and as a part of what it was at step 0.
ENTROPY_ON, ENTROPY_OFF = 0.1, 0.15
ENTROPY_PART_ON, ENTROPY_PART_OFF = 0.25, 0.35
# How many times its own entropy the model is surprised by the chosen answers: 1 is a calibrated model.
OVERCONFIDENT = 3.0

WORDS = {"train": "trained on", "heldout": "held out"}


def judge_pairs(now: Mapping[str, Any], start: Mapping[str, Any], on: Mapping[Warned, bool]) -> list[Verdict]:
    """Every kind of warning about pairs, of each set (`train`, `heldout`) of which its figure is there.

    `on` says which hold already.
    """
    return [
        judge(rows, now[rows], start[rows], on.get((kind, rows), False))
        for kind, (figure, judge) in _JUDGES.items()
        for rows in WORDS
        if now.get(rows) and now[rows].get(figure) is not None
    ]


def _unlearning(rows: str, now: Figures, start: Figures, on: bool) -> Verdict:
    change, error, fell = now["chosen_change"], now["chosen_change_error"], now["chosen_fell"]
    certain = error is not None and now["chosen_pairs"] >= FEWEST_PAIRS and change + FELL_ERRORS * error < 0
    holds = change <= -FELL_OFF if on else change <= -FELL_ON and fell >= FELL_SHARE and certain
    message = (
        f"chosen answers {WORDS[rows]} are {-change:.2g} nats per token less likely than at the start on "
        f"average, and less likely in {fell:.0%} of {now['chosen_pairs']:,} pairs: unlearning"
    )
    return Verdict("unlearning", holds, rows, message)


def _floor(rows: str, now: Figures, start: Figures, on: bool) -> Verdict:
    below, before = now["rejected_below_floor"], start["rejected_below_floor"]
    lowest, lowest_before = now["rejected_p5"], start["rejected_p5"]
    limit_rise, limit_drop = (UNDER_OFF, PERCENTILE_OFF) if on else (UNDER_ON, PERCENTILE_ON)
    reasons = []
    if below - before >= limit_rise:
        reasons.append(f"{below:.0%} of their tokens are under the floor ({before:.0%} at the start)")
    if lowest_before - lowest >= limit_drop:
        reasons.append(
            f"the least likely 5 % of their tokens are at {lowest:.1f} nats or lower ({lowest_before:.1f} at the start)"
        )
    message = f"rejected answers {WORDS[rows]} are collapsing: {', '.join(reasons)}"
    return Verdict("floor", bool(reasons), rows, message)


def _entropy(rows: str, now: Figures, start: Figures, on: bool) -> Verdict:
    entropy, before, chosen = now["entropy"], start["entropy"], now["chosen"]
    level, part = (ENTROPY_OFF, ENTROPY_PART_OFF) if on else (ENTROPY_ON, ENTROPY_PART_ON)
    narrow = entropy <= level and entropy <= part * before
    message = (
        f"the model has become sure of itself without being right: {entropy:.2g} nats of entropy per token "
        f"({before:.2g} at the start), while chosen answers {WORDS[rows]} surprise it by {-chosen:.2g}: "
        "entropy collapse"
    )
    return Verdict("entropy", narrow and -chosen >= OVERCONFIDENT * entropy, rows, message)


# With the figure without which a kind is not judged: a demonstration has no rejected answer, and of all held-out pairs,
# at the end of a run, there are log-probs alone.
_JUDGES: Mapping[Kind, tuple[str, Callable[[str, Figures, Figures, bool], Verdict]]] = {
    "unlearning": ("chosen_change", _unlearning),
    "floor": ("rejected_below_floor", _floor),
    "entropy": ("entropy", _entropy),
}


def judge_answers(now: Figures, start: Figures, on: Mapping[Warned, bool]) -> Verdict:
    """Repetition: greedy answers that loop, or go on without end, where they did not at step 0."""
    held = on.get(("repetition", None), False)
    limit = BROKEN_OFF if held else BROKEN_ON
    endless = start["finished"] - now["finished"]
    loops = now["looping"] - start["looping"]
    if held:
        # A loop that varies a little is still one: what was said of it is not taken back for that.
        loops = max(loops, (now["repeated"] or 0.0) - (start["repeated"] or 0.0))
    count = len(now["answers"])
    message = (
        f"of {count} greedy answers {round(now['looping'] * count)} repeat themselves "
        f"({round(start['looping'] * count)} at the start) and {round((1 - now['finished']) * count)} do not end "
        f"within the limit ({round((1 - start['finished']) * count)} at the start): degenerate generation"
    )
    return Verdict("repetition", max(endless, loops) >= limit - 1e-9, None, message)


def last_facts(lines: Sequence[Mapping[str, Any]], heldout: Figures | None = None) -> list[str]:
    """What matters most about a monitored run: what was warned of and still holds, then at most three facts.

    lines: of its file. heldout: the stage's record of all its held-out pairs, which the facts are then of.
    """
    probes = [x for x in lines if x["kind"] == "probe"]
    answers = [x for x in lines if x["kind"] == "generation"]
    last = {(x["warning"], x["set"]): x for x in lines if x["kind"] == "warning"}
    # Of two sets the later one, which is the held-out one where all held-out pairs have had the last word.
    holding = {x["warning"]: x for x in last.values() if x["state"] == "on"}
    said = [f"Warning: {x['message']}." for x in holding.values()]
    name = "heldout" if probes and probes[0]["heldout"] else "train"
    if heldout is not None:
        said += heldout_facts(heldout)
    elif probes and probes[-1][name] is not None:
        said += facts(name, probes[-1][name], probes[0][name], probes[-1][name]["chosen_fell"])
    if answers:
        said.append(answers_fact(answers[-1], answers[0]))
    return said


def facts(rows: str, now: Figures, start: Figures, chosen_fell: float | None) -> list[str]:
    """What became of pairs, in plain words: the chosen answers, then the separation.

    rows: train or heldout. now, start: `chosen`, `accuracy` and `margin`, absent or None where no pair has them.
    """
    said = []
    if now.get("chosen") is not None and start.get("chosen") is not None and chosen_fell is not None:
        said.append(
            f"Chosen answers {WORDS[rows]} are {change_in_words(now['chosen'] - start['chosen'])}; "
            f"{chosen_fell:.0%} of them became less likely."
        )
    if now.get("accuracy") is not None and start.get("accuracy") is not None:
        said.append(
            f"The chosen answer is the likelier one in {now['accuracy']:.0%} of the pairs {WORDS[rows]} "
            f"({start['accuracy']:.0%} at the start), by {now['margin']:z.2f} nats per token on average "
            f"({start['margin']:z.2f})."
        )
    return said


def heldout_facts(heldout: Figures) -> list[str]:
    """`facts` of a stage's record of all its held-out pairs."""
    after, before = (
        {key.removeprefix("logps/"): value for key, value in heldout[when].items()}
        for when in ("after", "before")
    )
    return facts("heldout", after, before, heldout["chosen_fell"])


def answers_fact(now: Figures, start: Figures) -> str:
    """What became of the greedy answers, in plain words."""
    count = len(now["answers"])
    ends = f"{round(now['finished'] * count)} of {count} greedy answers end within the limit"
    loops = round(now["looping"] * count)
    repeats = (
        "none repeats itself" if not loops else f"{loops} repeat{'s itself' if loops == 1 else ' themselves'}"
    )
    return (
        f"{ends} ({round(start['finished'] * count)} at the start), {repeats}; "
        f"they are {now['length']:.0f} tokens long ({start['length']:.0f})."
    )


def change_in_words(change: float) -> str:
    """ "0.12 nats per token likelier", as a comparison."""
    if math.isclose(change, 0, abs_tol=0.005):
        return "as likely as at the start (to 0.01 nats per token)"
    return f"{abs(change):.2f} nats per token {'likelier' if change > 0 else 'less likely'} than at the start"
