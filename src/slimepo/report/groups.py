"""Runs that differ only in the seed, together; what their settings have in common, and how figures are written."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from slimepo.means import mean_of
from slimepo.report.records import Record, number, unique
from slimepo.words import ABSENT, short_number

# Settings that a series is told apart by in its name.
_MOST_TOLD = 3
_LABELS = {
    name.lower(): name
    for name in ("SLIME", "DPO", "SimPO", "SFT", "KTO", "ORPO", "IPO", "GRPO", "RLOO", "PPO")
} | {"reinforce_pp": "REINFORCE++", "grpo/gspo": "GSPO"}


class Spread(NamedTuple):
    """A figure over seeds; with one seed all three are the same."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Group:
    """Records with the same settings but the seed, under one label."""

    label: str
    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def series(self) -> str:
        """The objective; it decides the colour."""
        return series_label(self.first.loss)

    def spread(self, figure: Callable[[Record], float | None]) -> Spread | None:
        """Median, lowest and highest of a figure over the seeds that have it."""
        values = [value for record in self.records if (value := figure(record)) is not None]
        return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None

    def after(self, key: str) -> Spread | None:
        """A held-out figure after training."""
        return self.spread(lambda record: record.after.get(key))

    def mean(self, key: str) -> float | None:
        """The mean over the seeds of a held-out figure after training."""
        values = [record.after[key] for record in self.records if key in record.after]
        return statistics.fmean(values) if values else None


class Cell(NamedTuple):
    """A figure in a table, and in small print its change since the start or its spread over seeds."""

    figure: str
    change: str = ""
    spread: str = ""

    @property
    def small(self) -> str:
        return self.change or self.spread

    def __str__(self) -> str:
        return f"{self.figure} ({self.small})" if self.small else self.figure


class Setting(NamedTuple):
    """A setting that the groups do not share: its value in each, and whether most have another."""

    key: str
    values: tuple[str, ...]
    rare: tuple[bool, ...]


def group_records(records: Sequence[Record]) -> list[Group]:
    """Groups in the order of their first records. A record without a seed stands for itself."""
    found: dict[str, list[Record]] = {}
    for at, record in enumerate(records):
        alone = "" if record.seed is not None and record.settings else f"#{at}"
        key = json.dumps(record.settings, sort_keys=True, default=str) + alone
        # The same seed twice is a repetition: shown beside, not averaged as if it were another seed.
        while any(other.seed == record.seed for other in found.get(key, ())):
            key += "'"
        found.setdefault(key, []).append(record)
    labels = [_label(group) for group in found.values()]
    # Of a sweep's runs the arm alone, where no other has its name.
    arms = [re.sub(r"(?<=.)/seed-\d+$", "", label) for label in labels]
    labels = unique([a if arms.count(a) == 1 else label for a, label in zip(arms, labels, strict=True)])
    return [Group(label, tuple(group)) for label, group in zip(labels, found.values(), strict=True)]


def series_label(series: str) -> str:
    """An objective's name as the literature writes it."""
    return _LABELS.get(series, series)


def by_series(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups of one objective together, the lowest learning rate first."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.series, []).append(group)
    return {
        name: sorted(together, key=lambda group: group.first.learning_rate or 0.0)
        for name, together in found.items()
    }


def by_rate(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups that differ in learning rate (and seed) only, together under their objective, the lowest rate first.

    Where an objective has several such sets, what they differ in stands beside its name: `DPO (beta 0.2)`.
    """
    found: dict[tuple[str, str], list[Group]] = {}
    for group in (group for together in by_series(groups).values() for group in together):
        rest = {key: value for key, value in group.first.settings.items() if key != "learning_rate"}
        found.setdefault((group.series, json.dumps(rest, sort_keys=True, default=str)), []).append(group)
    names = []
    for series, alike in found:
        sets = [together[0].first.settings for (other, _), together in found.items() if other == series]
        own = found[series, alike][0].first.settings
        differing = [
            key
            for key in dict.fromkeys(key for each in sets for key in each)
            if key != "learning_rate" and any(each.get(key) != sets[0].get(key) for each in sets)
        ]
        # Options of the objective say most.
        differing.sort(key=lambda key: not key.startswith("loss_options"))
        told_apart = [
            f"{key.rpartition('.')[2].replace('_', ' ')} {told(own[key])}" for key in differing if key in own
        ][:_MOST_TOLD]
        if differing and len(found[series, alike]) == 1:
            # The name of a run says more than its settings do.
            names.append(plain_label(found[series, alike][0]))
            continue
        names.append(f"{series} ({', '.join(told_apart)})" if told_apart else series)
    return dict(zip(unique(names), found.values(), strict=True))


def compare_settings(groups: Sequence[Group]) -> tuple[list[Setting], list[tuple[str, str]]]:
    """The settings that differ between groups, and those that are the same in all, as text."""
    own = [group.first.settings for group in groups]
    differing, same = [], []
    for key in dict.fromkeys(key for settings in own for key in settings):
        values = tuple(told(settings[key]) if key in settings else ABSENT for settings in own)
        usual, times = Counter(values).most_common(1)[0]
        rare = tuple(2 * times > len(values) and value != usual for value in values)
        if times == len(values):
            same.append((key, usual))
        else:
            differing.append(Setting(key, values, rare))
    return differing, same


def told(value: Any) -> str:
    """A setting's value in a table."""
    if value is None or value == {} or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short_number(value)
    if isinstance(value, (list, tuple, Mapping)):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def short_names(groups: Sequence[Group], longest: int) -> dict[str, str]:
    """What groups are called beside their lines, by label: without their seeds, or if some name is too long by their
    objectives, where these alone tell them apart."""
    names = {group.label: plain_label(group) for group in groups}
    if max(map(len, names.values()), default=0) > longest and len(by_series(groups)) == len(groups):
        return {group.label: group.series for group in groups}
    return names


def plain_label(group: Group) -> str:
    """A group's label without the number of its seeds."""
    return group.label.replace(f" ({len(group.records)} seeds)", "")


def _label(group: Sequence[Record]) -> str:
    """A record's own name; of several seeds what their names have in common, and how many they are."""
    if len(group) == 1:
        return group[0].name
    # A folder's name before a stage's is only there to tell seeds apart; before a seed's it is the arm of a sweep.
    folders, names = zip(*(record.name.rpartition("/")[::2] for record in group), strict=True)
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    stem = "".join(letters[0] for letters in alike)
    if len(set(names)) > 1:
        # `slime-s`, `slime-seed` and `slime_` are all `slime`; of `seed-` nothing is left.
        stem = re.sub(r"((^|[\s_.,:(-]+)(seed|s)?|seed)[\s_.,:(=-]*$", "", stem)
    arm = folders[0] if len(set(folders)) == 1 else ""
    return f"{stem or arm or series_label(group[0].loss)} ({len(group)} seeds)"


def written(value: Spread | None, form: str, scale: float = 1.0) -> Cell:
    """A figure; with several seeds the median, with the lowest and the highest."""
    if value is None:
        return Cell(ABSENT)
    median, low, high = (_rounded(scale * each, form) for each in value[:3])
    return Cell(median, spread="" if value.n == 1 else f"{low} to {high}")


def changes(group: Group, key: str) -> list[float]:
    """How far a held-out figure is from each seed's own start, a number a seed that has both."""
    return [r.after[key] - r.before[key] for r in group.records if key in r.before and key in r.after]


def change(group: Group, key: str, form: str, scale: float = 1.0) -> Cell:
    """A held-out figure after training and its change since the start: 42.8, +4.2.

    With several seeds both are means, and the change of each seed is from its own start: 42.8, +4.2 ± 1.1, half of
    the 95 % interval.
    """
    moved = mean_of([scale * each for each in changes(group, key)])
    if not moved.n:
        return written(group.after(key), form, scale)
    after = statistics.fmean(
        scale * r.after[key] for r in group.records if key in r.before and key in r.after
    )
    half = f" ± {_rounded(moved.half, form)}" if moved.n > 1 else ""
    return Cell(_rounded(after, form), f"{_rounded(moved.value, f'+{form}')}{half}")


def _rounded(value: float, form: str) -> str:
    """As `form` says, and never -0.00."""
    return format(value, f"+z{form[1:]}" if form.startswith("+") else f"z{form}")


def percent(share: float, digits: int) -> str:
    """A share in percent, with a space that does not break."""
    return f"{100 * share:.{digits}f}\u00a0%"


def count(value: Any) -> str:
    """A whole number with thousands marked."""
    whole = number(value)
    return ABSENT if whole is None else f"{whole:,.0f}"


def duration(value: Any) -> str:
    """Seconds in the unit that a reader thinks in."""
    seconds = number(value)
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def size(value: Any) -> str:
    """Bytes in MiB or GiB."""
    amount = number(value)
    if amount is None:
        return ABSENT
    mebibytes = amount / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"
