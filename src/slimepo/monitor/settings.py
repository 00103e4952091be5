"""What the displacement monitor measures, and at which steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from slimepo.settings import Settings, validate

Kind = Literal["unlearning", "floor", "repetition", "entropy"]
Cure = Literal["stop", "lower-rate", "raise-anchor"]

# Of the steps of a run. Far too high a learning rate shows early, and a run that is to be stopped should stop early.
# Behind 1/16, though, healthy runs of supervised training dip too, and climb back.
FRACTIONS = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
# Of the sample: with fewer pairs little is certain, and more would not say much more.
FEWEST, MOST = 16, 64
# Of fewer pairs chance cannot be told from a fall: no warning says so.
FEWEST_PAIRS = 8


class MonitorSettings(Settings):
    """What the displacement monitor measures (`slimepo.monitor.callback`).

    `pairs`: pairs of the sample, of training and of held-out rows each; None: as many as `sample_size` says. `every`:
    optimizer steps from one look to the next; None looks at fixed fractions of the run. `prompts`: prompts answered
    greedily at each look with at most `max_new_tokens`; 0 turns that off. `entanglement`: training pairs whose
    gradients are compared. `stop_on`: warnings that end the run. `on_unlearning`: what is done at the warning of that
    name (`slimepo.monitor.cures`).
    """

    pairs: int | None = Field(None, ge=1)
    every: int | None = Field(None, ge=1)
    prompts: int = Field(4, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    entanglement: int = Field(0, ge=0)
    stop_on: list[Kind] = Field(default_factory=list)
    on_unlearning: Cure | None = None

    @model_validator(mode="after")
    def _one_thing_is_done(self) -> MonitorSettings:
        if self.cure and "unlearning" in self.stop_on:
            raise ValueError(
                f"stop_on: [unlearning] ends the run before on_unlearning: {self.cure} can help it: give one"
            )
        return self

    @model_validator(mode="after")
    def _what_is_asked_for_can_come(self) -> MonitorSettings:
        if "repetition" in self.stop_on and not self.prompts:
            raise ValueError(
                "stop_on: [repetition] is seen in answers, and prompts is 0: give some, such as 4"
            )
        if self.pairs is not None and self.pairs < FEWEST_PAIRS and (self.cure or "unlearning" in self.stops):
            raise ValueError(
                f"unlearning is not told from chance with pairs = {self.pairs}: give {FEWEST_PAIRS} or more, or leave "
                "stop_on and on_unlearning out"
            )
        return self

    @property
    def stops(self) -> list[Kind]:
        """The warnings that end the run."""
        ends: list[Kind] = ["unlearning"] if self.on_unlearning == "stop" else []
        return list(dict.fromkeys([*self.stop_on, *ends]))

    @property
    def cure(self) -> Cure | None:
        """What is changed in a run that unlearns; None where nothing is, or it is ended."""
        return None if self.on_unlearning == "stop" else self.on_unlearning


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


def look_steps(last_step: int, every: int | None = None) -> list[int]:
    """The steps behind which a run of `last_step` steps is looked at: before the first, a few, the last."""
    if every is not None:
        return sorted({*range(0, last_step, every), last_step})
    return sorted({math.ceil(fraction * last_step) for fraction in FRACTIONS})


def sample_size(trained: int, looks: int) -> int:
    """The pairs of each of two samples whose scores, at all looks, take a tenth of the work of training.

    To train on a pair, on `trained` of them over all steps, costs as much as to score three: backward is two forwards.
    """
    return min(MOST, max(FEWEST, 3 * trained // (10 * 2 * looks)))
