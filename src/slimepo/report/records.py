"""What a report is about, as plain data: one `Record` a training run, one `Source` a folder, read from files.

A run folder gives a record a stage, those left out that do supervised training for others to start from; a folder of
`slimepo eval` gives none, only scores. Nothing that is absent is made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slimepo.evaluation.score_files import ScoreFile

State = Literal["finished", "stopped", "unfinished", "failed"]


@dataclass(frozen=True)
class Distribution:
    """Counts in bins before and after training; `edges` has one entry more. The end bins hold what lies beyond."""

    edges: list[float]
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class Warned:
    """What the monitor said, of which kind and when; `stopped` where it ended the run, `gone` when it was over."""

    step: float | None
    text: str
    stopped: bool = False
    gone: float | None = None
    kind: str = ""
    rows: str = ""


@dataclass(frozen=True)
class Answer:
    """One run's answer to a prompt; `correct`, `valid` and `finished` are None where nobody looked."""

    run: str
    text: str
    correct: bool | None = None
    valid: bool | None = None
    finished: bool | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt and what several runs answered."""

    prompt: str
    answers: tuple[Answer, ...]
    gold: str = ""
    family: str = ""


@dataclass(frozen=True)
class Fallen:
    """A chosen answer that became less likely: its tokens, their log-probs in nats before and after training.

    `mean` are log-probs per token of the whole answer before and after; `length` its tokens, of which the first stand
    here.
    """

    run: str
    prompt: str
    tokens: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    mean: tuple[float, float]
    length: int
    part: str = "heldout"


@dataclass(frozen=True)
class Record:
    """One training run, cleaned: every number in it is finite, and what was absent is None or empty.

    `settings` are flat (`loss_options.beta`) and without the seed: records with the same settings differ only in it.
    `before` and `after` are figures of held-out pairs and tasks, `heldout` and `prompts` how many these are;
    `start` is the stage that it started from; `curve` the log lines, `monitor` those of the monitor. `answered` are
    shares of the held-out tasks in percent, a line a step at which they were answered, and `over_time` prompts
    whose answers are called after the step that they are of; `fallen` are chosen answers that became less likely.
    `certificate` is what the run's first numbers were compared with.
    """

    name: str
    source: str
    loss: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    learning_rate: float | None = None
    state: State = "finished"
    note: str = ""
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    chosen_fell: float | None = None
    heldout: float | None = None
    prompts: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    monitor: list[dict[str, float]] = field(default_factory=list)
    warnings: tuple[Warned, ...] = ()
    distributions: dict[str, Distribution] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    answered: list[dict[str, float]] = field(default_factory=list)
    over_time: tuple[Sample, ...] = ()
    fallen: tuple[Fallen, ...] = ()
    monitor_facts: tuple[str, ...] = ()
    layout: str = ""
    trained_parameters: float | None = None
    kept: float | None = None
    dropped: dict[str, float] = field(default_factory=dict)
    dropped_heldout: dict[str, float] = field(default_factory=dict)
    steps: float | None = None
    seconds: float | None = None
    times: dict[str, float] = field(default_factory=dict)
    peak_memory: float | None = None
    stage: str = ""
    start: str = ""
    certificate: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One folder given to a report.

    `pairs` are the facts of pairs that the run made, `seconds` the time of that and of stages without a record.
    """

    path: Path
    records: tuple[Record, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    recipe: Any = None
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scores: tuple[ScoreFile, ...] = ()


def number(value: Any) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def numbers(value: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers."""
    return {key: found for key, item in mapping(value).items() if (found := number(item)) is not None}


def number_lines(lines: Sequence[Any]) -> list[dict[str, float]]:
    """Log lines, their numbers only; lines without a step are left out."""
    return [line for line in map(numbers, lines) if "step" in line]


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return list(value) if isinstance(value, list) else []


def distribution(value: Any) -> Distribution | None:
    """A histogram as it stands in a run folder; None where it is not whole."""
    told = [list(mapping(value).get(key) or ()) for key in ("edges", "before", "after")]
    sides = [[item for item in map(number, side) if item is not None] for side in told]
    edges, before, after = sides
    whole = [*map(len, sides)] == [*map(len, told)] and len(before) == len(after) == len(edges) - 1 > 0
    return Distribution(edges, before, after) if whole else None


def unique(names: Sequence[str]) -> list[str]:
    """The names, each repeated one with a number behind it."""
    made: list[str] = []
    for name in names:
        count, wanted = 1, name
        while wanted in made:
            count += 1
            wanted = f"{name} ({count})"
        made.append(wanted)
    return made


def by_kind(warnings: Sequence[Warned]) -> list[tuple[Warned, Warned]]:
    """The first and the last words on each kind of warning about each set of rows; every cure stands for itself."""
    found: dict[tuple[Any, ...], list[Warned]] = {}
    for warned in warnings:
        cured_at = warned.step if warned.kind == "cure" else None
        found.setdefault((warned.kind, warned.rows, cured_at), []).append(warned)
    return [(each[0], each[-1]) for each in found.values()]
