"""The scores of one model from its answers or their judgments, with all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.answers import answer_hashes, answers_of
from slimepo.evaluation.benchmarks.base import OURS, Answers, Benchmark
from slimepo.evaluation.canaries import CanaryResult, canary_answers, canary_result, canary_words
from slimepo.evaluation.job import Job, canary_path, judgments_path, score_path
from slimepo.evaluation.judge.many import Judge
from slimepo.evaluation.judge.request import Scores, most_common, refuse_unscored, sha256_of
from slimepo.evaluation.rows import read_rows
from slimepo.evaluation.settings import Evaluation
from slimepo.files import write_json
from slimepo.versions import versions

if TYPE_CHECKING:
    from rich.console import Console


def write_scores(job: Job, benchmark: Benchmark, judge: Judge | None, console: Console) -> list[Scores]:
    """Score the judgments (the answers themselves where no judge is asked), show the scores and write their file.

    Raises:
        InputError: there are no judgments, or they are about other answers or by another judge.
        UnscoredError: too many items have no score; no file is written then.
    """
    assert benchmark.scores is not None
    answers = answers_of(job, benchmark)
    judgments = [] if judge is None else _judgments(job, benchmark, judge, answers)
    target = score_path(job, benchmark, judge)
    target.unlink(missing_ok=True)
    if judge is not None and not judgments:
        place = judgments_path(job, benchmark, judge)
        raise UnscoredError(f"{benchmark.folder}: nothing of {job.name} is judged in {place}")
    notes = _unofficial(job.settings, benchmark)
    found = [
        replace(scores, official=scores.official and not notes, notes=(*scores.notes, *notes))
        for scores in benchmark.scores(answers, judgments)
    ]
    for scores in found:
        if judge is not None and scores.identity.judge != judge.name:
            place = judgments_path(job, benchmark, judge)
            raise InputError(f"{place}: its judgments are by {scores.identity.judge}, not by {judge.name}")
        refuse_unscored(scores, job.settings.max_unscored)
    canaries = {} if judge is None else _canary_results(job, benchmark, judge)
    judged: dict[str, Any] = {}
    if judge is not None and benchmark.judging is not None:
        requests = benchmark.judging.requests(job.name, answers)
        sampling = asdict(requests[0].sampling) if requests else None
        content = judgments_path(job, benchmark, judge).read_bytes()
        judged = {
            "judge": {"name": judge.name, "weights": judge.weights or None, "settings": sampling},
            "judgments_sha256": hashlib.sha256(content).hexdigest(),
        }
    record = {
        "scores": [asdict(scores) for scores in found],
        "answers": {"sha256": sha256_of(answers), "made": answers[0].get(OURS, "elsewhere")},
        **judged,
        "files": [
            {"path": file.path, "sha256": file.sha256, "check": file.check} for file in benchmark.files
        ],
        "baseline": job.settings.baseline,
        "canaries": {name: asdict(result) for name, result in canaries.items()},
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(target, record)
    show_scores(found, console)
    for name, result in canaries.items():
        console.print(f"{name}: {canary_words(result)}")
    console.print(f"score -> {target}")
    return found


def _judgments(job: Job, benchmark: Benchmark, judge: Judge, answers: Answers) -> list[dict[str, Any]]:
    """The model's judgments, which are about these answers."""
    assert benchmark.judging is not None
    path = judgments_path(job, benchmark, judge)
    if not path.exists():
        raise InputError(f"{path} is not there: run the step judge")
    rows = [row for row in read_rows(path) if benchmark.judging.model_of(row) == job.name]
    now = answer_hashes(benchmark, answers)
    told = {benchmark.id_of(row): row[OURS]["answer_sha256"] for row in rows if OURS in row}
    other = sum(now.get(id_) != sha256 for id_, sha256 in told.items())
    if other:
        raise InputError(f"{path}: {other} questions were judged with other answers; run the step judge")
    return rows


def _canary_results(job: Job, benchmark: Benchmark, judge: Judge) -> dict[str, CanaryResult]:
    assert benchmark.judging is not None
    judging, path = benchmark.judging, canary_path(job, benchmark, judge)
    if not job.settings.canaries or not path.exists():
        return {}
    rows = read_rows(path)
    return {
        name: canary_result(
            [worth for row in rows if judging.model_of(row) == name for worth in judging.worths(row)],
            judging.unit,
        )
        for name in canary_answers(judging.forged)
    }


def _unofficial(settings: Evaluation, benchmark: Benchmark) -> tuple[str, ...]:
    """What of the settings makes a score another than the published kind."""
    notes = {
        "the first {} questions only": settings.limit,
        "answered at temperature {:g}": None if benchmark.own_temperature else settings.temperature,
        "answers of at most {} tokens": settings.max_new_tokens,
    }
    return tuple(note.format(value) for note, value in notes.items() if value is not None)


def show_scores(found: Sequence[Scores], console: Console) -> None:
    """Every measure with its interval, and what has no score."""
    from rich.table import Table

    for scores in found:
        identity = scores.identity
        category = identity.settings.get("category")
        table = Table("measure", f"value ({scores.unit})", "interval", "n")
        for name, measure in scores.measures.items():
            interval = "" if measure.lower is None else f"{measure.lower:.2f} to {measure.upper:.2f}"
            if measure.standard_error is not None:
                interval = f"± {measure.standard_error:.2f} (s.e.)"
            table.add_row(name, f"{measure.value:.2f}", interval, str(measure.n))
        console.print(f"{identity.benchmark}{f' {category}' if category else ''}: {scores.model}")
        console.print(table)
        if identity.judge:
            against = f", against {identity.baseline}" if identity.baseline else ""
            console.print(f"judge {identity.judge}{against}")
        if scores.unscored:
            reasons = most_common(item.reason for item in scores.unscored)
            console.print(f"{len(scores.unscored)} items without a score; most often: {reasons}")
        for note in scores.notes:
            console.print(f"unofficial: {note}")
