"""The monitor's file: when a warning is reported, what the last word changes, what a resumed run keeps."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimepo.files import json_lines
from slimepo.monitor.record import MonitorRecord
from slimepo.monitor.verdicts import Verdict

FALLEN = Verdict("unlearning", True, "heldout", "chosen answers are less likely: unlearning")
RECOVERED = Verdict("unlearning", False, "heldout", "")
END: dict[str, Any] = {"kind": "end", "step": 9, "warnings": []}


@pytest.fixture
def record(tmp_path: Path) -> MonitorRecord:
    said: list[str] = []
    made = MonitorRecord(tmp_path / "monitor.jsonl", said.append)
    made.begin([{"kind": "start", "step": 0}])
    return made


def summary(record: MonitorRecord) -> dict[str, Any]:
    found = record.summary()
    assert found is not None
    return found


def test_each_warning_is_reported_when_it_comes_and_when_it_goes(record: MonitorRecord) -> None:
    for step, verdict in enumerate([RECOVERED, FALLEN, FALLEN, RECOVERED, FALLEN], 1):
        record.warn(step, [verdict], ())
    states = [(line["step"], line["state"]) for line in record.of_kind("warning")]
    assert states == [(2, "on"), (4, "off"), (5, "on")]
    assert record.holding() == ["unlearning"]
    assert json_lines(record.path) == record.lines


@pytest.mark.parametrize("running", [True, False])
def test_trackers_of_this_process_show_it_as_an_alert(
    record: MonitorRecord, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    shown: list[tuple[str, str, str]] = []

    def alerts(name: str) -> Any:
        return lambda title, text: shown.append((name, title, text))

    current = SimpleNamespace(get=lambda: "run" if running else None)
    trackio = SimpleNamespace(context_vars=SimpleNamespace(current_run=current), alert=alerts("trackio"))
    wandb = SimpleNamespace(run="run" if running else None, alert=alerts("wandb"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    record.warn(5, [FALLEN], ["unlearning"])
    words = f"step 5: {FALLEN.message}; the run stops here"
    assert shown == [(name, "unlearning", words) for name in ("trackio", "wandb") if running]


def test_each_set_has_a_state_of_its_own(record: MonitorRecord) -> None:
    record.warn(1, [FALLEN, replace(FALLEN, rows="train")], ())
    record.warn(2, [RECOVERED], ())
    assert record.on == {("unlearning", "heldout"): False, ("unlearning", "train"): True}
    assert record.holding() == ["unlearning"]


def test_the_first_warning_that_may_stops_the_run(record: MonitorRecord) -> None:
    record.warn(3, [FALLEN], ["floor"])
    record.warn(4, [RECOVERED], ["unlearning"])
    assert record.stopped is None, "another kind does not, nor does what goes off"
    record.warn(5, [FALLEN], ["unlearning"])
    assert record.stopped == {"step": 5, "warning": "unlearning", "message": FALLEN.message}


class TestLastWord:
    """Of all held-out pairs, when the run has ended."""

    WHOLE = replace(FALLEN, message="of all 500 pairs")

    def test_what_holds_is_said_with_its_figures(self, record: MonitorRecord) -> None:
        record.warn(5, [FALLEN], ())
        record.append(END)
        # Twice: a run killed between its last word and its stage.json has it already.
        for _ in range(2):
            record.conclude(9, [self.WHOLE], 500)
        lines = json_lines(record.path)
        assert [line["kind"] for line in lines] == ["start", "warning", "warning", "end"]
        assert lines[-1] == END | {"warnings": ["unlearning"]}, "the line of the end is still the last"
        kept = summary(record)
        assert kept["facts"] == ["Warning: of all 500 pairs."]
        (warned,) = kept["warnings"]
        assert (warned["step"], warned["message"], warned["gone"]) == (5, "of all 500 pairs", None)

    def test_a_false_alarm_is_taken_back(self, record: MonitorRecord) -> None:
        record.warn(5, [FALLEN, replace(FALLEN, rows="train")], ())
        record.append(END)
        record.conclude(9, [RECOVERED], 500)
        assert record.of_kind("warning")[-1]["message"] == "unlearning: not so of all 500 held-out pairs"
        assert record.lines[-1]["warnings"] == ["unlearning"], "that of the rows trained on is another matter"
        gone = [(line["set"], line["gone"]) for line in summary(record)["warnings"]]
        assert gone == [("heldout", 9), ("train", None)]

    def test_what_was_never_said_is_not_taken_back(self, record: MonitorRecord) -> None:
        record.conclude(9, [RECOVERED], 500)
        assert record.of_kind("warning") == []


def test_a_resumed_run_drops_what_is_behind_its_checkpoint_and_the_end(record: MonitorRecord) -> None:
    record.warn(4, [FALLEN], ())
    record.append({"kind": "fallen", "step": 4, "answers": []})
    record.append(END | {"step": 4})
    record.warn(8, [RECOVERED], ())
    again = MonitorRecord(record.path)
    again.begin(again.up_to(4))
    assert [line["kind"] for line in json_lines(record.path)] == ["start", "warning"]
    assert again.holding() == ["unlearning"]


def test_without_a_line_there_is_no_summary(tmp_path: Path) -> None:
    assert MonitorRecord(tmp_path / "monitor.jsonl").summary() is None
