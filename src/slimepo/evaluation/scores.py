"""The scores of one model from its judgments, with all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.answers import OURS
from slimepo.evaluation.benchmarks.base import Kind
from slimepo.evaluation.canaries import CanaryResult, canary_answers, canary_result, canary_words
from slimepo.evaluation.job import Job, canary_path, judgments_path, say, score_path
from slimepo.evaluation.job_answers import answer_hashes, answers_of
from slimepo.evaluation.judge.many import Judge
from slimepo.evaluation.judge.request import Scores, most_common, refuse_unscored, scores_row, sha256_of
from slimepo.evaluation.rows import Row, read_rows
from slimepo.evaluation.settings import Evaluation
from slimepo.files import write_json
from slimepo.versions import versions

if TYPE_CHECKING:
    from rich.console import Console


def score_job(job: Job, kind: Kind, judge: Judge, console: Console) -> list[Scores]:
    """Score the judgments, show the scores and write their file; no file where they are refused.

    Raises:
        InputError: there are no judgments, or they are about other answers or by another judge.
        UnscoredError: too many items have no score.
    """
    path = judgments_path(job, kind, judge)
    if not path.exists():
        raise InputError(f"{path} is not there: run the step judge")
    rows = [row for row in read_rows(path) if kind.model_of(row) == job.name]
    answers = answers_of(job, kind)
    _refuse_other_answers(kind, rows, answers, path)
    target = score_path(job, kind, judge)
    target.unlink(missing_ok=True)
    if not rows:
        raise UnscoredError(f"{kind.folder}: nothing of {job.name} is judged in {path}")
    notes = unofficial(job.settings)
    found = [
        replace(scores, official=scores.official and not notes, notes=(*scores.notes, *notes))
        for scores in kind.scores(rows)
    ]
    for scores in found:
        if scores.identity.judge != judge.name:
            raise InputError(f"{path}: its judgments are by {scores.identity.judge}, not by {judge.name}")
        refuse_unscored(scores, job.settings.max_unscored)
    canaries = _canary_results(job, kind, judge)
    requests = kind.requests({job.name: answers})
    record = {
        "scores": [scores_row(scores) for scores in found],
        "judge": {
            "name": judge.name,
            "weights": judge.weights or None,
            "settings": asdict(requests[0].sampling) if requests else None,
        },
        "answers": {"sha256": sha256_of(answers), "made": answers[0].get(OURS, "elsewhere")},
        "judgments_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "files": [{"path": file.path, "sha256": file.sha256, "check": file.check} for file in kind.files],
        "baseline": job.settings.baseline,
        "canaries": {name: asdict(result) for name, result in canaries.items()},
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(target, record)
    show_scores(found, console)
    for name, result in canaries.items():
        say(console, f"{name}: {canary_words(job.settings.benchmark, result)}")
    say(console, f"score -> {target}")
    return found


def _refuse_other_answers(kind: Kind, rows: Sequence[Row], answers: Sequence[Row], path: Path) -> None:
    """An InputError where a judgment says that it is about another answer than the present one."""
    now = answer_hashes(kind, answers)
    told = {kind.id_of(row): row[OURS]["answer_sha256"] for row in rows if OURS in row}
    other = sum(now.get(id_, sha256) != sha256 for id_, sha256 in told.items())
    if other:
        raise InputError(f"{path}: {other} questions were judged with other answers; run the step judge")


def unofficial(settings: Evaluation) -> tuple[str, ...]:
    """What of the settings makes a figure another than the published kind."""
    notes = []
    if settings.limit is not None:
        notes.append(f"the first {settings.limit} questions only")
    if settings.temperature is not None and settings.benchmark != "alpaca-eval":
        notes.append(f"answered at temperature {settings.temperature:g}")
    if settings.max_new_tokens is not None:
        notes.append(f"answers of at most {settings.max_new_tokens} tokens")
    return tuple(notes)


def show_scores(found: Sequence[Scores], console: Console) -> None:
    """Every measure with its interval, and what has no score."""
    from rich.table import Table

    for scores in found:
        category = scores.identity.settings.get("category")
        title = f"{scores.identity.benchmark}{f' {category}' if category else ''}: {scores.model}"
        table = Table("measure", f"value ({scores.unit})", "interval", "n")
        for name, measure in scores.measures.items():
            interval = "" if measure.lower is None else f"{measure.lower:.2f} to {measure.upper:.2f}"
            if measure.standard_error is not None:
                interval = f"± {measure.standard_error:.2f} (s.e.)"
            table.add_row(name, f"{measure.value:.2f}", interval, str(measure.n))
        say(console, title)
        console.print(table)
        baseline = f", against {scores.identity.baseline}" if scores.identity.baseline else ""
        say(console, f"judge {scores.identity.judge}{baseline}")
        if scores.unscored:
            reasons = most_common(item.reason for item in scores.unscored)
            say(console, f"{len(scores.unscored)} items without a score; most often: {reasons}")
        for note in scores.notes:
            say(console, f"unofficial: {note}")


def _canary_results(job: Job, kind: Kind, judge: Judge) -> dict[str, CanaryResult]:
    path = canary_path(job, kind, judge)
    if not job.settings.canaries or not path.exists():
        return {}
    rows = read_rows(path)
    results = {}
    for name in canary_answers(job.settings.benchmark):
        own = [row for row in rows if kind.model_of(row) == name]
        worths = [worth for row in own for worth in kind.worths(row)]
        results[name] = canary_result(job.settings.benchmark, worths)
    return results
