"""The end of a run: the table, what matters most, and where everything is."""

import io
from pathlib import Path
from typing import Any

from slimepo.pipeline.console import final_facts, print_summary
from slimepo.terminal import make_console

HELDOUT = {
    "pairs": 40,
    "before": {"logps/chosen": -0.5, "logps/rejected": -0.7, "margin": 0.2, "accuracy": 0.6},
    "after": {"logps/chosen": -0.4, "logps/rejected": -0.9, "margin": 0.5, "accuracy": 0.7},
    "chosen_fell": 0.25,
}


def result(monitor: dict[str, Any] | None) -> dict[str, Any]:
    return {"name": "slime", "steps": 12, "seconds": 61.0, "heldout": HELDOUT, "monitor": monitor}


def printed(monitor: dict[str, Any] | None, out: Path) -> str:
    file = io.StringIO()
    print_summary([result(monitor)], out, make_console(file=file, width=160))
    return file.getvalue()


def test_three_facts_and_the_places(tmp_path: Path) -> None:
    said = printed({"warnings": [], "stopped": None, "facts": ["One.", "Two.", "Three."]}, tmp_path)
    assert said.splitlines()[-6:] == [
        "1. One.",
        "2. Two.",
        "3. Three.",
        f"run folder: {tmp_path}",
        f"model: {tmp_path / 'slime' / 'model'}",
        f"report: slimepo report {tmp_path}",
    ]


def test_the_time_of_a_stage_and_what_it_went_to(tmp_path: Path) -> None:
    file = io.StringIO()
    times = {
        "set_up": 3.0,
        "before": 9.0,
        "training": 70.0,
        "monitor": 5.0,
        "answers_by_step": 2.0,
        "after": 20.0,
    }
    earlier, now = result(None), result(None) | {"name": "dpo", "seconds": 100.0, "times": times}
    print_summary([earlier, now], tmp_path, make_console(file=file, width=160))
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in file.getvalue().splitlines()]
    assert ["steps, time", "12, 1:01", "12, 1:40"] in rows
    assert ["of it training", "-", "1:10"] in rows
    assert ["of it monitor", "-", "0:05"] in rows
    assert ["of it held out", "-", "0:22"] in rows


def test_a_report_that_is_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("")
    assert f"report: {tmp_path / 'report.html'}" in printed(None, tmp_path)


def test_a_run_that_stopped_itself_says_why(tmp_path: Path) -> None:
    stopped = {"step": 7, "warning": "unlearning", "message": "chosen answers fell"}
    said = printed({"warnings": [], "stopped": stopped, "facts": []}, tmp_path)
    assert "slime was stopped at step 7: chosen answers fell" in said


def test_without_a_monitor_the_facts_are_of_the_held_out_pairs() -> None:
    first, second = final_facts(result(None))
    assert first.startswith("Chosen answers held out are 0.10 nats per token likelier than at the start; 25%")
    assert second.startswith(
        "The chosen answer is the likelier one in 70% of the pairs held out (60% at the start)"
    )
    assert final_facts({"name": "sft"}) == []
