"""What a stage has left, as the page tells it: the monitor's warnings, what was sampled, answers over time."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimepo.report.findings import findings
from slimepo.report.page import read_report, report_page, shown_fallen
from slimepo.report.records import Fallen, Warned, by_kind
from slimepo.report.stages import warnings_of
from tests.report.conftest import FALLEN, Tags, write_fallen, write_on_policy, write_run


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
    # What was worse and is over is told beside what holds.
    over = [line(2, "on"), line(3, "off"), floor, end]
    (stage / "monitor.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [lines[0], *over]))
    report = read_report([folder])
    (monitor,) = (found for found in findings(report.groups, report.sources) if found.head == "Monitor")
    assert monitor.lines == ("slime-run: step 8, low (and 1 more, among them unlearning until step 3)",)


def test_seeds_that_were_warned_of_have_one_line(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"slime-s{n}", seed=n, shift=n / 10, watched=n > 0) for n in (0, 1, 2)]
    for n, folder in enumerate(folders[1:], 1):
        lines = [{"kind": "start", "step": 0}, line(4, "on") | {"message": f"seed {n} fell"}]
        (folder / "slime" / "monitor.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    report = read_report(folders)
    (monitor,) = (found for found in findings(report.groups, report.sources) if found.head == "Monitor")
    assert monitor.lines == ("slime: 2 of 3 seeds, step 4, seed 2 fell",)


class TestOnPolicy:
    def test_what_was_sampled_and_held_out_tasks_by_step_have_panels(self, tmp_path: Path) -> None:
        page = report_page(read_report([write_on_policy(tmp_path / "run")]))
        for title, end in {
            "Reward of samples": "ends at 0.6",
            "Entropy of the policy, nats per token": "ends at 1.4",
            "KL to the start (or the reference), nats per token": "ends at 0.01",
            "Exact match on held-out tasks, %": "ends at 75",
        }.items():
            assert re.search(f'aria-label="{re.escape(title)}, over the steps: run {end}', page), title
        assert page.index("What was sampled") < page.index("Answers over time")

    def test_a_run_that_samples_nothing_has_neither(self, tmp_path: Path) -> None:
        page = report_page(read_report([write_run(tmp_path / "run")]))
        assert "What was sampled" not in page
        assert "Answers over time" not in page
        assert "Held-out tasks while training" not in page

    def test_held_out_answers_stand_at_a_few_steps_with_both_ends(self, tmp_path: Path) -> None:
        ((record,),) = (s.records for s in read_report([write_on_policy(tmp_path / "run")]).sources)
        assert len(record.over_time) == 6
        # Of nine tasks the one whose answers changed.
        sample = record.over_time[0]
        assert (sample.prompt, sample.gold, sample.family) == ("Add 5 and 7.", "12", "add")
        assert [answer.run for answer in sample.answers] == [f"step {n}" for n in (0, 10, 20, 40, 50, 60)]
        assert [answer.text for answer in sample.answers] == ["0", "10", "20", "40", "50", "60"]
        assert [answer.correct for answer in sample.answers] == [False] * 3 + [True] * 3

    def test_else_prompts_that_came_again_with_their_first_sample(self, tmp_path: Path) -> None:
        ((record,),) = (
            s.records for s in read_report([write_on_policy(tmp_path / "run", asked=False)]).sources
        )
        odd, even = record.over_time
        assert [a.text for a in odd.answers] == [f"said at {n}" for n in (1, 5, 9, 11, 15, 19)]
        assert odd.answers[0].run == "step 1, reward 0.125"
        assert even.answers[-1].text == "said at 20"
        assert {answer.finished for answer in odd.answers} == {None}

    @pytest.mark.parametrize("broken", ["null", "[]", '"x"', "{}", '{"step": 1, "answers": 3, "tasks": [4]}'])
    def test_lines_that_are_not_whole_are_passed_by(self, tmp_path: Path, broken: str) -> None:
        run = write_on_policy(tmp_path / "run")
        for file in ("answers-by-step.jsonl", "checkpoints/rollouts.jsonl"):
            (run / "grpo" / file).write_text(broken + "\n")
        ((record,),) = (source.records for source in read_report([run]).sources)
        assert record.over_time == ()


class TestFallen:
    """Chosen answers that became less likely, in the colours of their tokens."""

    def page(self, folder: Path, *answers: Any) -> str:
        run = write_run(folder / "run", watched=True)
        write_fallen(run / "slime" / "monitor.jsonl", *answers)
        return report_page(read_report([run]))

    def test_each_token_has_the_shade_of_its_change(self, tmp_path: Path) -> None:
        page = self.page(tmp_path, FALLEN)
        assert "-0.50 → -1.75 nats a token" in page
        assert "(-1.25; the first 4 of 5 tokens)" in page
        for token in (
            '<span class="d1" title="-0.50 → -0.75"> so</span>',
            '<span class="u2" title="-1.00 → -0.50"> be</span>',
            '<span class="d4" title="-1.00 → -6.00"> it</span>',
        ):
            assert token in page
        # What hardly moved has none, and is text whatever it says.
        assert '<span title="-0.10 → -0.15">&lt;script&gt;' in page
        assert not {"script", "img"} & {tag for tag, _ in Tags(page).seen}

    @pytest.mark.parametrize(
        "broken",
        [None, 3, {}, FALLEN | {"tokens": []}, FALLEN | {"after": [-1.0]}, FALLEN | {"mean": None}],
        ids=["null", "a number", "empty", "no tokens", "cut short", "no mean"],
    )
    def test_what_is_not_whole_is_left_out(self, tmp_path: Path, broken: Any) -> None:
        assert "The answers that fell most" not in self.page(tmp_path, broken)

    def test_a_run_that_kept_none_has_no_such_part(self, tmp_path: Path) -> None:
        assert "The answers that fell most" not in report_page(
            read_report([write_run(tmp_path / "run", watched=True)])
        )


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        ({"status": "failed", "code": 5, "error": "no memory is left"}, "failed", "no memory is left"),
        (
            {"status": "preempted", "code": 75},
            "unfinished",
            "it was told to end, and the same command goes on",
        ),
        ({"status": "running"}, "unfinished", "still running, or killed"),
        ({}, "unfinished", "still running, or killed"),
    ],
)
def test_a_run_that_has_no_end_says_how_it_ended(
    tmp_path: Path, status: dict[str, Any], state: str, words: str
) -> None:
    run = write_run(tmp_path / "run", state="killed")
    (run / "status.json").write_text(json.dumps(status))
    ((record,),) = (source.records for source in read_report([run]).sources)
    assert record.state == state
    assert words in record.note


def test_of_an_answer_that_several_seeds_lost_the_worst_is_shown_and_first() -> None:
    def lost(prompt: str, change: float) -> Fallen:
        return Fallen("run", prompt, (), (), (), (0.0, change), 4)

    seeds = ([lost("a", -5), lost("b", -3), lost("c", -2), lost("d", -1)], [lost("a", -0.1)])
    group: Any = SimpleNamespace(label="dpo", records=[SimpleNamespace(fallen=fallen) for fallen in seeds])
    ((_, worst),) = shown_fallen([group])
    assert [(each.prompt, each.mean[1]) for each in worst] == [("a", -5), ("b", -3), ("c", -2)]


def test_what_was_done_about_a_warning_stands_behind_it() -> None:
    lines = [
        {"kind": "warning", "step": 24, "warning": "unlearning", "state": "on", "message": "chosen fall"},
        {"kind": "cure", "step": 24, "message": "the learning rate is half of what it was"},
        {"kind": "warning", "step": 90, "warning": "unlearning", "state": "off", "message": "over"},
    ]
    assert [(each.kind, each.step, each.gone) for each in warnings_of(lines)] == [
        ("unlearning", 24, 90), ("cure", 24, None),
    ]  # fmt: skip


def test_what_was_warned_of_is_told_once_and_every_cure_for_itself() -> None:
    fell = [Warned(step, f"fell at {step:.0f}", kind="unlearning", rows="heldout") for step in (4.0, 8.0)]
    cures = [Warned(step, f"rate {step:.0f}", kind="cure") for step in (4.0, 8.0)]
    assert by_kind([*fell, *cures]) == [(fell[0], fell[1]), (cures[0], cures[0]), (cures[1], cures[1])]
