"""How the figures came about: searches before the seeds, first numbers compared; and differences seed by seed."""

import json
from pathlib import Path
from typing import Any

import pytest

from slimepo.report.facts import certificates, data_facts, searched, speed
from slimepo.report.folders import read_report, read_source
from slimepo.report.groups import Group
from slimepo.report.page import report_page, spoken
from slimepo.report.records import Record
from slimepo.report.tables import differences
from tests.report.conftest import write_json, write_run


def certificate(error: float, agrees: bool = True) -> dict[str, Any]:
    """As a run writes it."""
    return {
        "loss": {"run": 4.3589229, "plain": 4.3589231, "error": 4.6e-8},
        "gradients": [{"name": "a", "run": 1.0, "plain": 1.0, "error": each} for each in (error / 2, error)],
        "precision": "float32", "tolerance": {"loss": 1e-4, "gradients": 1e-3}, "agrees": agrees, "rows": 3,
        "ranks": 2, "layout": "shared", "seconds": 0.08,
    }  # fmt: skip


class TestCertificates:
    def test_a_line_a_run_with_its_worst_gradient(self) -> None:
        records = [
            Record("good", "", "slime", certificate=certificate(3e-7)),
            Record("bad", "", "slime", certificate=certificate(0.4, agrees=False)),
            Record("new", "", "slime"),
        ]
        table = certificates([Group("g", tuple(records))])
        lines = {line.label: dict(zip(table.heads[1:], line.cells, strict=True)) for line in table.lines}
        assert lines.keys() == {"good", "bad"}
        assert lines["good"]["loss of the run"] == "4.35892"
        assert lines["good"]["gradients apart by"] == "3e-07"
        assert (lines["good"]["verdict"], lines["good"]["ranks"]) == ("agrees", "2")
        assert lines["bad"]["verdict"] == "not as computed plainly"

    def test_what_was_left_out_says_why(self) -> None:
        record = Record("zero", "", "slime", certificate={"left_out": "DeepSpeed takes its step"})
        assert certificates([Group("g", (record,))]).lines[0].cells == ("DeepSpeed takes its step",)

    def test_it_has_its_place_on_the_page(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        assert "First numbers" not in report_page(read_report([run]))
        write_json(run / "slime" / "certificate.json", certificate(3e-7))
        assert "<td>agrees</td>" in report_page(read_report([run]))


def test_what_a_run_spent_its_time_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    table = speed([Group("g", tuple(read_source(run).records))], [])
    told = dict(zip(table.heads[1:], table.lines[0].cells, strict=True))
    assert told["time"] == "1 min 15 s"
    assert (told["of it training"], told["of it monitor"], told["of it held out"]) == (
        "1 min 0 s",
        "4.4 s",
        "10.0 s",
    )


def test_a_run_of_an_earlier_version_has_a_time_alone() -> None:
    table = speed([Group("g", (Record("a", "", "slime", seconds=10.0),))], [])
    assert table.heads == ("run", "time")


def test_a_sweep_s_search_has_every_point_and_the_one_taken(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "study" / "slime" / f"seed-{seed}", seed=seed)
    points = [
        {"point": {"learning_rate": rate}, "exact_match": match}
        for rate, match in ((1e-4, 0.4), (1e-3, 0.25))
    ]
    search = {"by": "exact_match", "seeds": [100], "arms": {"slime": points, "dpo": points[1:]}}
    (tmp_path / "study" / "search.json").write_text(json.dumps(search))
    report = read_report([tmp_path / "study"])
    ((title, table),) = searched(report.searches)
    assert title == "study: exact match of each point tried (seeds 100)"
    assert table.heads == ("arm", "learning rate 1e-4", "learning rate 1e-3")
    assert [[line.label, *map(str, line.cells)] for line in table.lines] == [
        ["slime", "0.4 (taken)", "0.25"],
        ["dpo", "\u2013", "0.25 (taken)"],
    ]
    assert "0.4 (taken)" in report_page(report)


class TestDifferences:
    def group(self, label: str, loss: str, *ends: float, start: float = 0.5) -> Group:
        records = [
            Record(
                label,
                "",
                loss,
                seed=seed,
                before={"exact_match": start + seed},
                after={"exact_match": start + seed + end},
            )
            for seed, end in enumerate(ends)
        ]
        return Group(label, tuple(records))

    def test_they_are_of_the_same_seeds_to_the_control(self) -> None:
        # Differences of 2, 3 and 4 points: 4.303 / sqrt(3).
        table = differences(
            [self.group("ours", "slime", 0.12, 0.13, 0.14), self.group("control", "sft", 0.1, 0.1, 0.1)]
        )
        assert table.heads[0] == "compared with control"
        assert [(line.label, line.cells) for line in table.lines] == [("ours", ("+3.0 \u00b1 2.5", "3"))]

    def test_seeds_that_start_elsewhere_are_not_compared(self) -> None:
        assert not differences(
            [self.group("a", "slime", 0.1, 0.1), self.group("b", "dpo", 0.1, 0.1, start=0.25)]
        ).lines
        assert not differences([]).lines


def test_every_row_of_the_file_is_in_a_column(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    facts = json.loads((run / "data.json").read_text()) | {
        "rows": 100,
        "malformed": 2,
        "ties": 3,
        "without_verdict": 1,
        "in_no_part": 26,
    }
    write_json(run / "data.json", facts)
    drops = {"kept": 60, "dropped": {"row too long": 3}, "heldout": {"empty response": 1}}
    write_json(run / "slime" / "data.json", drops)
    source = read_source(run)
    table = data_facts([Group("g", tuple(source.records))], [source])
    told = dict(zip(table.heads[1:], map(str, table.lines[0].cells), strict=True))
    assert told["rows in the file"] == "106"
    assert told["without a verdict"] == "1"
    assert (told["malformed"], told["ties"], told["in no part"]) == ("2", "3", "26")
    assert (told["trained on"], told["dropped: row too long"]) == ("60", "3")
    assert told["held out, dropped: empty response"] == "1"


def test_the_command_of_a_run_is_for_the_folder_that_the_report_is_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    assert "slimepo run runs/first/recipe.yaml --out again/first" in report_page(read_report([run]))
    monkeypatch.chdir(tmp_path / "runs")
    assert "slimepo run first/recipe.yaml --out again/first" in report_page(read_report([Path("first")]))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n", "Hi!"),
        ("<bos><start_of_turn>user\nName a\nriver.<end_of_turn>\n<start_of_turn>model\n", "Name a\nriver."),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant"
         "<|end_header_id|>\n\n", "Hi!"),
        ("<s>[INST] Hi! [/INST]", "Hi!"),
        ("Is a < b and b > a?", "Is a < b and b > a?"),
        ("user\nof this", "user\nof this"),
    ],
)  # fmt: skip
def test_a_prompt_is_shown_as_its_last_turn(prompt: str, said: str) -> None:
    assert spoken(prompt) == said
