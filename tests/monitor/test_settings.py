"""What may be set, and the steps at which a run is looked at."""

from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.monitor.settings import FEWEST_PAIRS, MonitorSettings, look_steps, monitor_settings, sample_size


@pytest.mark.parametrize(
    ("last", "every", "steps"),
    [
        (188, None, [0, 24, 47, 94, 141, 188]),
        (30, None, [0, 4, 8, 15, 23, 30]),
        (2, None, [0, 1, 2]),
        (1, None, [0, 1]),
        (10, 4, [0, 4, 8, 10]),
        (3, 7, [0, 3]),
    ],
)
def test_a_run_is_looked_at_before_it_now_and_then_and_at_its_end(
    last: int, every: int | None, steps: list[int]
) -> None:
    assert look_steps(last, every) == steps


def test_settings_are_a_switch_or_a_mapping() -> None:
    assert monitor_settings(True) == MonitorSettings()
    assert monitor_settings(False) is None
    found = monitor_settings({"every": 3, "stop_on": ["floor"]})
    assert found is not None
    assert (found.every, found.stop_on, found.pairs) == (3, ["floor"], None)


@pytest.mark.parametrize(("trained", "pairs"), [(0, 16), (483, 16), (1_000, 25), (2_560, 64), (10**6, 64)])
def test_a_short_run_is_watched_by_fewer_pairs(trained: int, pairs: int) -> None:
    looks = len(look_steps(188))
    assert sample_size(trained, looks) == pairs
    # Two sets at each look, a forward pass each, against forward and backward of what is trained on.
    if pairs > 16:
        assert 2 * looks * pairs <= 0.1 * 3 * trained


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evry": 3}, "monitor: unknown key 'evry' .did you mean 'every'"),
        ({"pairs": 0}, "monitor: pairs"),
        ({"stop_on": ["unlerning"]}, "monitor: stop_on"),
        ({"on_unlearning": "slow"}, "monitor: on_unlearning.*'stop', 'lower-rate' or 'raise-anchor'"),
        (
            {"on_unlearning": "lower-rate", "stop_on": ["unlearning"]},
            "ends the run before on_unlearning: lower-rate",
        ),
        (
            {"stop_on": ["floor", "repetition"], "prompts": 0},
            "stop_on: .repetition. is seen in answers, and prompts",
        ),
        (
            {"stop_on": ["unlearning"], "pairs": 7},
            "unlearning is not told from chance with pairs = 7: give 8 or",
        ),
        ({"on_unlearning": "stop", "pairs": 1}, "not told from chance with pairs = 1"),
        ({"on_unlearning": "lower-rate", "pairs": 7}, "not told from chance with pairs = 7"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        monitor_settings(values)


def test_what_may_never_warn_is_no_error_where_nothing_hangs_on_it() -> None:
    monitor_settings({"pairs": 7, "prompts": 0, "stop_on": ["floor", "entropy"]})
    monitor_settings({"pairs": FEWEST_PAIRS, "on_unlearning": "stop"})
