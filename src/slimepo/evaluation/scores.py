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
    chosen, notes, facts = _how(job.settings, benchmark, judge, answers, judgments)
    if benchmark.together is not None and judge is not None:
        made = benchmark.together(answers, judgments, _others(job, benchmark, judge, console))
    else:
        made = benchmark.scores(answers, judgments)
    found = [
        replace(
            scores,
            model=scores.model or job.name,
            identity=replace(scores.identity, settings={**scores.identity.settings, **chosen}),
            official=scores.official and not notes,
            notes=(*scores.notes, *notes, *facts),
        )
        for scores in made
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


def _others(job: Job, benchmark: Benchmark, judge: Judge, console: Console) -> list[tuple[Answers, Answers]]:
    """Answers and judgments of the folder's other models under the same judge, where these belong together."""
    found: list[tuple[Answers, Answers]] = []
    for path in sorted(judgments_path(job, benchmark, judge).parent.glob("*.jsonl")):
        other = replace(job, name=path.stem)
        if other.name == job.name or other.name in benchmark.against:
            continue
        try:
            answers = answers_of(other, benchmark)
            if judgments := _judgments(other, benchmark, judge, answers):
                found.append((answers, judgments))
        except InputError as error:
            console.print(f"{other.name} is left out of the fit: {error}")
    return found


def _how(
    settings: Evaluation, benchmark: Benchmark, judge: Judge | None, answers: Answers, judgments: Answers
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What of an evaluation is part of its identity; what makes it unlike the published kind; what else to know."""
    made = [row[OURS] for row in answers if OURS in row]
    of_answers = {part for how in made for turn in how["turns"] for part in turn.get("without", ())}
    of_judge = {part for row in judgments for part in row.get(OURS, {}).get("without", ())}
    system = next((how["system"] for how in made if how.get("system")), None)
    chosen = {
        "system": system,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "answered without": sorted(of_answers),
        "judged without": sorted(of_judge),
    }
    own = None if benchmark.own_temperature else settings.temperature
    notes = [f"the first {settings.limit} questions only"] if settings.limit is not None else []
    notes += [f"answered at temperature {own:g}"] if own is not None else []
    limit = settings.max_new_tokens
    notes += [f"answers of at most {limit} tokens"] if limit is not None else []
    notes += [f"answered after the system message {system!r}"] if system else []
    notes += [f"{who} takes no {part}" for who, parts in (("the model", of_answers), ("the judge", of_judge))
              for part in sorted(parts)]  # fmt: skip
    if judge is not None and benchmark.judges and not _published(judge, benchmark):
        notes.append(f"judged by {judge.name}; published figures by {' or '.join(benchmark.judges)}")
    notes += [f"compared with {benchmark.baseline}"] if benchmark.baseline else []
    references = Evaluation.model_fields["references"].default
    notes += [f"references by {settings.references}"] if settings.references != references else []
    aloud = sum("thoughts" in turn for how in made for turn in how["turns"])
    thought = max((row.get(OURS, {}).get("thought", 0) for row in judgments), default=0)
    facts = [f"{aloud} turns of the model thought first, which nobody judged"] if aloud else []
    facts += [f"the judge thought aloud in {thought} replies; what stands behind counts"] if thought else []
    return {name: value for name, value in chosen.items() if value not in (None, [])}, notes, facts


def _published(judge: Judge, benchmark: Benchmark) -> bool:
    """Whether the judge is one of those that published figures were made with, at its maker's own address."""
    endpoint = judge.endpoint
    at_home = endpoint is not None and endpoint.base_url in ("", "https://api.openai.com/v1")
    return endpoint is not None and at_home and endpoint.model in benchmark.judges


def show_scores(found: Sequence[Scores], console: Console) -> None:
    """Every measure with its interval, and what has no score."""
    from rich.table import Table

    for scores in found:
        identity = scores.identity
        category = identity.settings.get("category")
        table = Table("measure", f"value ({scores.unit})", "interval", "n")
        apart = {name: measure for name, measure in scores.measures.items() if measure.unit}
        names = sorted(scores.measures.keys() - apart.keys(), key=[scores.headline, *scores.measures].index)
        for name, measure in ((name, scores.measures[name]) for name in names):
            interval = "" if measure.lower is None else f"{measure.lower:.2f} to {measure.upper:.2f}"
            if measure.standard_error is not None:
                interval = f"± {measure.standard_error:.2f} (s.e.)"
            table.add_row(name, f"{measure.value:.2f}", interval, str(measure.n))
        console.print(f"{identity.benchmark}{f' {category}' if category else ''}: {scores.model}")
        console.print(table)
        for name, measure in apart.items():
            console.print(f"{name.replace('_', ' ')}: {measure.value:,.0f} {measure.unit}")
        if identity.judge:
            against = f", against {identity.baseline}" if identity.baseline else ""
            console.print(f"judge {identity.judge}{against}")
        if scores.unscored:
            reasons = most_common(item.reason for item in scores.unscored)
            console.print(f"{len(scores.unscored)} items without a score; most often: {reasons}")
        for note in scores.notes:
            console.print(f"{'note' if scores.official else 'unofficial'}: {note}")
