"""The monitor's file: what is kept of it on resume, and when a warning is reported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimepo.files import json_lines
from slimepo.monitor.record import MonitorRecord
from slimepo.monitor.verdicts import Verdict

FALLEN = Verdict("unlearning", True, "heldout", "chosen answers are less likely: unlearning")
RECOVERED = Verdict("unlearning", False, "heldout", "")


@pytest.fixture
def record(tmp_path: Path) -> MonitorRecord:
    said: list[str] = []
    made = MonitorRecord(tmp_path / "monitor.jsonl", said.append)
    made.begin({"kind": "start", "step": 0})
    return made


def end(step: int) -> dict[str, Any]:
    return {"kind": "end", "step": step, "share": 0.01, "warnings": []}


def states(record: MonitorRecord) -> list[tuple[int, str]]:
    return [(line["step"], line["state"]) for line in record.of_kind("warning")]


class TestWarnings:
    def test_each_is_reported_when_it_comes_and_when_it_goes(self, record: MonitorRecord) -> None:
        for step, verdict in enumerate([RECOVERED, FALLEN, FALLEN, RECOVERED, FALLEN], 1):
            record.warn(step, [verdict], ())
        assert states(record) == [(2, "on"), (4, "off"), (5, "on")]
        assert record.holding() == ["unlearning"]
        assert json_lines(record.path) == record.lines

    def test_the_first_that_may_stops_the_run(self, record: MonitorRecord) -> None:
        record.warn(3, [FALLEN], ["floor"])
        assert record.stopped is None
        record.warn(4, [RECOVERED], ["unlearning"])
        assert record.stopped is None, "what goes off stops nothing"
        record.warn(5, [FALLEN], ["unlearning"])
        assert record.stopped == {"step": 5, "warning": "unlearning", "message": FALLEN.message}

    def test_two_sets_are_two_warnings(self, record: MonitorRecord) -> None:
        record.warn(1, [FALLEN, replace(FALLEN, rows="train")], ())
        record.warn(2, [RECOVERED], ())
        assert [(line["set"], line["state"]) for line in record.of_kind("warning")] == [
            ("heldout", "on"), ("train", "on"), ("heldout", "off"),
        ]  # fmt: skip
        assert record.holding() == ["unlearning"]


class TestLastWord:
    """Of all held-out pairs, when the run has ended."""

    def test_what_holds_is_said_again_with_its_figures(self, record: MonitorRecord) -> None:
        record.warn(5, [FALLEN], ())
        record.append(end(9))
        record.conclude(9, [replace(FALLEN, message="of all 500 pairs")], 500)
        lines = json_lines(record.path)
        assert [line["kind"] for line in lines] == ["start", "warning", "warning", "end"]
        assert lines[2]["message"] == "of all 500 pairs"
        assert lines[-1] == end(9) | {"warnings": ["unlearning"]}, "the line of the end is still the last"
        kept = record.summary()
        assert kept is not None
        assert kept["facts"] == ["Warning: of all 500 pairs."]

    def test_it_is_said_once(self, record: MonitorRecord) -> None:
        """A run killed between its last word and its stage.json has it already."""
        record.conclude(9, [FALLEN], 500)
        record.conclude(9, [FALLEN], 500)
        assert states(record) == [(9, "on")]

    def test_a_false_alarm_is_taken_back(self, record: MonitorRecord) -> None:
        record.warn(5, [FALLEN, replace(FALLEN, rows="train")], ())
        record.append(end(9))
        record.conclude(9, [RECOVERED], 500)
        assert record.of_kind("warning")[-1]["message"] == "unlearning: not so of all 500 held-out pairs"
        assert record.lines[-1]["warnings"] == ["unlearning"], "that of the rows trained on is another matter"
        kept = record.summary()
        assert kept is not None
        assert [(line["set"], line["gone"]) for line in kept["warnings"]] == [("heldout", 9), ("train", None)]

    def test_a_warning_is_kept_once_with_its_last_words(self, record: MonitorRecord) -> None:
        record.warn(5, [FALLEN], ())
        record.conclude(9, [replace(FALLEN, message="of all 500 pairs")], 500)
        kept = record.summary()
        assert kept is not None
        (warned,) = kept["warnings"]
        assert (warned["step"], warned["message"], warned["gone"]) == (5, "of all 500 pairs", None)

    def test_what_was_never_said_is_not_taken_back(self, record: MonitorRecord) -> None:
        record.conclude(9, [RECOVERED], 500)
        assert record.of_kind("warning") == []


class TestResume:
    def test_lines_behind_the_checkpoint_and_the_end_are_dropped(self, record: MonitorRecord) -> None:
        record.warn(4, [FALLEN], ["unlearning"])
        record.append(end(4))
        record.warn(8, [RECOVERED], ())
        again = MonitorRecord(record.path)
        again.take_up(again.up_to(4))
        assert [line["kind"] for line in json_lines(record.path)] == ["start", "warning"]
        assert again.holding() == ["unlearning"]
        assert again.stopped is not None
        assert again.stopped["step"] == 4

    def test_training_again_forgets_the_first_time(self, record: MonitorRecord) -> None:
        record.warn(4, [FALLEN], ["unlearning"])
        record.clear()
        assert (record.lines, record.holding(), record.stopped) == ([], [], None)
        record.begin({"kind": "start", "step": 0})
        assert len(json_lines(record.path)) == 1


def test_without_a_line_there_is_no_summary(tmp_path: Path) -> None:
    assert MonitorRecord(tmp_path / "monitor.jsonl").summary() is None
