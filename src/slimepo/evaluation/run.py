"""A benchmark from answers over judgments to a score file, each step by itself or all in turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimepo.errors import InputError
from slimepo.evaluation.answerers import Turn
from slimepo.evaluation.benchmarks.base import Kind
from slimepo.evaluation.benchmarks.bench_alpaca import load_alpaca_eval
from slimepo.evaluation.benchmarks.bench_arena import ArenaHard, load_arena_hard, need_tokenizer
from slimepo.evaluation.benchmarks.bench_mt import load_mt_bench
from slimepo.evaluation.job import Job, file_label, say
from slimepo.evaluation.job_answers import known_answers, write_answers
from slimepo.evaluation.job_judgments import calls_of, canaries_of, judge_answers, judge_of
from slimepo.evaluation.judge.client import api_key
from slimepo.evaluation.judge.many import Judge, estimate_line, missing
from slimepo.evaluation.judge.request import Scores
from slimepo.evaluation.libraries import need_libraries
from slimepo.evaluation.locks import locked
from slimepo.evaluation.rows import Row
from slimepo.evaluation.scores import score_job
from slimepo.evaluation.settings import Evaluation

if TYPE_CHECKING:
    from rich.console import Console

Step = Literal["answer", "judge", "score"]
STEPS: tuple[Step, ...] = ("answer", "judge", "score")
# For the estimate of a dry run, where answers are still to be written.
GUESSED_CHARACTERS = 2000


def load_benchmark(settings: Evaluation, out: Path, *, judged: bool, awaited: Collection[str] = ()) -> Kind:
    """Fetch and read what a benchmark needs, the judge's part (prompts, references, baselines) only where `judged`.

    A baseline that is `awaited` need not have answered yet.

    Raises:
        InputError: a file cannot be had, is not the pinned one, or names what is not there.
    """
    if settings.benchmark == "mt-bench":
        return load_mt_bench(settings, judged)
    if settings.benchmark == "arena-hard":
        return load_arena_hard(settings, out, judged, awaited)
    return load_alpaca_eval(settings, out, judged, awaited)


def run_benchmark(
    job: Job, console: Console, steps: Sequence[Step] = STEPS, *, dry_run: bool = False
) -> list[Scores]:
    """Do the steps that are asked for; each takes up what is there already. Without a judge only answers are written.

    Raises:
        InputError: wrong input of any kind, found before anything is generated or paid for where it can be.
        UnscoredError: too many items have no score.
    """
    judged = job.settings.judge is not None
    if not judged and set(steps) & {"judge", "score"} and "answer" not in steps:
        raise InputError(f"the step {steps[-1]} needs --judge")
    if not dry_run:
        need_libraries(job.settings, job.model, steps)
    kind = load_benchmark(job.settings, job.out, judged=judged)
    # Before the answers: a wrong judge should not show after hours of generation.
    judge = judge_of(job) if judged else None
    if judge is not None and judge.endpoint is not None and "judge" in steps and not dry_run:
        api_key(judge.endpoint)
    if dry_run:
        _dry_run(job, kind, judge, steps, console)
        return []
    if judged and "score" in steps and isinstance(kind, ArenaHard):
        need_tokenizer(kind, known_answers(job, kind))
    if "answer" in steps:
        write_answers(job, kind, console)
    if judge is None:
        say(console, "no --judge: answers only")
        return []
    if not {"judge", "score"} & set(steps):
        return []
    # A judge's replies, and MT-Bench's judgments, are in one file for all models.
    with locked(job.out, file_label(judge.name), console):
        if "judge" in steps:
            judge_answers(job, kind, judge, console)
        return score_job(job, kind, judge, console) if "score" in steps else []


def _dry_run(job: Job, kind: Kind, judge: Judge | None, steps: Sequence[Step], console: Console) -> None:
    rows = known_answers(job, kind)
    to_answer = [question for question in kind.questions if question.id not in rows]
    if "answer" in steps:
        turns = sum(len(q.turns) for q in to_answer)
        most = sum(len(q.turns) * q.max_new_tokens for q in to_answer)
        say(
            console,
            f"answers: {len(kind.questions)} questions, {len(to_answer)} to answer in {turns} turns, at most "
            f"{most:,} tokens",
        )
    if judge is None or "judge" not in steps:
        return
    guess = [Turn("x" * GUESSED_CHARACTERS, None, "guess")]
    answers: dict[str, Sequence[Row]] = {
        job.name: [
            rows[q.id] if q.id in rows else kind.answer_row(job.name, q, guess * len(q.turns), {})
            for q in kind.questions
        ]
    }
    some, canaries = canaries_of(job, kind)
    requests = [*kind.requests(answers), *(some.requests(canaries) if canaries else [])]
    to_make = missing(judge, requests, calls_of(job, judge).cache)
    if to_answer:
        say(console, f"answers that are not there yet count as {GUESSED_CHARACTERS} characters a turn")
    say(console, estimate_line(requests, to_make, job.prices))
