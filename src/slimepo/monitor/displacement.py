"""Where training has moved a fixed sample of pairs: figures over plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from slimepo.model.score import PairScores

FloatArray = NDArray[np.float64]

# Edges of the histogram of rejected tokens, in nats; what is lower counts in the first bin.
BINS: tuple[float, ...] = tuple(-30 + 0.5 * i for i in range(61))
_LONGEST_BLOCK, _LOOP_COPIES, _NGRAM = 16, 5, 4


_FLAT = (
    "chosen_pairs", "chosen", "rejected", "margin", "accuracy", "chosen_change", "rejected_change", "chosen_fell",
    "rejected_fell", "rejected_below_floor", "rejected_p1", "rejected_p5", "entropy", "entropy_rejected", "hit",
)  # fmt: skip
_FLAT_ANSWERS = ("length", "finished", "repeated", "looping", "valid")


@dataclass(frozen=True)
class SideScores:
    """One side of a sample: per pair an array over its response tokens (empty where the pair lacks the side).

    Log-probs and entropies of the policy in nats; `hit` says whether a token is the likeliest one.
    """

    logps: list[FloatArray]
    entropy: list[FloatArray]
    hit: list[FloatArray]

    def part(self, which: slice) -> SideScores:
        """Those of some of the pairs."""
        return SideScores(self.logps[which], self.entropy[which], self.hit[which])

    def means(self) -> FloatArray:
        """Log-prob per token of each pair, `[pairs]`, NaN where there is none; to 6 digits, as files keep them."""
        return np.array([np.round(tokens.mean(), 6) if len(tokens) else np.nan for tokens in self.logps])


class PerPair(TypedDict):
    """Log-probs per token of each pair of the sample, None where the side is absent."""

    chosen: list[float | None]
    rejected: list[float | None]


def figures(
    chosen: SideScores,
    rejected: SideScores,
    start: PerPair | None,
    threshold: float,
    margins: Sequence[float],
) -> dict[str, Any]:
    """What is written about a sample at one probe; means over pairs, None for what no pair has.

    start: the pairs as they were at step 0; None if this is step 0. threshold: rejected tokens below -threshold nats
    are under the floor. margins: the share of pairs at or past each is counted (past 0: above it).
    """
    w, l = chosen.means(), rejected.means()  # noqa: E741
    before = per_pair(w, l) if start is None else start
    change_w, change_l = w - as_array(before["chosen"]), l - as_array(before["rejected"])
    margin = w - l
    tokens = np.concatenate([*rejected.logps, np.zeros(0)])
    below = np.array([(t < -threshold).mean() for t in rejected.logps if len(t)])
    return {
        "pairs": len(w),
        "chosen_pairs": int((~np.isnan(w)).sum()),
        "chosen": mean(w),
        "rejected": mean(l),
        "margin": mean(margin),
        "accuracy": share(margin > 0, margin),
        **fall(change_w),
        "rejected_change": mean(change_l),
        "rejected_fell": share(change_l < 0, change_l),
        "past_margin": [share(margin >= m if m else margin > 0, margin) for m in margins],
        "rejected_below_floor": mean(below),
        "rejected_p1": percentile(tokens, 1),
        "rejected_p5": percentile(tokens, 5),
        "rejected_histogram": np.histogram(np.clip(tokens, BINS[0], 0), BINS)[0].tolist(),
        "entropy": mean(np.concatenate([*chosen.entropy, np.zeros(0)])),
        "entropy_rejected": mean(np.concatenate([*rejected.entropy, np.zeros(0)])),
        "hit": mean(np.concatenate([*chosen.hit, np.zeros(0)])),
        "per_pair": per_pair(w, l),
    }


def fall(change: FloatArray) -> dict[str, float | None]:
    """How far chosen answers have moved, `[pairs]` with NaN where there is none, and how sure that is."""
    return {
        "chosen_change": mean(change),
        "chosen_change_error": standard_error(change),
        "chosen_fell": share(change < 0, change),
    }


def of_scores(scores: PairScores, start: PairScores, threshold: float) -> dict[str, Any]:
    """What can be told of pairs of which there are log-probs alone: the fall, and the floor under rejected tokens."""
    change = scores.chosen - start.chosen
    tokens = [t for t in scores.rejected_tokens if len(t)]
    return {
        "chosen_pairs": int((~np.isnan(change)).sum()),
        **fall(change),
        "rejected_below_floor": mean(np.array([(t < -threshold).mean() for t in tokens])),
        "rejected_p5": percentile(np.concatenate([*tokens, np.zeros(0)]), 5),
    }


def flat_figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a probe under the names that trackers show."""
    flat = {
        f"monitor/{name}/{key}": line[name][key]
        for name in ("train", "heldout")
        if line[name] is not None
        for key in _FLAT
        if line[name][key] is not None
    }
    for name in ("train", "heldout"):
        if line[name] is not None and line[name]["past_margin"][0] is not None:
            _, soft, hard = line[name]["past_margin"]
            flat |= {f"monitor/{name}/past_soft_margin": soft, f"monitor/{name}/past_hard_margin": hard}
    flat |= {f"monitor/gradient_share/{k}": v for k, v in (line["gradient_share"] or {}).items()}
    ratios = (line["entanglement"] or {}).get("ratio")
    return flat | ({"monitor/entanglement": sum(ratios) / len(ratios)} if ratios else {})


def flat_answers(line: Mapping[str, Any]) -> dict[str, float]:
    """The same of a generation probe."""
    return {f"monitor/generation/{key}": line[key] for key in _FLAT_ANSWERS if line[key] is not None}


def per_pair(chosen: FloatArray, rejected: FloatArray) -> PerPair:
    """Arrays with NaN as lists with None."""
    return PerPair(chosen=_with_none(chosen), rejected=_with_none(rejected))


def as_array(values: Sequence[float | None]) -> FloatArray:
    """A list with None as an array with NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def mean(values: FloatArray) -> float | None:
    """The mean of what is there, None if nothing is."""
    there = values[~np.isnan(values)]
    return round(float(there.mean()), 6) if len(there) else None


def share(flags: NDArray[np.bool_], of: FloatArray) -> float | None:
    """The share of flags that are set among the entries of `of` that are there."""
    there = ~np.isnan(of)
    return round(float(flags[there].mean()), 6) if there.any() else None


def standard_error(values: FloatArray) -> float | None:
    """The standard error of the mean over what is there; None with fewer than two."""
    there = values[~np.isnan(values)]
    return round(float(there.std(ddof=1) / np.sqrt(len(there))), 6) if len(there) > 1 else None


def percentile(values: FloatArray, percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 6) if len(values) else None


def shares_of_norms(norms: dict[str, float]) -> dict[str, float] | None:
    """Each norm over their sum; None where all are 0."""
    total = sum(norms.values())
    return {name: round(norm / total, 6) for name, norm in norms.items()} if total > 0 else None


def repeated(tokens: Sequence[int]) -> float:
    """The share of an answer's 4-grams of tokens that stood in it before; 0 for fewer than 4 tokens."""
    grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def looping(tokens: Sequence[int]) -> bool:
    """Whether a block of 1 to 16 tokens stands 5 times or more in a row.

    Five, because right answers repeat too: a row of dashes under a table's head, digits of a number, "ha ha ha".
    """
    for size in range(1, _LONGEST_BLOCK + 1):
        matching = 0
        for earlier, later in zip(tokens, tokens[size:], strict=False):
            matching = matching + 1 if earlier == later else 0
            if matching >= size * (_LOOP_COPIES - 1):
                return True
    return False


def _with_none(values: FloatArray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
