"""Means over seeds have the intervals of Student's t."""

import math

import pytest

from slimepo.means import mean_of


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.4, 0.2, 0.9, 0.5], [float(i % 7) for i in range(31)]])
def test_the_interval_is_student_s(values: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values)
    )
    mean = mean_of(values)
    assert mean.value == pytest.approx((low + high) / 2)
    assert mean.half == pytest.approx((high - low) / 2, rel=3e-4)


def test_many_seeds_too() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count in (32, 60, 200):
        values = [float(i % 5) for i in range(count)]
        expected = stats.t.ppf(0.975, count - 1) * stats.sem(values)
        assert mean_of(values).half == pytest.approx(expected, rel=2e-3)


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    assert (mean_of([2.0]).value, math.isnan(mean_of([2.0]).half)) == (2.0, True)
    assert math.isnan(mean_of([]).value)
