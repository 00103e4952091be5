"""What the monitor may cost: the size of its sample and the spacing of its probes."""

import pytest

from slimepo.errors import InputError
from slimepo.monitor.settings import (
    MonitorSettings,
    Pace,
    StepClock,
    answer_length,
    monitor_settings,
    reserve_size,
    sample_size,
)


def settings(**values: object) -> MonitorSettings:
    made = monitor_settings(values)
    assert made is not None
    return made


def probes(pace: Pace, cost: float, per_step: float) -> list[int]:
    """The steps at which probes are made when each costs `cost` seconds."""
    pace.note(pace.first_step, cost)
    made = [pace.first_step]
    for step in range(pace.first_step + 1, pace.last_step + 1):
        if pace.due(step, per_step):
            pace.note(step, cost)
            made.append(step)
    return made


class TestPace:
    def test_probes_take_up_the_budget_evenly_and_never_exceed_it(self) -> None:
        # 1,000 steps of 1 s at 1 %: 10 s pay for five probes of 2 s, the first and the last among them.
        pace = Pace(0.01, 2, 0, 1000)
        steps = probes(pace, 2.0, 1.0)
        assert steps == [0, 250, 500, 750, 1000]
        assert pace.spent <= 0.01 * 1000

    def test_a_run_too_short_for_its_budget_has_the_fewest_probes(self) -> None:
        assert probes(Pace(0.01, 2, 0, 30), 5.0, 0.1) == [0, 10, 20, 30]
        assert probes(Pace(0.01, 0, 0, 30), 5.0, 0.1) == [0, 30]

    def test_cheap_probes_are_no_more_than_fifty(self) -> None:
        assert len(probes(Pace(0.01, 2, 0, 100_000), 1e-6, 1.0)) <= 52

    def test_a_probe_that_takes_longer_than_foretold_delays_the_next(self) -> None:
        pace = Pace(0.01, 0, 0, 1000)
        pace.note(0, 1.0)
        assert pace.gap(1.0) == 112
        pace.note(112, 4.0)
        # 10 s - 5 s - 4 s for the last one leave 1 s, not enough for another of 4 s.
        assert pace.gap(1.0) == 888

    def test_what_is_done_once_is_spent_but_not_foretold(self) -> None:
        """The first probe scores the reserve as well."""
        pace = Pace(0.01, 0, 0, 1000)
        pace.note(0, 4.0, again=1.0)
        # 10 s - 4 s - 1 s for the last one leave five.
        assert (pace.spent, pace.gap(1.0)) == (4.0, 167)

    def test_after_a_resume_the_rest_of_the_run_is_a_run_of_its_own(self) -> None:
        steps = probes(Pace(0.01, 2, 600, 1000, last=600), 1.0, 1.0)
        assert (steps[0], steps[-1]) == (600, 1000)
        assert len(steps) * 1.0 <= 0.01 * 400

    def test_a_given_distance_is_kept_whatever_it_costs(self) -> None:
        assert probes(Pace(0.01, 2, 0, 10, every=4), 9.0, 0.1) == [0, 4, 8, 10]


class TestSample:
    def test_it_is_as_large_as_the_run_pays_for(self) -> None:
        # 2 % * 0.5 * 10,000 pairs * 2 forward passes = 200 scored pairs, 140 of them for 4 probes of each set.
        assert sample_size(settings(), 10_000, sets=2) == 17
        assert sample_size(settings(), 5_000, sets=1) == 17
        assert sample_size(settings(), 1_000_000, sets=2) == 64
        assert sample_size(settings(), 100, sets=2) == 8

    def test_a_small_sample_that_is_asked_for_is_not_made_larger(self) -> None:
        assert sample_size(settings(pairs=4), 100, sets=2) == 4

    def test_with_a_given_distance_it_is_as_asked(self) -> None:
        assert sample_size(settings(pairs=40, every=5), 100, sets=2) == 40


class TestReserve:
    def test_it_fills_the_sample_up_to_what_was_asked_for(self) -> None:
        assert reserve_size(settings(), 10_000, 17) == 64 - 17
        assert reserve_size(settings(pairs=30), 10_000, 17) == 0, "13 pairs beside 17 would settle nothing"

    def test_it_is_what_three_tenths_of_scoring_pay_for(self) -> None:
        # 20 scored pairs, 6 of which pay for 10 chosen answers at 0.6 of a pair each.
        assert reserve_size(settings(), 1_000, 8) == 10
        assert reserve_size(settings(), 500, 8) == 0

    def test_with_a_given_distance_there_is_none(self) -> None:
        assert reserve_size(settings(every=5), 10_000, 17) == 0


class TestAnswerLength:
    def test_a_long_run_pays_for_whole_answers(self) -> None:
        assert answer_length(settings(), 256, 100_000, 0.1, 0.03) == 256

    def test_a_short_run_has_the_power_of_two_that_it_pays_for(self) -> None:
        # 2,000 pairs * 2 * 0.1 s = 400 s, of which 2 % * 0.2 = 1.6 s: two answers of 40 tokens at 20 ms.
        assert answer_length(settings(), 256, 2_000, 0.1, 0.02) == 32
        assert answer_length(settings(), 24, 2_000, 0.1, 0.02) == 24
        assert answer_length(settings(), 256, 10, 0.1, 0.02) == 16

    def test_with_a_given_distance_answers_are_as_asked(self) -> None:
        assert answer_length(settings(generate_every=3), 256, 10, 0.1, 0.02) == 256


class TestSettings:
    def test_true_is_the_defaults_and_false_is_none(self) -> None:
        assert monitor_settings(True) == settings()
        assert monitor_settings(False) is None

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"pair": 3}, "monitor: unknown key 'pair'; did you mean 'pairs'"),
            ({"stop_on": ["unlerning"]}, "monitor: stop_on"),
            ({"budget": 0}, "monitor: budget"),
        ],
    )
    def test_what_is_wrong_is_named(self, values: dict[str, object], words: str) -> None:
        with pytest.raises(InputError, match=words):
            monitor_settings(values)


class TestClock:
    def test_neither_the_first_step_nor_the_monitor_itself_counts(self) -> None:
        clock = StepClock(0, 100.0)
        clock.own(2.0)
        assert clock.per_step(1, 112.0) is None  # 10 s for the step that compiles
        assert clock.per_step(2, 113.0) is None
        assert clock.per_step(3, 114.0) == pytest.approx(1.0)
        clock.own(4.0)
        assert clock.per_step(5, 120.0) == pytest.approx(1.0)
        assert clock.training(120.0) == pytest.approx(14.0)
