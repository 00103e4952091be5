"""Where training has moved a fixed sample of pairs: figures over plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimepo.model.score import PairScores

FloatArray = NDArray[np.float64]

# Edges of the histogram of rejected tokens, in nats; what is lower counts in the first bin.
BINS: tuple[float, ...] = tuple(-30 + 0.5 * i for i in range(61))
_LONGEST_BLOCK, _LOOP_COPIES, _NGRAM = 48, 5, 4


@dataclass(frozen=True)
class SideScores:
    """One side of a sample: per pair an array over its response tokens (empty where the pair lacks the side).

    Log-probs and entropies of the policy in nats; `top1` says whether a token is the likeliest one.
    """

    logps: list[FloatArray]
    entropy: list[FloatArray]
    top1: list[FloatArray]

    def part(self, which: slice) -> SideScores:
        """Those of some of the pairs."""
        return SideScores(self.logps[which], self.entropy[which], self.top1[which])

    def means(self) -> FloatArray:
        """Log-prob per token of each pair, `[pairs]`, NaN where there is none; to 6 digits, as files keep them."""
        return np.array([np.round(tokens.mean(), 6) if len(tokens) else np.nan for tokens in self.logps])


def figures(
    chosen: SideScores,
    rejected: SideScores,
    start: Mapping[str, Sequence[float | None]] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What is written about a sample at one look; means over pairs, None for what no pair has.

    start: `per_pair` as it was at step 0; None if this is step 0. options: SLIME's, for its floor and its two margins.
    """
    w, l = chosen.means(), rejected.means()  # noqa: E741
    before_w, before_l = w, l
    if start is not None:
        # None, where a pair lacks the side, becomes NaN.
        before_w, before_l = (np.array(start[side], np.float64) for side in ("chosen", "rejected"))
    margin, change_l, tokens = w - l, l - before_l, _flat(rejected.logps)
    return {
        "pairs": len(w),
        "chosen": _mean(w),
        "rejected": _mean(l),
        "margin": _mean(margin),
        "accuracy": _share(margin > 0, margin),
        "past_soft_margin": _share(margin >= options["soft_margin"], margin),
        "past_hard_margin": _share(margin >= options["hard_margin"], margin),
        **fall(w - before_w),
        "rejected_change": _mean(change_l),
        "rejected_fell": _share(change_l < 0, change_l),
        **_floor(rejected.logps, options["threshold"]),
        "rejected_p1": _percentile(tokens, 1),
        "entropy": _mean(_flat(chosen.entropy)),
        "entropy_rejected": _mean(_flat(rejected.entropy)),
        "top1": _mean(_flat(chosen.top1)),
        "rejected_histogram": np.histogram(np.clip(tokens, BINS[0], 0), BINS)[0].tolist(),
        "per_pair": {"chosen": _with_none(w), "rejected": _with_none(l)},
    }


def of_scores(scores: PairScores, start: PairScores, threshold: float) -> dict[str, Any]:
    """What can be told of pairs of which there are log-probs alone: the fall, and the floor under rejected tokens."""
    return {**fall(scores.chosen - start.chosen), **_floor(scores.rejected_tokens, threshold)}


def fall(change: FloatArray) -> dict[str, Any]:
    """How far chosen answers have moved, `[pairs]` with NaN where there is none, and how sure that is."""
    there = change[~np.isnan(change)]
    error = there.std(ddof=1) / np.sqrt(len(there)) if len(there) > 1 else None
    return {
        "chosen_pairs": len(there),
        "chosen_change": _mean(change),
        "chosen_change_error": None if error is None else round(float(error), 6),
        "chosen_fell": _share(change < 0, change),
    }


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a `probe` or a `generation` under the names that trackers show."""
    if line["kind"] == "generation":
        told = {
            "generation": {key: line[key] for key in ("length", "finished", "repeated", "looping", "valid")}
        }
    else:
        told = {name: line.get(name) or {} for name in ("train", "heldout", "gradient_share", "bound")}
    figures = {
        f"monitor/{part}/{key}": value
        for part, of in told.items()
        for key, value in of.items()
        if isinstance(value, int | float)
    }
    if line.get("entanglement"):
        figures["monitor/entanglement"] = float(np.mean(line["entanglement"]["ratio"]))
    return figures


def repeated(tokens: Sequence[int]) -> float:
    """The share of an answer's 4-grams of tokens that stood in it before; 0 for fewer than 4 tokens."""
    grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def looping(tokens: Sequence[int]) -> bool:
    """Whether a block of 1 to 48 tokens stands 5 times or more in a row: a clause, also where tokens are letters.

    Five, because right answers repeat too: a row of dashes under a table's head, digits of a number, "ha ha ha".
    """
    for size in range(1, _LONGEST_BLOCK + 1):
        matching = 0
        for earlier, later in zip(tokens, tokens[size:], strict=False):
            matching = matching + 1 if earlier == later else 0
            if matching >= size * (_LOOP_COPIES - 1):
                return True
    return False


def _floor(rejected: Sequence[FloatArray], threshold: float) -> dict[str, float | None]:
    """The share of tokens under the floor, a mean over answers; and the 5th percentile of all tokens."""
    below = np.array([(tokens < -threshold).mean() for tokens in rejected if len(tokens)])
    return {"rejected_below_floor": _mean(below), "rejected_p5": _percentile(_flat(rejected), 5)}


def _flat(arrays: Sequence[FloatArray]) -> FloatArray:
    return np.concatenate([*arrays, np.zeros(0)])


def _mean(values: FloatArray) -> float | None:
    """The mean of what is there, None if nothing is."""
    there = values[~np.isnan(values)]
    return round(float(there.mean()), 6) if len(there) else None


def _share(flags: NDArray[np.bool_], of: FloatArray) -> float | None:
    """The share of flags that are set among the entries of `of` that are there."""
    return _mean(np.where(np.isnan(of), np.nan, flags))


def _percentile(values: FloatArray, percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 6) if len(values) else None


def _with_none(values: FloatArray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
