"""What a judge says of one model's answers, and of the canaries'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.evaluation.answerers import Turn
from slimepo.evaluation.answers import OURS
from slimepo.evaluation.benchmarks.base import Kind
from slimepo.evaluation.canaries import canary_answers, canary_places
from slimepo.evaluation.job import Job, canary_path, file_label, judgments_path, replace_rows, say
from slimepo.evaluation.job_answers import answer_hashes, answers_of
from slimepo.evaluation.judge.many import Calls, Judge, judge_all, open_judge
from slimepo.evaluation.rows import Row, read_rows
from slimepo.evaluation.settings import JUDGE_CALLS

if TYPE_CHECKING:
    from rich.console import Console


def judge_of(job: Job) -> Judge:
    """The judge that the settings name, which is there."""
    assert job.settings.judge is not None
    return open_judge(job.settings.judge, job.settings.key_variable, job.retries)


def calls_of(job: Job, judge: Judge) -> Calls:
    """How it is called; its replies are kept for all models and benchmarks together."""
    cache = job.out / JUDGE_CALLS / f"{file_label(judge.name)}.jsonl"
    return Calls(cache, job.settings.concurrency, job.retries, job.prices)


def judge_answers(job: Job, kind: Kind, judge: Judge, console: Console) -> None:
    """Ask what the judge was not asked yet, and write the judgments in upstream's form.

    Raises:
        InputError: answers are missing, or the judge refuses or fails every call.
    """
    answers = {job.name: answers_of(job, kind)}
    _say_own_judge(job, judge, console)
    requests = kind.requests(answers)
    some, canaries = canaries_of(job, kind)
    fakes = some.requests(canaries) if canaries else []
    replies = judge_all(judge, [*requests, *fakes], calls_of(job, judge), console, kind.follow_up)
    path = judgments_path(job, kind, judge)
    judged_with = answer_hashes(kind, answers[job.name])
    rows = kind.judgments(answers, requests, replies, judge.name)
    _file_rows(path, kind, [row | {OURS: {"answer_sha256": judged_with[kind.id_of(row)]}} for row in rows])
    if canaries:
        rows = some.judgments(canaries, fakes, replies, judge.name)
        _file_rows(canary_path(job, kind, judge), kind, rows)
    say(console, f"judgments -> {path}")


def _file_rows(path: Path, kind: Kind, rows: Sequence[Row]) -> None:
    """Write rows in place of those of the same models; MT-Bench's file holds all models of a judge."""
    ours = {kind.model_of(row) for row in rows}
    others = [row for row in read_rows(path) if kind.model_of(row) not in ours] if path.exists() else []
    replace_rows(path, [*others, *rows])


def canaries_of(job: Job, kind: Kind) -> tuple[Kind, dict[str, Sequence[Row]]]:
    """The benchmark cut down to the canaries' questions, and their answers."""
    if not job.settings.canaries:
        return kind, {}
    asked = [kind.questions[i] for i in canary_places(len(kind.questions))]
    answers: dict[str, Sequence[Row]] = {
        name: [kind.answer_row(name, q, [Turn(text, None, "canary")] * len(q.turns), {}) for q in asked]
        for name, text in canary_answers(job.settings.benchmark).items()
    }
    return kind.cut(asked), answers


def _say_own_judge(job: Job, judge: Judge, console: Console) -> None:
    names = (judge.local, judge.endpoint.model if judge.endpoint else "", judge.name)
    if job.model in names:
        say(console, "note: the model judges itself")
