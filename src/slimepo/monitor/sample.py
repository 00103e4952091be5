"""The fixed sample of pairs that the displacement monitor scores, and a reserve for a second look."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slimepo.data.tokenize import TokenizedPair
from slimepo.losses import slime
from slimepo.monitor.displacement import (
    FloatArray,
    SideScores,
    as_array,
    fall,
    figures,
    shares_of_norms,
)
from slimepo.monitor.probe import gradient_norms, sample
from slimepo.monitor.settings import CHOSEN_SHARE, MonitorSettings, reserve_size, sample_size

# What scores rows with the policy as it is now.
Score = Callable[[Sequence[TokenizedPair]], tuple[SideScores, SideScores]]


@dataclass(frozen=True)
class MonitorSample:
    """Pairs of both sets, scored at every probe, and a reserve of one of them, scored when that one looks bad.

    rows: of `train` and `heldout`; either may be empty. reserve: further pairs of `reserve_set`.
    """

    rows: dict[str, list[TokenizedPair]]
    reserve: list[TokenizedPair]
    reserve_set: str

    @property
    def ids(self) -> dict[str, Any]:
        """The rows by name, as the first line of the monitor's file has them."""
        return {
            "rows": {name: [row.row_id for row in rows] for name, rows in self.rows.items()},
            "reserve": [row.row_id for row in self.reserve],
        }

    @property
    def cost(self) -> float:
        """What the first probe costs, in scored pairs."""
        both = [len(row.chosen) > 0 and len(row.rejected) > 0 for rows in self.rows.values() for row in rows]
        return sum(1 if pair else CHOSEN_SHARE for pair in both) + CHOSEN_SHARE * len(self.reserve)


def draw_sample(
    train: Sequence[TokenizedPair],
    heldout: Sequence[TokenizedPair],
    settings: MonitorSettings,
    trained_pairs: float,
    seed: int,
) -> MonitorSample:
    """The sample of a run over `trained_pairs` pairs in all: a function of the rows, the seed and that size alone."""
    size = sample_size(settings, trained_pairs, sets=2 if heldout else 1)
    rows = {"train": sample(train, len(train), seed), "heldout": sample(heldout, len(heldout), seed)}
    first = {name: with_chosen(ordered, size) for name, ordered in rows.items()}
    # Held-out answers fall farther than those trained on, which are pushed down and pulled up again.
    reserve_set = "heldout" if heldout else "train"
    further = [row for row in rows[reserve_set][len(first[reserve_set]) :] if len(row.chosen)]
    reserve = further[: reserve_size(settings, trained_pairs, size)]
    return MonitorSample(first, reserve if len(reserve) >= size else [], reserve_set)


def with_chosen(rows: Sequence[TokenizedPair], count: int) -> list[TokenizedPair]:
    """The first rows that hold `count` chosen answers: judged rows have one answer each, and not all a chosen one.

    Four times as many rows at most.
    """
    held = itertools.accumulate(len(row.chosen) > 0 for row in rows)
    whole = next((at for at, chosen in enumerate(held, 1) if chosen == count), len(rows))
    return list(rows[: min(whole, 4 * count)])


def sample_figures(
    sampled: MonitorSample,
    score: Score,
    start: Mapping[str, Any] | None,
    threshold: float,
    margins: Sequence[float],
    slime_options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The figures of both sets, and how hard SLIME's terms pull on the one trained on.

    start: the first probe; None if this is it. slime_options: None for another objective.
    """
    line: dict[str, Any] = {"train": None, "heldout": None, "gradient_share": None, "gradient_norm": None}
    # Both sets in one go: what a small model's forward pass costs is mostly overhead.
    chosen, rejected = score([row for rows in sampled.rows.values() for row in rows])
    first = 0
    for name, rows in sampled.rows.items():
        if not rows:
            continue
        part, first = slice(first, first + len(rows)), first + len(rows)
        scores = (chosen.part(part), rejected.part(part))
        before = start[name]["per_pair"] if start else None
        line[name] = figures(*scores, before, threshold, margins)
        if name == "train" and slime_options is not None:
            norms = gradient_norms(slime, slime_options, *scores)
            line["gradient_norm"] = {term: round(norm, 9) for term, norm in norms.items()}
            line["gradient_share"] = shares_of_norms(norms)
    return line


def reserve_means(sampled: MonitorSample, score: Score) -> FloatArray:
    """Log-probs per token of the reserve's chosen answers, `[pairs]`."""
    chosen, _ = score([replace(row, rejected=row.rejected[:0]) for row in sampled.reserve])
    return chosen.means()


def second_look(
    sampled: MonitorSample, score: Score, line: Mapping[str, Any], start: Mapping[str, Any]
) -> dict[str, Any]:
    """How far the chosen answers of the sample, as scored in `line`, and of the reserve have moved together."""
    few = as_array(line[sampled.reserve_set]["per_pair"]["chosen"])
    before = as_array([*start[sampled.reserve_set]["per_pair"]["chosen"], *start["reserve"]])
    change = np.concatenate([few, reserve_means(sampled, score)]) - before
    return {"set": sampled.reserve_set, "chosen_pairs": int((~np.isnan(change)).sum()), **fall(change)}
