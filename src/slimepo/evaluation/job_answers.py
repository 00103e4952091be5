"""The answers of one model to a benchmark: written, or those that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.evaluation.answerers import open_answerer
from slimepo.evaluation.answers import OURS, answer_questions, same_questions, summary_line
from slimepo.evaluation.benchmarks.base import Kind
from slimepo.evaluation.job import Job, answers_path, replace_rows, say
from slimepo.evaluation.judge.request import sha256_of
from slimepo.evaluation.locks import locked
from slimepo.evaluation.rows import Row, read_rows
from slimepo.files import json_lines

if TYPE_CHECKING:
    from rich.console import Console


def write_answers(job: Job, kind: Kind, console: Console) -> None:
    """Answer what is not answered yet; answers of others to all questions are left as they are.

    Raises:
        InputError: others answered a part of the questions, ours were made in another way, or some cannot be had.
    """
    settings = job.settings
    path = answers_path(job, kind)
    known = known_answers(job, kind)
    elsewhere = sum(q.id in known and OURS not in known[q.id] for q in kind.questions)
    if 0 < elsewhere < len(kind.questions):
        raise InputError(
            f"{path.with_suffix('')}: {elsewhere} of {len(kind.questions)} answers are there and were made elsewhere; "
            "those of two models are not mixed: complete them, or give another --name"
        )
    if not elsewhere:
        answerer = open_answerer(
            job.model,
            backend=settings.backend,
            key_variable=settings.model_key_variable,
            concurrency=settings.concurrency,
            retries=job.retries,
            batch_rows=settings.batch_rows,
        )
        with locked(job.out, f"{kind.folder}--{job.name}", console):
            answer_questions(
                kind.questions,
                answerer,
                path,
                lambda question, turns, how: kind.answer_row(job.name, question, turns, how),
                kind.id_of,
                console,
                system=settings.system,
                seed=settings.seed,
            )
            if kind.answers_list:
                # AlpacaEval's own file is one JSON list; a run goes on from the journal beside it, which it names.
                plain = [{**row, OURS: path.name} for row in json_lines(path, strict=True)]
                replace_rows(path.with_suffix(".json"), plain)
    rows = answers_of(job, kind)
    say(console, f"{summary_line(rows)} -> {path}")


def known_answers(job: Job, kind: Kind) -> dict[str, dict[str, Any]]:
    """The rows that are there, by question: from our journal, else what others made in a file of upstream's form."""
    path = answers_path(job, kind)
    if not path.exists():
        path = path.with_suffix(".json")
        rows = read_rows(path) if path.exists() else []
        return {kind.id_of(row): row for row in rows if OURS not in row}
    return {kind.id_of(row): row for row in json_lines(path, strict=True)}


def answers_of(job: Job, kind: Kind) -> list[dict[str, Any]]:
    """The model's rows to the questions that are asked, in their order.

    Raises:
        InputError: some are missing, or were made with other settings than those given.
    """
    rows = known_answers(job, kind)
    path = answers_path(job, kind)
    same_questions(kind.questions, rows, path)
    lacking = sum(question.id not in rows for question in kind.questions)
    if lacking:
        raise InputError(
            f"{path}: {lacking} of {len(kind.questions)} answers are missing; run the step answer"
        )
    return [rows[question.id] for question in kind.questions]


def answer_hashes(kind: Kind, answers: Sequence[Row]) -> dict[str, str]:
    """A hash of each answer by question, whenever and however it was made."""
    return {
        kind.id_of(row): sha256_of({k: v for k, v in row.items() if k not in (OURS, "tstamp")})
        for row in answers
    }
