"""The table of a real model's arms: differences paired by prompt, figures of the prompts that all have answered."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ifeval_arms import main, over_seeds, repeated
from slimepo.evaluation.benchmarks.ifeval import FIGURES


def evaluated(folder: Path, followed: list[int], responses: list[str]) -> None:
    """As `slimepo eval ifeval` leaves a model whose answers follow these instructions, one a prompt."""
    measure = {"value": 100 * sum(followed) / len(followed), "lower": 0.0, "upper": 100.0}
    score = {
        "measures": dict.fromkeys(FIGURES, measure),
        "items": {name: [[f] for f in followed] for name in FIGURES},
    }
    rows: list[dict[str, Any]] = [
        {"key": key, "response": text, "slimepo": {"turns": [{"tokens": len(text.split()), "stop": "stop"}]}}
        for key, text in enumerate(responses)
    ]
    for file, text in {
        "scores/ifeval--m.json": json.dumps({"scores": [score]}),
        "ifeval/answers.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }.items():
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)


def test_each_arm_is_set_against_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm = tmp_path / "sweep" / "dpo" / "seed-0"
    # The start has answered one prompt more.
    evaluated(tmp_path / "start", [1, 0, 0, 0], ["a b", "a b c d", "a b", "a b", "a " * 90])
    evaluated(arm / "eval", [1, 1, 1, 0], ["a b c d"] * 4)
    (arm / "dpo").mkdir()
    before, after = ({"logps/chosen": c, "logps/rejected": -2.0, "accuracy": 0.5} for c in (-1.0, -0.75))
    heldout = {"before": before, "after": after, "chosen_fell": 0.25}
    (arm / "dpo" / "stage.json").write_text(json.dumps({"heldout": heldout}))
    slime = tmp_path / "sweep" / "slime" / "seed-0" / "slime"
    slime.mkdir(parents=True)
    (slime / "stage.json").write_text(json.dumps({"heldout": heldout}))
    for folder, rights in ((arm / "dpo", [0, 0, 1, 0]), (slime, [1, 1, 0, 0])):
        told = [
            {
                "before": {"correct": False, "finished": True},
                "after": {"correct": bool(each), "finished": True},
            }
            for each in rights
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))

    arguments = [str(tmp_path / "sweep"), str(tmp_path / "start"), "--against", "dpo"]
    main([*arguments, "--out", str(tmp_path / "arms.csv")])
    with (tmp_path / "arms.csv").open() as file:
        start, dpo, other = csv.DictReader(file)
    assert (start["prompt_strict"], start["tokens"], start["ended"]) == ("25.0", "2.5", "4")
    assert start["prompt_strict_to_start"] == ""
    assert (dpo["arm"], dpo["prompt_strict_to_start"]) == ("dpo, seed-0", "50.0")
    assert (dpo["chosen_change"], dpo["rejected_change"], dpo["chosen_fell"]) == ("0.25", "0.0", "0.25")
    assert (dpo["requests"], dpo["requests_to_start"], dpo["requests_to_control"]) == ("25.0", "25.0", "")
    # It was not evaluated.
    assert (other["arm"], other["prompt_strict"], other["requests"]) == ("slime, seed-0", "", "50.0")
    assert (other["requests_to_start"], other["requests_to_control"]) == ("50.0", "25.0")
    assert "not evaluated yet" in capsys.readouterr().out


def test_means_over_seeds_have_intervals_and_differences_seed_by_seed() -> None:
    control = [{"arm": "sft, seed-0", "requests": 10.0}, {"arm": "sft, seed-1", "requests": 14.0}]
    lines = [
        {"arm": "dpo, seed-0", "requests": 11.0, "requests_low": 9.0, "requests_to_start": 1.0, "ended": 3},
        {"arm": "dpo, seed-1", "requests": 16.0, "requests_low": 9.0, "requests_to_start": 3.0},
    ]
    found = over_seeds("dpo", lines, control)
    assert (found["arm"], found["requests"], found["requests_to_start"]) == ("dpo, 2 seeds", 13.5, 2.0)
    assert found["requests_to_control"] == 1.5
    # One and two points: half a point of standard error, and Student's t of one degree of freedom.
    assert found["requests_to_control_low"] == pytest.approx(1.5 - 12.706 * 0.5)
    assert found["requests_to_control_high"] == pytest.approx(1.5 + 12.706 * 0.5)
    # Not of every seed.
    assert "ended" not in found
    assert "requests_to_start_to_control" not in found


def test_what_stands_in_an_answer_twice_is_repeated() -> None:
    assert repeated("a b c") == 0.0
    assert repeated("a b c d a b c d") == pytest.approx(1 / 5)
