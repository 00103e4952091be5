"""Curves over the steps: bands over seeds, changes since each run's own start, names at their ends."""

import itertools
import re

import pytest

from slimepo.report.curves import WATCHED, band, curve_panels, logged, watched
from slimepo.report.groups import Group
from slimepo.report.records import Record
from tests.report.test_figures import run


def group_of(*curves: dict[float, float], states: tuple[str, ...] = ()) -> Group:
    """A group of a seed a curve, given as step: loss."""
    lines = [[{"step": step, "loss": value} for step, value in curve.items()] for curve in curves]
    found = [states[at] if states else "finished" for at in range(len(curves))]
    records = [
        run("a", seed=at, curve=each, state=state)
        for at, (each, state) in enumerate(zip(lines, found, strict=True))
    ]
    return Group("g", tuple(records))


def test_a_band_is_the_median_the_lowest_and_the_highest_of_the_seeds() -> None:
    points = band(group_of({1: 3.0, 2: 1.0}, {1: 5.0, 2: 1.0}, {1: 9.0, 2: 4.0}), logged, "loss")
    assert points == [(1, (5.0, 3.0, 9.0, 3)), (2, (1.0, 1.0, 4.0, 3))]


def test_seeds_that_log_at_different_steps_are_read_between_their_points() -> None:
    points = band(group_of({0: 0.0, 10: 10.0}, {0: 4.0, 4: 8.0, 8: 0.0}), logged, "loss")
    # At step 4 the first seed is at 4; step 10 is past the end of the second.
    assert points == [(0, (2.0, 0.0, 4.0, 2)), (4, (6.0, 4.0, 8.0, 2)), (8, (4.0, 0.0, 8.0, 2))]


def test_a_seed_that_stopped_does_not_cut_the_others_short() -> None:
    points = band(group_of({1: 2.0, 9: 2.0}, {1: 4.0, 2: 4.0}, states=("finished", "failed")), logged, "loss")
    assert points == [(1, (3.0, 2.0, 4.0, 2)), (2, (3.0, 2.0, 4.0, 2)), (9, (2.0, 2.0, 2.0, 1))]


def test_long_curves_keep_their_last_point() -> None:
    curve = [{"step": float(step), "loss": float(-step)} for step in range(1, 1000)]
    group = Group("g", (run("a", curve=curve),))
    points = band(group, logged, "loss")
    assert len(points) < 310
    assert points[-1][1].median == -999


def test_a_long_curve_keeps_its_spikes() -> None:
    curve = {float(step): 1.0 for step in range(1, 10_001)}
    points = band(group_of(curve | {5003.0: 9.0}, curve | {7001.0: -9.0}), logged, "loss")
    assert len(points) < 310
    assert (5003, (5.0, 1.0, 9.0, 2)) in points
    assert (7001, (-4.0, -9.0, 1.0, 2)) in points


def test_a_change_is_each_seed_s_own_before_it_is_a_median() -> None:
    group = group_of({0: 1.0, 5: 2.0}, {0: 9.0, 5: 9.5}, {0: 5.0, 5: 8.0})
    assert band(group, logged, "loss", since_start=True) == [(0, (0.0, 0.0, 0.0, 3)), (5, (1.0, 0.5, 3.0, 3))]


def named(label: str, loss: str, *levels: float) -> Group:
    lines = [
        {"step": 10.0 * at, "heldout/chosen": level, "tokens_per_second": level}
        for at, level in enumerate(levels)
    ]
    return Group(label, (Record(label, "", loss, monitor=lines, curve=lines),))


class TestChanges:
    def test_runs_that_start_apart_are_drawn_as_changes_too(self) -> None:
        groups = [named("a", "slime", -1.0, -0.5), named("b", "dpo", -3.0, -3.25)]
        (panel,) = curve_panels(groups, watched, WATCHED)
        assert "a ends at -0.5; b ends at -3.25" in panel.svg
        assert "change since the start, over the steps: a ends at +0.5; b ends at -0.25" in panel.change

    def test_runs_of_one_start_are_drawn_once(self) -> None:
        groups = [named("a", "slime", -1.0, -0.5), named("b", "dpo", -1.0, -3.25)]
        assert [panel.change for panel in curve_panels(groups, watched, WATCHED)] == [""]

    def test_what_never_moved_is_a_title(self) -> None:
        groups = [named("a", "slime", -1.0, -1.0), named("b", "dpo", -1.0, -1.0)]
        (panel,) = curve_panels(groups, watched, WATCHED)
        assert (panel.title, panel.svg) == ("Chosen answers, nats per token -1", "")

    def test_what_a_run_costs_has_no_start(self) -> None:
        groups = [named("a", "slime", 800.0, 900.0), named("b", "dpo", 500.0, 400.0)]
        (panel,) = curve_panels(groups, logged, [("tokens_per_second", "Tokens per second")])
        assert panel.change == ""


class TestNames:
    @pytest.mark.parametrize(("runs", "there"), [(1, False), (2, True), (8, True), (9, False)])
    def test_a_few_lines_have_their_names_at_their_ends(self, runs: int, there: bool) -> None:
        groups = [named(f"run {at}", f"loss-{at}", -1.0, at / 10) for at in range(runs)]
        (panel,) = curve_panels(groups, watched, WATCHED)
        assert (">run 0<" in panel.svg) is there

    def test_none_lies_on_another(self) -> None:
        groups = [named(f"run {at}", f"loss-{at}", -1.0, -0.5) for at in range(8)]
        (panel,) = curve_panels(groups, watched, WATCHED)
        heights = sorted(float(y) for y in re.findall(r"[ (]([\d.]+)\)[^>]*>run \d<", panel.svg))
        assert len(heights) == 8
        assert min(b - a for a, b in itertools.pairwise(heights)) > 8

    def test_a_line_that_ends_early_has_none(self) -> None:
        groups = [
            named("a", "slime", -1.0, -0.5),
            named("b", "dpo", *[-1.0] * 5, -2.0),
            named("c", "sft", -1.0),
        ]
        (panel,) = curve_panels(groups, watched, WATCHED)
        assert [f">{name}<" in panel.svg for name in "abc"] == [False, True, False]

    def test_what_belongs_to_a_group_hides_with_it(self) -> None:
        groups = [named("a", "slime", -1.0, -0.5), named("b", "dpo", -3.0, -3.25)]
        (panel,) = curve_panels(groups, watched, WATCHED)
        # Of each the line, its end, the name and the thread between.
        assert [panel.svg.count(f'class="g{at}"') for at in (0, 1)] == [4, 4]
