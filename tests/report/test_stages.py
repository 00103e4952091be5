"""The monitor's warnings as the page tells them."""

import json
from pathlib import Path
from typing import Any

import pytest

from slimepo.report.findings import findings
from slimepo.report.page import read_report
from slimepo.report.stages import warnings_of
from tests.report.conftest import write_run


def line(step: int, state: str, rows: str = "heldout") -> dict[str, Any]:
    return {
        "kind": "warning",
        "step": step,
        "warning": "unlearning",
        "state": state,
        "set": rows,
        "message": f"fallen by {step}",
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
    assert [warned.gone for warned in warnings_of(lines)] == gone


def test_the_page_s_first_words_are_the_last_on_what_was_warned_of_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "slime-run", watched=True)
    (stage,) = {path.parent for path in folder.glob("*/monitor.jsonl")}
    floor = line(8, "on") | {"warning": "floor", "message": "low"}
    end = {"kind": "end", "step": 8}
    lines = [{"kind": "start", "step": 0}, line(4, "on"), line(8, "on"), floor, end]
    gone = [line(2, "on", "train"), line(3, "off", "train")]
    lines[1:1] = gone
    (stage / "monitor.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    report = read_report([folder])
    (monitor,) = (found for found in findings(report.groups, report.sources) if found.head == "Monitor")
    assert monitor.lines == ("slime-run: from step 4 on; at step 8 fallen by 8 (and 2 more)",)
