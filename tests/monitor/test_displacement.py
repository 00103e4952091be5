"""Figures of a sample of pairs, worked by hand."""

import numpy as np
import pytest

from slimepo.model.score import PairScores
from slimepo.monitor.displacement import (
    BINS,
    SideScores,
    figures,
    flat,
    looping,
    of_scores,
    repeated,
)


def side(*rows: list[float], entropy: float = 0.5, top1: float = 1.0) -> SideScores:
    arrays = [np.array(row, dtype=np.float64) for row in rows]
    return SideScores(
        arrays, [np.full(len(a), entropy) for a in arrays], [np.full(len(a), top1) for a in arrays]
    )


CHOSEN = side([-1.0, -2.0], [-0.5], [-3.0, -1.0])  # -1.5, -0.5, -2 per token
REJECTED = side([-1.0, -1.0], [-2.0, -2.0], [-4.0], entropy=0.7)  # -1, -2, -4


OPTIONS = {"threshold": 1.25, "soft_margin": 1.5, "hard_margin": 2.0}


def test_a_first_look_has_moved_nothing() -> None:
    found = figures(CHOSEN, REJECTED, None, OPTIONS)
    assert found["chosen_change"] == found["rejected_change"] == found["chosen_fell"] == 0
    assert (found["pairs"], found["chosen_pairs"]) == (3, 3)
    assert found["chosen"] == pytest.approx(-4 / 3, abs=1e-6)
    assert found["rejected"] == pytest.approx(-7 / 3, abs=1e-6)
    # Margins: -0.5, 1.5, 2.
    assert found["margin"] == pytest.approx(1.0)
    shares = [found[key] for key in ("accuracy", "past_soft_margin", "past_hard_margin")]
    assert shares == pytest.approx([2 / 3, 2 / 3, 1 / 3], abs=1e-6)
    # A mean over pairs of 0 of 2, 2 of 2 and 1 of 1 tokens.
    assert found["rejected_below_floor"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["rejected_p5"] == pytest.approx(np.percentile([-1, -1, -2, -2, -4], 5))
    assert sum(found["rejected_histogram"]) == 5
    assert (found["entropy"], found["entropy_rejected"], found["top1"]) == (0.5, 0.7, 1.0)


def test_changes_are_against_the_start_pair_by_pair() -> None:
    start = {"chosen": [-1.0, -1.0, -2.0], "rejected": [-1.0, -1.0, -1.0]}
    found = figures(CHOSEN, REJECTED, start, OPTIONS)
    # -0.5, +0.5, 0: one of three fell, and one that stayed did not.
    assert found["chosen_change"] == pytest.approx(0)
    assert found["chosen_fell"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["chosen_change_error"] == pytest.approx(0.5 / 3**0.5, abs=1e-6)
    assert found["rejected_change"] == pytest.approx(-4 / 3, abs=1e-6)
    assert found["rejected_fell"] == pytest.approx(2 / 3, abs=1e-6)


def test_whole_sets_of_which_there_are_log_probs_alone() -> None:
    rejected = [np.array([-1.0, -2.0]), np.array([-3.0])]
    start = PairScores(np.array([-1.0, -0.5]), np.array([-1.5, -3.0]), rejected)
    now = PairScores(np.array([-1.5, -1.5]), np.array([-1.5, -3.0]), [rejected[0] - 1, rejected[1]])
    found = of_scores(now, start, 1.25)
    # Falls of 0.5 and 1.
    assert found["chosen_change"] == -0.75
    assert found["chosen_change_error"] == pytest.approx(0.25, abs=1e-6)
    assert (found["chosen_fell"], found["chosen_pairs"]) == (1.0, 2)
    assert (of_scores(start, start, 1.25)["rejected_below_floor"], found["rejected_below_floor"]) == (
        0.75,
        1.0,
    )
    assert found["rejected_p5"] == pytest.approx(-3.0)
    demonstrations = PairScores(np.array([-1.0]), np.zeros(0), [])
    assert of_scores(demonstrations, demonstrations, 1.25)["rejected_p5"] is None


def test_a_side_that_is_not_there_has_no_figures() -> None:
    """A judged answer is one of the two; a demonstration has no rejected answer."""
    found = figures(side([-1.0], []), side([], [-3.0]), None, OPTIONS)
    assert (found["chosen"], found["rejected"], found["margin"]) == (-1.0, -3.0, None)
    assert (found["pairs"], found["chosen_pairs"]) == (2, 1)
    assert found["per_pair"] == {"chosen": [-1.0, None], "rejected": [None, -3.0]}
    line = {"kind": "probe", "train": figures(CHOSEN, side([], [], []), None, OPTIONS), "heldout": None}
    logged = flat(line | {"gradient_share": {"chosen": 0.5}, "entanglement": {"ratio": [1.0, 2.0]}})
    assert {name.rpartition("/")[2] for name in logged if name.startswith("monitor/train/")} == {
        "pairs", "chosen_pairs", "chosen", "chosen_change", "chosen_change_error", "chosen_fell", "entropy", "top1"
    }  # fmt: skip
    assert (logged["monitor/gradient_share/chosen"], logged["monitor/entanglement"]) == (0.5, 1.5)


def test_tokens_below_the_last_bin_are_counted_in_it() -> None:
    found = figures(side([-1.0]), side([-500.0, -29.9, 0.0]), None, OPTIONS)
    assert len(found["rejected_histogram"]) == len(BINS) - 1
    assert (found["rejected_histogram"][0], found["rejected_histogram"][-1]) == (2, 1)


def test_repetition_counts_ngrams_that_stood_there_before() -> None:
    assert repeated([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repeated([1, 2]) == 0
    # Four 4-grams of 1: three of them stood there before.
    assert repeated([1] * 7) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([1, 2, 3] * 5, True),
        ([9, 8, *[1, 2, 3] * 5, 7], True),
        ([1, 2, 3] * 4, False),
        ([4] * 5, True),
        ([4] * 4, False),
        (list(range(16)) * 5, True),
        (list(range(48)) * 5, True),
        (list(range(49)) * 5, False),
        (list(range(40)), False),
        ([], False),
    ],
)
def test_a_loop_is_a_block_five_times_in_a_row(tokens: list[int], loops: bool) -> None:
    assert looping(tokens) is loops
