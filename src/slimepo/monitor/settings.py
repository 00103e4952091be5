"""How much the monitor may cost: its settings, the size of its sample, and how far apart its probes stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from slimepo.settings import Settings, validate

Kind = Literal["unlearning", "floor", "repetition", "entropy"]

# Shares of the budget. Likelihood falls long before answers break, so that most goes to scoring. The rest is for
# drawing the sample and for probes that take longer than the one before.
SCORING_SHARE, GENERATION_SHARE = 0.5, 0.2
# The part of scoring that pays for the reserve's first look.
_RESERVE_SHARE = 0.3
# What a pair costs of which one answer is read: the prompt is computed for both.
CHOSEN_SHARE = 0.6
# The sample is as large as lets this many probes be paid for: the first, the last and two between.
_PLANNED_PROBES = 4
FEWEST_PAIRS = 8
_MOST_PROBES = 50
# The first step of a run compiles and allocates; its time says nothing about the others.
_UNTIMED_STEPS = 1
# Greedy answers at the start and at the end.
_PLANNED_GENERATIONS = 2
_FEWEST_TOKENS = 16


class MonitorSettings(Settings):
    """What the displacement monitor measures, and how often (`slimepo.monitor.callback`).

    `pairs`: most pairs of the sample, of training and of held-out rows each. `every`, `generate_every`: optimizer steps
    between probes; None spaces them so that all of the monitor stays within `budget`, a share of the training
    time. `prompts`: prompts answered greedily with at most `max_new_tokens`; 0 turns that off. `entanglement`: training
    pairs whose gradients are compared. `stop_on`: warnings that end the run.
    """

    pairs: int = Field(64, ge=1)
    every: int | None = Field(None, ge=1)
    generate_every: int | None = Field(None, ge=1)
    budget: float = Field(0.02, gt=0, le=1)
    prompts: int = Field(4, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    entanglement: int = Field(0, ge=0)
    stop_on: list[Kind] = Field(default_factory=list)


def monitor_settings(value: bool | Mapping[str, Any] | MonitorSettings) -> MonitorSettings | None:
    """Settings from `true`, `false` (None: no monitor) or a mapping.

    Raises:
        InputError: a key or a value of the mapping is wrong.
    """
    if isinstance(value, MonitorSettings):
        return value
    if value is False:
        return None
    return validate(MonitorSettings, {} if value is True else value, "monitor")


def sample_size(settings: MonitorSettings, trained_pairs: float, sets: int) -> int:
    """Pairs of each of `sets` (training, held-out) that are scored, for a run over `trained_pairs` pairs in all.

    A training pair is taken to cost two forward passes, one of them backward: it is three where every weight needs a
    gradient, but a small model's forward pass is mostly overhead. No fewer than 8: the figures of fewer pairs say
    nothing, so that a run over fewer than about 4,600 pairs (2,300 with one set) spends more than the budget.
    """
    if settings.every is not None:
        return settings.pairs
    affordable = _affordable(settings, trained_pairs) * (1 - _RESERVE_SHARE)
    return min(settings.pairs, max(FEWEST_PAIRS, int(affordable / (sets * _PLANNED_PROBES))))


def reserve_size(settings: MonitorSettings, trained_pairs: float, size: int) -> int:
    """Further pairs whose chosen answers alone are kept for a second look, where the sample is smaller than asked for.

    As in `draw_sample`, none are better than fewer than the sample has: these would settle nothing.
    """
    affordable = int(_affordable(settings, trained_pairs) * _RESERVE_SHARE / CHOSEN_SHARE)
    more = min(settings.pairs - size, affordable)
    return more if settings.every is None and more >= size else 0


def _affordable(settings: MonitorSettings, trained_pairs: float) -> float:
    """Scored pairs that the run's budget for scoring pays for."""
    return settings.budget * SCORING_SHARE * trained_pairs * 2


def answer_length(
    settings: MonitorSettings,
    most: int,
    trained_pairs: float,
    seconds_per_scored_pair: float,
    seconds_per_token: float,
) -> int:
    """Tokens that a greedy answer may have: `most`, or the power of two (16 at least) that a short run pays for.

    Before the first step the run's time is foretold from what scoring has taken, as in `sample_size`.
    """
    if settings.generate_every is not None:
        return most
    whole = trained_pairs * 2 * seconds_per_scored_pair
    share = settings.budget * GENERATION_SHARE * whole
    affordable = share / (_PLANNED_GENERATIONS * max(seconds_per_token, 1e-9))
    return (
        most
        if affordable >= most
        else min(most, max(_FEWEST_TOKENS, 2 ** int(math.log2(max(affordable, 1)))))
    )


@dataclass
class Pace:
    """When one kind of probe is due: as often as `budget`, a share of the training time, pays for.

    The time of the whole run is foretold from the steps so far, and what one more probe costs from the last one. What
    is left of the budget after the probes so far and one at the end is spread evenly over the steps to come. There are
    never fewer than `least` probes between the first and the last, whatever they cost, and never more than 50.
    """

    budget: float
    least: int
    first_step: int
    last_step: int
    every: int | None = None
    spent: float = 0.0
    cost: float = 0.0
    done: int = 0  # between the first and the last
    last: int = 0  # the step of the latest probe

    def note(self, step: int, seconds: float, again: float | None = None) -> None:
        """A probe was made at `step`; `again`: the seconds of it that the next one will take too, else all."""
        self.done += self.first_step < step < self.last_step
        again = seconds if again is None else again
        # A fast one after a slow one may have been luck.
        self.cost = max(again, (self.cost + again) / 2)
        self.spent, self.last = self.spent + seconds, step

    def due(self, step: int, seconds_per_step: float) -> bool:
        """Whether a probe is due after `step`."""
        if step >= self.last_step or step <= self.last:
            return step >= self.last_step and step > self.last
        if self.every is not None:
            return step % self.every == 0
        return step - self.last >= self.gap(seconds_per_step)

    def gap(self, seconds_per_step: float) -> int:
        """Steps from the latest probe to the next one."""
        whole = seconds_per_step * (self.last_step - self.first_step)
        left = self.budget * whole - self.spent - self.cost
        affordable = int(left / self.cost) if self.cost > 0 else _MOST_PROBES
        between = min(max(affordable, self.least - self.done, 0), max(_MOST_PROBES - self.done, 0))
        return max(1, math.ceil((self.last_step - self.last) / (between + 1)))


class StepClock:
    """Seconds of training without the monitor's own, as a mean over steps; the first step is left out.

    `carried` and `spent` count on from where a resumed run stood; the mean is of the steps since.
    """

    def __init__(self, step: int, now: float) -> None:
        self._first, self._started, self._own, self.carried, self.spent = step, now, 0.0, 0.0, 0.0
        self._timed_from: tuple[int, float] | None = None

    def own(self, seconds: float) -> None:
        """The monitor itself took that long."""
        self._own += seconds
        self.spent += seconds

    def training(self, now: float) -> float:
        """Seconds since the start, the monitor's left out."""
        return self.carried + now - self._started - self._own

    def per_step(self, step: int, now: float) -> float | None:
        """Mean seconds of a step; None before two steps have been timed."""
        if self._timed_from is None:
            if step - self._first >= _UNTIMED_STEPS:
                self._timed_from = (step, self.training(now))
            return None
        first, seconds = self._timed_from
        return (self.training(now) - seconds) / (step - first) if step - first >= 2 else None
