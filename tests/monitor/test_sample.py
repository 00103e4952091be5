"""Which pairs the monitor scores, and the second look at more of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slimepo.data.tokenize import TokenizedPair
from slimepo.monitor.displacement import SideScores
from slimepo.monitor.sample import (
    MonitorSample,
    draw_sample,
    reserve_means,
    sample_figures,
    second_look,
)
from slimepo.monitor.settings import MonitorSettings, monitor_settings
from tests.tiny import random_rows

TRAIN, HELDOUT = random_rows(200), random_rows(120, seed=5)


def settings(**values: Any) -> MonitorSettings:
    made = monitor_settings(values)
    assert made is not None
    return made


def scored(shift: float = 0.0) -> Any:
    """A policy that finds every token of a row as likely as the row's first chosen token says, plus `shift`."""

    def score(rows: Sequence[TokenizedPair]) -> tuple[SideScores, SideScores]:
        def side(name: str) -> SideScores:
            tokens = [
                np.full(len(getattr(row, name)), -float(row.chosen[0]) + shift, dtype=np.float64)
                for row in rows
            ]
            return SideScores(tokens, tokens, tokens)

        return side("chosen"), side("rejected")

    return score


class TestDrawing:
    def test_both_sets_have_as_many_and_the_held_out_one_a_reserve(self) -> None:
        # A run over 6,000 pairs: 120 scored pairs, 84 of them for 4 probes of both sets, 36 for the reserve's start.
        found = draw_sample(TRAIN, HELDOUT, settings(), 6_000, seed=0)
        assert {name: len(rows) for name, rows in found.rows.items()} == {"train": 10, "heldout": 10}
        assert (found.reserve_set, len(found.reserve)) == ("heldout", 54)
        assert found.cost == pytest.approx(20 + 0.6 * 54)
        names = {row.row_id for row in HELDOUT}
        drawn = [row.row_id for row in (*found.rows["heldout"], *found.reserve)]
        assert set(drawn) <= names
        assert len(set(drawn)) == 64, "no pair is in both"

    def test_without_held_out_rows_the_reserve_is_of_the_training_rows(self) -> None:
        found = draw_sample(TRAIN, [], settings(), 3_000, seed=0)
        assert found.rows["heldout"] == []
        assert found.reserve_set == "train"
        assert found.reserve

    def test_a_large_sample_needs_none_and_a_very_short_run_cannot_pay_for_one(self) -> None:
        assert draw_sample(TRAIN, HELDOUT, settings(), 1_000_000, seed=0).reserve == []
        assert draw_sample(TRAIN, HELDOUT, settings(), 200, seed=0).reserve == []
        assert draw_sample(TRAIN, HELDOUT, settings(every=10), 6_000, seed=0).reserve == []

    def test_it_depends_on_the_rows_and_the_seed_and_not_on_their_order(self) -> None:
        one = draw_sample(TRAIN, HELDOUT, settings(), 6_000, seed=0)
        assert draw_sample(TRAIN[::-1], HELDOUT[::-1], settings(), 6_000, seed=0).ids == one.ids
        assert draw_sample(TRAIN, HELDOUT, settings(), 6_000, seed=1).ids != one.ids

    def test_a_reserve_smaller_than_the_sample_is_none(self) -> None:
        assert draw_sample(TRAIN, HELDOUT[:18], settings(), 6_000, seed=0).reserve == []

    def test_judged_rows_are_counted_by_their_chosen_answers(self) -> None:
        """Every other row has a chosen answer here; however rare they are, no more than four times as many rows."""
        judged = [
            replace(row, chosen=row.chosen[:0]) if at % 2 else replace(row, rejected=row.rejected[:0])
            for at, row in enumerate(HELDOUT)
        ]
        found = draw_sample(TRAIN, judged, settings(), 6_000, seed=0)
        assert sum(len(row.chosen) > 0 for row in found.rows["heldout"]) == 10
        assert len(found.rows["heldout"]) > 10
        assert all(len(row.chosen) for row in found.reserve)
        rejected = [replace(row, chosen=row.chosen[:0]) for row in HELDOUT]
        assert len(draw_sample(TRAIN, rejected, settings(), 6_000, seed=0).rows["heldout"]) == 40


class TestSecondLook:
    @pytest.fixture
    def drawn(self) -> MonitorSample:
        return draw_sample(TRAIN, HELDOUT, settings(), 6_000, seed=0)

    def test_it_is_of_the_sample_and_the_reserve_together(self, drawn: MonitorSample) -> None:
        start = sample_figures(drawn, scored(), None, 1.25, (0.0, 1.0, 1.5), None)
        start["reserve"] = reserve_means(drawn, scored()).tolist()
        now = sample_figures(drawn, scored(-0.25), start, 1.25, (0.0, 1.0, 1.5), None)
        assert now["heldout"]["chosen_change"] == pytest.approx(-0.25)
        found = second_look(drawn, scored(-1.0), now, start)
        assert (found["set"], found["chosen_pairs"], found["chosen_fell"]) == ("heldout", 64, 1.0)
        # 10 pairs of the sample, scored before, fell by 0.25, the 54 of the reserve by 1.
        assert found["chosen_change"] == pytest.approx(-(10 * 0.25 + 54) / 64, abs=1e-6)
        changes = np.array([-0.25] * 10 + [-1.0] * 54)
        assert found["chosen_change_error"] == pytest.approx(changes.std(ddof=1) / 8, abs=1e-6)

    def test_the_reserve_is_asked_for_chosen_answers_alone(self, drawn: MonitorSample) -> None:
        asked: list[TokenizedPair] = []

        def score(rows: Sequence[TokenizedPair]) -> Any:
            asked.extend(rows)
            return scored()(rows)

        reserve_means(drawn, score)
        assert [row.row_id for row in asked] == [row.row_id for row in drawn.reserve]
        assert all(len(row.rejected) == 0 < len(row.chosen) for row in asked)
