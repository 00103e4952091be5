"""The monitor's warnings as the page tells them."""

from typing import Any

import pytest

from slimepo.report.monitor import warnings_of


def line(step: int, state: str, rows: str = "heldout") -> dict[str, Any]:
    return {
        "kind": "warning",
        "step": step,
        "warning": "unlearning",
        "state": state,
        "set": rows,
        "message": f"at step {step}",
    }


@pytest.mark.parametrize(
    ("lines", "gone"),
    [
        ([line(4, "on")], [None]),
        ([line(4, "on"), line(8, "off"), line(12, "on")], [8, None]),
        ([line(8, "on"), line(8, "off")], [8]),
        ([line(4, "on"), line(8, "off"), line(8, "on")], [8, None]),
        ([line(4, "on"), line(4, "on", "train"), line(8, "off", "train")], [None, 8]),
    ],
    ids=[
        "it held",
        "it came back",
        "taken back at the last step",
        "said at the last step",
        "of the other set",
    ],
)
def test_a_warning_is_gone_by_the_next_line_that_says_so(
    lines: list[dict[str, Any]], gone: list[float | None]
) -> None:
    assert [warned.gone for warned in warnings_of(lines, {})] == gone


def test_without_the_file_the_stage_s_record_tells() -> None:
    floor = {"step": 8, "warning": "floor", "set": "heldout", "message": "low", "gone": None}
    unlearning = {"step": 8, "warning": "unlearning", "set": "heldout", "message": "less likely", "gone": 12}
    stopped = {"step": 8, "warning": "unlearning", "message": "less likely"}
    found = warnings_of([], {"monitor": {"warnings": [floor, unlearning], "stopped": stopped}})
    assert [(w.text, w.stopped, w.gone) for w in found] == [
        ("low", False, None),
        ("less likely", True, 12),
    ]
