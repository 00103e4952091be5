"""A model's answers to a benchmark's questions, in the benchmark's own file format, resumable at any point."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.evaluation.answerers import Answerer, Ask, Turn, open_answerer
from slimepo.evaluation.benchmarks.base import OURS, Answers, Baseline, Benchmark, Question
from slimepo.evaluation.job import Job, answers_path, locked
from slimepo.evaluation.judge.request import most_common, sha256_of
from slimepo.evaluation.rows import read_rows, write_rows
from slimepo.evaluation.settings import ANSWER_CALLS
from slimepo.files import append_json_lines, json_lines
from slimepo.terminal import counted
from slimepo.types import Message

if TYPE_CHECKING:
    from rich.console import Console


def write_answers(job: Job, benchmark: Benchmark, console: Console) -> None:
    """Answer what is not answered yet; answers of others to all questions are left as they are.

    Raises:
        InputError: others answered a part of the questions, ours were made in another way, or some cannot be had.
    """
    settings, questions = job.settings, benchmark.questions
    path = answers_path(job, benchmark)
    known = known_answers(job, benchmark)
    elsewhere = sum(q.id in known and OURS not in known[q.id] for q in questions)
    if 0 < elsewhere < len(questions):
        raise InputError(
            f"{path.with_suffix('')}: {elsewhere} of {len(questions)} answers are there and were made elsewhere; "
            "those of two models are not mixed: complete them, or give another --name"
        )
    if not elsewhere:
        journal = job.out / ANSWER_CALLS / f"{benchmark.folder}--{job.name}.jsonl"
        answerer = open_answerer(
            job.model,
            backend=settings.backend,
            dtype=settings.dtype,
            key_variable=settings.model_key_variable,
            concurrency=settings.concurrency,
            retries=job.retries,
            batch_rows=settings.batch_rows,
            journal=journal,
        )
        with locked(job.out, f"{benchmark.folder}--{job.name}", console):
            answer_questions(
                benchmark, job.name, answerer, path, console, system=settings.system, seed=settings.seed
            )
            if benchmark.answers_list:
                # Upstream's own file is one JSON list; a run goes on from the journal beside it, which it names.
                plain = [{**row, OURS: path.name} for row in json_lines(path, strict=True)]
                write_rows(path.with_suffix(".json"), plain)
            # All of it is in the answers' own file now.
            journal.unlink(missing_ok=True)
    console.print(f"{summary_line(answers_of(job, benchmark))} -> {path}")


def known_answers(job: Job, benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """The rows that are there, by question: from our journal, else what others made in a file of upstream's form."""
    path = answers_path(job, benchmark)
    if path.exists():
        return {benchmark.id_of(row): row for row in json_lines(path, strict=True)}
    path = path.with_suffix(".json")
    rows = read_rows(path) if path.exists() else []
    return {benchmark.id_of(row): row for row in rows if OURS not in row}


def answers_of(job: Job, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The model's rows to the questions that are asked, in their order.

    Raises:
        InputError: some are missing, or were made with other settings than those given.
    """
    rows = known_answers(job, benchmark)
    path = answers_path(job, benchmark)
    _refuse_other_limits(benchmark.questions, rows, path)
    lacking = sum(question.id not in rows for question in benchmark.questions)
    if lacking:
        raise InputError(
            f"{path}: {lacking} of {len(benchmark.questions)} answers are missing; run the step answer"
        )
    return [rows[question.id] for question in benchmark.questions]


def answer_hashes(benchmark: Benchmark, answers: Answers) -> dict[str, str]:
    """A hash of each answer by question, whenever and however it was made."""
    return {
        benchmark.id_of(row): sha256_of({k: v for k, v in row.items() if k not in (OURS, "tstamp")})
        for row in answers
    }


def read_baseline(text: str, out: Path, benchmark: Benchmark) -> Baseline:
    """Name and rows of `--baseline`: an answers file, or a model that has answered in `out`.

    Raises:
        InputError: there is neither, the rows name no model, or answers to some questions are missing.
    """
    folder = out / benchmark.folder
    answers = folder / benchmark.answers_file.format(model=text)
    places = (Path(text), answers, answers.with_suffix(".json"))
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        raise InputError(
            f"--baseline {text}: neither a file nor a model with answers in {folder}; let it answer first"
        )
    rows = read_rows(place)
    # AlpacaEval's rows name a generator, Arena-Hard's a model, in 2024 still by `model_id`.
    names = sorted({str(row.get("generator") or row.get("model") or row.get("model_id")) for row in rows})
    if len(names) != 1 or names == ["None"]:
        raise InputError(
            f"--baseline {place}: its rows must name one model; they name {', '.join(names) or 'none'}"
        )
    there = {benchmark.id_of(row) for row in rows}
    lacking = sum(question.id not in there for question in benchmark.questions)
    if lacking:
        raise InputError(
            f"--baseline {place}: answers to {lacking} of {len(benchmark.questions)} questions are missing"
        )
    return names[0], rows


def answer_questions(
    benchmark: Benchmark,
    model: str,
    answerer: Answerer,
    path: Path,
    console: Console,
    *,
    system: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Answer what `path` has no answer to yet and append it, chunk by chunk; all rows, in the questions' order.

    Chunks are the same in every run and a chunk that was cut short is answered again as a whole (but for endpoints,
    where every answer is paid for): what a row says does not depend on where a run was interrupted.

    Raises:
        InputError: the file's answers were made in another way (with what differs), or some questions could not be
            answered (another run tries them again).
    """
    questions = benchmark.questions
    rows = {benchmark.id_of(row): row for row in json_lines(path, strict=True)}
    how = {**answerer.identity, "system": system, "seed": seed}
    # Rows without our part were made elsewhere and are taken as they are.
    for before in (row[OURS] for row in rows.values() if OURS in row):
        for name, value in how.items():
            if before.get(name) != value:
                raise InputError(
                    f"{path}: its answers were made with {name} {before.get(name)!r}, now it is {value!r}; "
                    "give another --name or --out, or delete the file"
                )
    _refuse_other_limits(questions, rows, path)
    failures: list[str] = []
    with counted(console, "answers") as report:
        for start in range(0, len(questions), answerer.chunk):
            chunk = questions[start : start + answerer.chunk]
            missing = [question for question in chunk if question.id not in rows]
            again = missing if how["backend"] == "endpoint" or not missing else chunk
            made = []
            for question, turns in zip(again, _converse(again, answerer, system, seed), strict=True):
                failures += [turn.stop for turn in turns if turn.failed]
                if question.id not in rows and not any(turn.failed for turn in turns):
                    row = benchmark.answer_row(model, question.row, [turn.text for turn in turns])
                    limits = {"temperature": question.temperature, "max_new_tokens": question.max_new_tokens}
                    ends = [
                        {"tokens": t.tokens, "prompt_tokens": t.prompt_tokens, "stop": t.stop}
                        | ({"thoughts": t.thoughts} if t.thoughts else {})
                        | ({"without": list(t.without)} if t.without else {})
                        for t in turns
                    ]
                    made.append({**row, OURS: {"turns": ends, **limits, **how}})
            append_json_lines(path, made)
            rows |= {benchmark.id_of(row): row for row in made}
            report(start + len(chunk), len(questions))
    if failures:
        kept = f"; the others are in {path}" if rows else ""
        reasons = most_common(failure.removeprefix("failed: ") for failure in failures)
        more = ", or give --max-new-tokens more" if "finish_reason length" in reasons else ""
        raise InputError(f"{len(failures)} answers could not be had: {reasons}{kept}: run again{more}")
    return [rows[question.id] for question in questions]


def _converse(
    questions: Sequence[Question], answerer: Answerer, system: str | None, seed: int
) -> list[list[Turn]]:
    """All turns of some questions: first turns together, then second turns."""
    start: list[Message] = [Message(role="system", content=system)] if system else []
    talks = [list(start) for _ in questions]
    said: list[list[Turn]] = [[] for _ in questions]
    for number in range(max((len(question.turns) for question in questions), default=0)):
        asks: dict[int, Ask] = {}
        for i, question in enumerate(questions):
            if number < len(question.turns) and not any(turn.failed for turn in said[i]):
                talks[i].append(Message(role="user", content=question.turns[number]))
                own_seed = question_seed(seed, question.id, number)
                asks[i] = Ask(talks[i], question.temperature, question.max_new_tokens, own_seed)
        for i, turn in zip(asks, answerer.answer(list(asks.values())), strict=True):
            said[i].append(turn)
            talks[i].append(Message(role="assistant", content=turn.text))
    return said


def question_seed(seed: int, question_id: str, turn: int) -> int:
    """The seed of one answer: it depends on nothing but the run's seed, the question and the turn. 31 bits."""
    digest = hashlib.sha256(f"{seed}/{question_id}/{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def summary_line(rows: Answers) -> str:
    """How the answers ended and how long they are, as far as the rows say."""
    turns = [turn for row in rows for turn in row.get(OURS, {}).get("turns", [])]
    if not turns:
        return f"answers: {len(rows)}, made elsewhere"
    counts = {stop: sum(turn["stop"] == stop for turn in turns) for stop in {t["stop"] for t in turns}}
    ends = ", ".join(f"{count} {stop}" for stop, count in sorted(counts.items()))
    known = [turn["tokens"] for turn in turns if turn["tokens"] is not None]
    length = f", {sum(known) / len(known):.0f} tokens on average" if known else ""
    empty = sum(turn["tokens"] == 0 for turn in turns)
    none = f"; {empty} turns had no room for an answer" if empty else ""
    thought = sum("thoughts" in turn for turn in turns)
    aloud = f"; {thought} turns thought first, which is cut off" if thought else ""
    return f"answers: {len(rows)} questions, ended by: {ends}{length}{none}{aloud}"


def _refuse_other_limits(questions: Sequence[Question], rows: Mapping[str, Any], path: Path) -> None:
    for question in questions:
        before = rows.get(question.id, {}).get(OURS)
        for name in ("temperature", "max_new_tokens"):
            if before is not None and before[name] != getattr(question, name):
                raise InputError(
                    f"{path}: question {question.id} was answered with {name} {before[name]}, now it is "
                    f"{getattr(question, name)}; give --{name.replace('_', '-')} as before, another --name or --out, "
                    "or delete the file"
                )
