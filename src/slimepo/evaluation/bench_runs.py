"""A benchmark from answers over judgments to a score file, each step by itself or all in turn."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.answerers import Turn, model_name, open_answerer
from slimepo.evaluation.bench_alpaca import load_alpaca_eval
from slimepo.evaluation.bench_answers import OURS, answer_questions, same_questions, summary_line
from slimepo.evaluation.bench_arena import ArenaHard, load_arena_hard, need_tokenizer
from slimepo.evaluation.bench_mt import load_mt_bench
from slimepo.evaluation.canaries import (
    CanaryResult,
    canary_answers,
    canary_places,
    canary_result,
    canary_words,
)
from slimepo.evaluation.endpoint import Retries, api_key
from slimepo.evaluation.journal import read_journal
from slimepo.evaluation.judge import Calls, Judge, Prices, estimate_line, judge_all, missing, open_judge
from slimepo.evaluation.kind import Kind
from slimepo.evaluation.libraries import need_libraries
from slimepo.evaluation.requests import Scores, most_common, refuse_unscored, scores_row, sha256_of
from slimepo.evaluation.rows import Row, read_rows, write_rows
from slimepo.evaluation.settings import Evaluation
from slimepo.evaluation.stages import JUDGE_CALLS
from slimepo.training.folder import versions, write_json

if TYPE_CHECKING:
    from rich.console import Console

Step = Literal["answer", "judge", "score"]
STEPS: tuple[Step, ...] = ("answer", "judge", "score")
# For the estimate of a dry run, where answers are still to be written.
GUESSED_CHARACTERS = 2000


@dataclass(frozen=True)
class Job:
    """One model on one benchmark; everything is filed under `name` in `out`."""

    settings: Evaluation
    model: str
    name: str
    out: Path

    @property
    def retries(self) -> Retries:
        return Retries(attempts=self.settings.attempts, timeout_s=self.settings.timeout)

    @property
    def prices(self) -> Prices:
        return Prices(self.settings.price_prompt, self.settings.price_completion)


def make_job(settings: Evaluation, model: str, out: Path, name: str | None = None) -> Job:
    """A job under the model's own name unless another is given."""
    name = name or model_name(model)
    if not re.fullmatch(r"[^/\\\s][^/\\\r\n]*", name) or name in (".", ".."):
        raise InputError(f"--name {name!r} cannot be a file name")
    return Job(settings, model, name, out)


def load_benchmark(settings: Evaluation, out: Path, *, judged: bool) -> Kind:
    """Fetch and read what a benchmark needs, the judge's part (prompts, references, baselines) only where `judged`.

    Raises:
        InputError: a file cannot be had, is not the pinned one, or names what is not there.
    """
    if settings.benchmark == "mt-bench":
        return load_mt_bench(settings, judged)
    if settings.benchmark == "arena-hard":
        return load_arena_hard(settings, out, judged)
    return load_alpaca_eval(settings, out, judged)


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
    judge = _judge(job) if judged else None
    if judge is not None and judge.endpoint is not None and "judge" in steps and not dry_run:
        api_key(judge.endpoint)
    if dry_run:
        _dry_run(job, kind, judge, steps, console)
        return []
    if judged and "score" in steps and isinstance(kind, ArenaHard):
        need_tokenizer(kind, _known_answers(job, kind))
    if "answer" in steps:
        _answer(job, kind, console)
    if judge is None:
        say(console, "no --judge: answers only")
        return []
    if "judge" in steps:
        _judge_answers(job, kind, judge, console)
    return _score(job, kind, judge, console) if "score" in steps else []


# --- answers -----------------------------------------------------------------------------------------


def _answer(job: Job, kind: Kind, console: Console) -> None:
    settings = job.settings
    path = _folder(job, kind) / kind.answers_file(job.name)
    known = _known_answers(job, kind)
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
            # AlpacaEval's own file is one JSON list; the journal beside it, which it names, is what a run goes on from.
            plain = [{**row, OURS: path.name} for row in read_journal(path)]
            _replace(path.with_suffix(".json"), plain)
    rows = _answers(job, kind)
    say(console, f"{summary_line(rows)} -> {path}")


def _known_answers(job: Job, kind: Kind) -> dict[str, dict[str, Any]]:
    """The rows that are there, by question: from our journal, else what others made in a file of upstream's form."""
    path = _folder(job, kind) / kind.answers_file(job.name)
    if not path.exists():
        path = path.with_suffix(".json")
        rows = read_rows(path) if path.exists() else []
        return {kind.id_of(row): row for row in rows if OURS not in row}
    return {kind.id_of(row): row for row in read_journal(path)}


def _answers(job: Job, kind: Kind) -> list[dict[str, Any]]:
    """The model's rows to the questions that are asked, in their order.

    Raises:
        InputError: some are missing, or were made with other settings than those given.
    """
    rows = _known_answers(job, kind)
    path = _folder(job, kind) / kind.answers_file(job.name)
    same_questions(kind.questions, rows, path)
    lacking = sum(question.id not in rows for question in kind.questions)
    if lacking:
        raise InputError(
            f"{path}: {lacking} of {len(kind.questions)} answers are missing; run the step answer"
        )
    return [rows[question.id] for question in kind.questions]


# --- judgments ---------------------------------------------------------------------------------------


def _judge(job: Job) -> Judge:
    assert job.settings.judge is not None
    return open_judge(job.settings.judge, job.settings.key_variable, job.retries)


def _calls(job: Job, judge: Judge) -> Calls:
    cache = job.out / JUDGE_CALLS / f"{file_label(judge.name)}.jsonl"
    return Calls(cache, job.settings.concurrency, job.retries, job.prices)


def _judge_answers(job: Job, kind: Kind, judge: Judge, console: Console) -> None:
    answers = {job.name: _answers(job, kind)}
    _say_own_judge(job, judge, console)
    requests = kind.requests(answers)
    some, canaries = _canaries(job, kind)
    fakes = some.requests(canaries) if canaries else []
    replies = judge_all(judge, [*requests, *fakes], _calls(job, judge), console, kind.follow_up)
    path = _judgments(job, kind, judge)
    judged_with = _answer_hashes(kind, answers[job.name])
    rows = kind.judgments(answers, requests, replies, judge.name)
    _file_rows(path, kind, [row | {OURS: {"answer_sha256": judged_with[kind.id_of(row)]}} for row in rows])
    if canaries:
        rows = some.judgments(canaries, fakes, replies, judge.name)
        _file_rows(_canary_file(job, kind, judge), kind, rows)
    say(console, f"judgments -> {path}")


def _answer_hashes(kind: Kind, answers: Sequence[Row]) -> dict[str, str]:
    """A hash of each answer by question, whenever and however it was made."""
    return {
        kind.id_of(row): sha256_of({k: v for k, v in row.items() if k not in (OURS, "tstamp")})
        for row in answers
    }


def _file_rows(path: Path, kind: Kind, rows: Sequence[Row]) -> None:
    """Write rows in place of those of the same models; MT-Bench's file holds all models of a judge."""
    ours = {kind.model_of(row) for row in rows}
    others = [row for row in read_rows(path) if kind.model_of(row) not in ours] if path.exists() else []
    _replace(path, [*others, *rows])


def _canaries(job: Job, kind: Kind) -> tuple[Kind, dict[str, Sequence[Row]]]:
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


# --- scores ------------------------------------------------------------------------------------------


def _score(job: Job, kind: Kind, judge: Judge, console: Console) -> list[Scores]:
    path = _judgments(job, kind, judge)
    if not path.exists():
        raise InputError(f"{path} is not there: run the step judge")
    rows = [row for row in read_rows(path) if kind.model_of(row) == job.name]
    answers = _answers(job, kind)
    _refuse_other_answers(kind, rows, answers, path)
    target = _score_file(job, kind, judge)
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
    now = _answer_hashes(kind, answers)
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
    from rich.markup import escape
    from rich.table import Table

    for scores in found:
        category = scores.identity.settings.get("category")
        title = f"{scores.identity.benchmark}{f' {category}' if category else ''}: {scores.model}"
        table = Table(
            "measure", f"value ({scores.unit})", "interval", "n", title=escape(title), title_justify="left"
        )
        for name, measure in scores.measures.items():
            interval = "" if measure.lower is None else f"{measure.lower:.2f} to {measure.upper:.2f}"
            if measure.standard_error is not None:
                interval = f"± {measure.standard_error:.2f} (s.e.)"
            table.add_row(name, f"{measure.value:.2f}", interval, str(measure.n))
        console.print(table)
        baseline = f", against {scores.identity.baseline}" if scores.identity.baseline else ""
        say(console, f"judge {scores.identity.judge}{baseline}")
        if scores.unscored:
            reasons = most_common(item.reason for item in scores.unscored)
            say(console, f"{len(scores.unscored)} items without a score; most often: {reasons}")
        for note in scores.notes:
            say(console, f"unofficial: {note}")


def _canary_results(job: Job, kind: Kind, judge: Judge) -> dict[str, CanaryResult]:
    path = _canary_file(job, kind, judge)
    if not job.settings.canaries or not path.exists():
        return {}
    rows = read_rows(path)
    results = {}
    for name in canary_answers(job.settings.benchmark):
        own = [row for row in rows if kind.model_of(row) == name]
        worths = [worth for row in own for worth in kind.worths(row)]
        results[name] = canary_result(job.settings.benchmark, worths)
    return results


# --- dry run -----------------------------------------------------------------------------------------


def _dry_run(job: Job, kind: Kind, judge: Judge | None, steps: Sequence[Step], console: Console) -> None:
    rows = _known_answers(job, kind)
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
    some, canaries = _canaries(job, kind)
    requests = [*kind.requests(answers), *(some.requests(canaries) if canaries else [])]
    to_make = missing(judge, requests, _calls(job, judge).cache)
    if to_answer:
        say(console, f"answers that are not there yet count as {GUESSED_CHARACTERS} characters a turn")
    say(console, estimate_line(requests, to_make, job.prices))


# --- files -------------------------------------------------------------------------------------------


def say(console: Console, text: str) -> None:
    """One line as it is: what judges and paths say is no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def file_label(name: str) -> str:
    """A judge's name as part of a file name."""
    return re.sub(r"[^\w.@+-]+", "-", re.sub(r"https?://", "", name)).strip("-")


def _folder(job: Job, kind: Kind) -> Path:
    return job.out / kind.folder


def _judgments(job: Job, kind: Kind, judge: Judge) -> Path:
    return _folder(job, kind) / kind.judgments_file(job.name, file_label(judge.name) + kind.variant)


def _score_file(job: Job, kind: Kind, judge: Judge) -> Path:
    style = "" if job.settings.style_control == "none" else f"--style-{job.settings.style_control}"
    name = f"{kind.folder}--{job.name}--{file_label(judge.name)}{kind.variant}{style}.json"
    return job.out / "scores" / name


def _canary_file(job: Job, kind: Kind, judge: Judge) -> Path:
    # Apart from the official files, whose readers would list the canaries as models.
    return _folder(job, kind) / "canaries" / f"{file_label(judge.name)}{kind.variant}.jsonl"


def _replace(path: Path, rows: Sequence[Row]) -> None:
    temporary = path.with_name(f".part.{path.name}")
    write_rows(temporary, rows)
    os.replace(temporary, path)
