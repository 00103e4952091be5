"""A benchmark from answers over judgments to a score file, each step by itself or all in turn."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.evaluation.answers import answer_hashes, answers_of, known_answers, read_baseline, write_answers
from slimepo.evaluation.benchmarks.base import OURS, Answers, Benchmark
from slimepo.evaluation.canaries import canary_answers, canary_places
from slimepo.evaluation.job import (
    Job,
    answers_path,
    calls_of,
    canary_path,
    file_label,
    judgments_path,
    locked,
)
from slimepo.evaluation.judge.client import check_endpoint
from slimepo.evaluation.judge.many import Judge, estimate_line, judge_all, missing, open_judge
from slimepo.evaluation.judge.request import Scores
from slimepo.evaluation.rows import JsonObject, read_rows, write_rows
from slimepo.evaluation.scores import write_scores
from slimepo.evaluation.settings import STEPS, Evaluation, has_option

if TYPE_CHECKING:
    from rich.console import Console

# For the estimate of a dry run, where answers are still to be written.
GUESSED_CHARACTERS = 2000


def load_benchmark(settings: Evaluation, out: Path, awaited: Collection[str] = ()) -> Benchmark:
    """Fetch and read what a benchmark needs; what its judge needs (prompts, references, baselines) where there is one.

    A baseline that is `awaited` need not have answered yet, and counts as one without answers.

    Raises:
        InputError: a file cannot be had, is not the pinned one, or names what is not there.
    """
    name = settings.benchmark.replace("-", "_")
    module: Any = importlib.import_module(f"slimepo.evaluation.benchmarks.{name}")
    benchmark: Benchmark = module.load_questions(settings)
    if settings.judge is None and has_option(settings.benchmark, "judge"):
        return benchmark
    baseline = None
    if settings.baseline is not None:
        await_it = settings.baseline in awaited
        baseline = (settings.baseline, ()) if await_it else read_baseline(settings.baseline, out, benchmark)
    complete: Benchmark = module.load_scoring(benchmark, settings, baseline)
    return complete


def refuse_own_baseline(job: Job, benchmark: Benchmark) -> None:
    """Nothing, where a model is not compared with itself, or its answers are the baseline's, so that nobody is asked.

    Raises:
        InputError: it is the baseline.
    """
    rows = known_answers(job, benchmark)
    there = [rows[question.id] for question in benchmark.questions if question.id in rows]
    same = benchmark.judging is not None and len(there) == len(benchmark.questions)
    if job.name in benchmark.against and not (
        same and benchmark.judging and not benchmark.judging.requests(job.name, there)
    ):
        raise InputError(
            f"{job.name} is the baseline that {benchmark.folder} compares it with; give another --baseline, or another "
            "--name if it is another model"
        )


def run_benchmark(
    job: Job, console: Console, steps: Sequence[str] = STEPS, *, dry_run: bool = False
) -> list[Scores]:
    """Do the steps that are asked for; each takes up what is there already. Without a judge only answers are written.

    Raises:
        InputError: wrong input of any kind, found before anything is generated or paid for where it can be.
        UnscoredError: too many items have no score.
    """
    settings = job.settings
    # All of them is what a benchmark does without a word.
    if set(steps) != set(STEPS) and "judge" in steps and not has_option(settings.benchmark, "judge"):
        raise InputError(
            f"{settings.benchmark} has no step judge: code scores its answers, in the step score"
        )
    lacks_judge = settings.judge is None and has_option(settings.benchmark, "judge")
    if lacks_judge and "answer" not in steps:
        raise InputError(f"the step {steps[-1]} needs --judge")
    benchmark = load_benchmark(settings, job.out)
    if {"judge", "score"} & set(steps):
        refuse_own_baseline(job, benchmark)
    # Before the answers: a wrong judge should not show after hours of generation.
    judge = open_judge(settings.judge, settings.key_variable, job.retries) if settings.judge else None
    if dry_run:
        _dry_run(job, benchmark, judge, steps, console)
        return []
    if judge is not None and judge.endpoint is not None and "judge" in steps:
        check_endpoint(judge.endpoint)
    if "score" in steps:
        benchmark.ready(known_answers(job, benchmark))
    if "answer" in steps:
        write_answers(job, benchmark, console)
    if lacks_judge:
        console.print("no --judge: answers only")
        return []
    if judge is None:
        return write_scores(job, benchmark, None, console) if "score" in steps else []
    if not {"judge", "score"} & set(steps):
        return []
    # A judge's replies, and MT-Bench's judgments, are in one file for all models.
    with locked(job.out, file_label(judge.name), console):
        if "judge" in steps:
            judge_answers(job, benchmark, judge, console)
        return write_scores(job, benchmark, judge, console) if "score" in steps else []


def judge_answers(job: Job, benchmark: Benchmark, judge: Judge, console: Console) -> None:
    """Ask what the judge was not asked yet, and write the judgments in upstream's form, the canaries' apart.

    Raises:
        InputError: answers are missing, or the judge refuses or fails every call.
    """
    assert benchmark.judging is not None
    judging, answers = benchmark.judging, answers_of(job, benchmark)
    if job.model in (judge.local, judge.endpoint.model if judge.endpoint else "", judge.name):
        console.print("note: the model judges itself")
    canaries = _canaries(job, benchmark)
    requests = {name: judging.requests(name, rows) for name, rows in {job.name: answers, **canaries}.items()}
    everything = [request for each in requests.values() for request in each]
    if other := next((r.model for name, each in requests.items() for r in each if r.model != name), None):
        raise InputError(
            f"{answers_path(job, benchmark)}: its rows name the model {other!r}, and they are filed under "
            f"{job.name!r}; give both one name"
        )
    replies = judge_all(judge, everything, calls_of(job, judge), console, judging.follow_up)
    path = judgments_path(job, benchmark, judge)
    judged_with = answer_hashes(benchmark, answers)
    rows = judging.judgments(answers, requests[job.name], replies, judge.name)
    # How the judge came to them: what of its settings it did not take, and how often it thought aloud first.
    given = [reply for request in requests[job.name] for reply in replies[request.key]]
    without = sorted({part for reply in given for part in reply.without})
    thought = sum(reply.thought for reply in given)
    how: dict[str, Any] = ({"without": without} if without else {}) | (
        {"thought": thought} if thought else {}
    )
    own = [row | {OURS: {"answer_sha256": judged_with[benchmark.id_of(row)], **how}} for row in rows]
    _file_judgments(path, benchmark, own)
    if canaries:
        rows = [
            row
            for name, said in canaries.items()
            for row in judging.judgments(said, requests[name], replies, judge.name)
        ]
        _file_judgments(canary_path(job, benchmark, judge), benchmark, rows)
    console.print(f"judgments -> {path}")


def _file_judgments(path: Path, benchmark: Benchmark, rows: Sequence[JsonObject]) -> None:
    """Write rows in place of those of the same models; MT-Bench's file holds all models of a judge."""
    assert benchmark.judging is not None
    model_of = benchmark.judging.model_of
    ours = {model_of(row) for row in rows}
    others = [row for row in read_rows(path) if model_of(row) not in ours] if path.exists() else []
    write_rows(path, [*others, *rows])


def _canaries(job: Job, benchmark: Benchmark) -> dict[str, Answers]:
    """The canaries' answers to a few of the questions, by the canary's name."""
    if not job.settings.canaries or benchmark.judging is None:
        return {}
    asked = [benchmark.questions[i] for i in canary_places(len(benchmark.questions))]
    return {
        name: [benchmark.answer_row(name, q.row, [text] * len(q.turns)) for q in asked]
        for name, text in canary_answers(benchmark.judging.forged).items()
    }


def _dry_run(
    job: Job, benchmark: Benchmark, judge: Judge | None, steps: Sequence[str], console: Console
) -> None:
    rows = known_answers(job, benchmark)
    to_answer = [question for question in benchmark.questions if question.id not in rows]
    if "answer" in steps:
        turns = sum(len(q.turns) for q in to_answer)
        most = sum(len(q.turns) * q.max_new_tokens for q in to_answer)
        console.print(
            f"answers: {len(benchmark.questions)} questions, {len(to_answer)} to answer in {turns} turns, at most "
            f"{most:,} tokens"
        )
    if judge is None or benchmark.judging is None or "judge" not in steps:
        return
    guess = "x" * GUESSED_CHARACTERS
    guesses = {q.id: benchmark.answer_row(job.name, q.row, [guess] * len(q.turns)) for q in to_answer}
    answers = {job.name: [(rows | guesses)[q.id] for q in benchmark.questions], **_canaries(job, benchmark)}
    requests = [
        request for name, said in answers.items() for request in benchmark.judging.requests(name, said)
    ]
    calls = calls_of(job, judge)
    if to_answer:
        console.print(f"answers that are not there yet count as {GUESSED_CHARACTERS} characters a turn")
    console.print(estimate_line(requests, missing(judge, requests, calls.cache), calls.prices))
