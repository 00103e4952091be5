"""A model's answers to a benchmark's questions, in the benchmark's own file format, resumable at any point."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.evaluation.answerers import Answerer, Ask, Turn
from slimepo.files import append_json_lines, json_lines
from slimepo.types import Message

if TYPE_CHECKING:
    from rich.console import Console

# Where our own facts stand in a row of an upstream file.
OURS = "slimepo"

MakeRow = Callable[["Question", Sequence[Turn], dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """One question: its user turns and how it is answered; `row` is the benchmark's own row."""

    id: str
    row: Mapping[str, Any]
    turns: Sequence[str]
    temperature: float
    max_new_tokens: int


def answer_questions(
    questions: Sequence[Question],
    answerer: Answerer,
    path: Path,
    row_of: MakeRow,
    id_of: Callable[[Mapping[str, Any]], str],
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
    from rich.progress import Progress

    rows = {id_of(row): row for row in json_lines(path, strict=True)}
    how = {**answerer.identity, "system": system, "seed": seed}
    for row in rows.values():
        _same_way(row, how, path)
    same_questions(questions, rows, path)
    failures: list[str] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("answers", total=len(questions))
        for start in range(0, len(questions), answerer.chunk):
            chunk = questions[start : start + answerer.chunk]
            missing = [question for question in chunk if question.id not in rows]
            progress.advance(task, len(chunk) - len(missing))
            if not missing:
                continue
            again = missing if how["backend"] == "endpoint" else chunk
            turns = _converse(again, answerer, system, seed)
            made = []
            for question, said in zip(again, turns, strict=True):
                failures += [turn.stop for turn in said if turn.failed]
                if question.id not in rows and not any(turn.failed for turn in said):
                    made.append(row_of(question, said, how))
            append_json_lines(path, made)
            rows |= {id_of(row): row for row in made}
            progress.advance(task, len(missing))
    if failures:
        kept = f"; the others are in {path}" if rows else ""
        raise InputError(f"{len(failures)} answers could not be had ({failures[0]}){kept}: run again")
    return [rows[question.id] for question in questions]


def facts(question: Question, turns: Sequence[Turn], how: Mapping[str, Any]) -> dict[str, Any]:
    """Our own part of a row: token counts and stop reasons turn by turn, and how the answer was made."""
    return {
        "turns": [{"tokens": t.tokens, "prompt_tokens": t.prompt_tokens, "stop": t.stop} for t in turns],
        "temperature": question.temperature,
        "max_new_tokens": question.max_new_tokens,
        **how,
    }


def summary_line(rows: Sequence[Mapping[str, Any]]) -> str:
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
    return f"answers: {len(rows)} questions, ended by: {ends}{length}{none}"


def question_seed(seed: int, question_id: str, turn: int) -> int:
    """The seed of one answer: it depends on nothing but the run's seed, the question and the turn. 31 bits."""
    digest = hashlib.sha256(f"{seed}/{question_id}/{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def answer_id(question_id: str, turns: Sequence[Turn]) -> str:
    """A name for an answer, from its content."""
    text = "\0".join([question_id, *(turn.text for turn in turns)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:22]


def now() -> float:
    return time.time()


def _converse(
    questions: Sequence[Question], answerer: Answerer, system: str | None, seed: int
) -> list[list[Turn]]:
    """All turns of some questions: first turns together, then second turns."""
    start: list[Message] = [Message(role="system", content=system)] if system else []
    talks = [list(start) for _ in questions]
    said: list[list[Turn]] = [[] for _ in questions]
    for number in range(max(len(question.turns) for question in questions)):
        places = [
            i
            for i, question in enumerate(questions)
            if number < len(question.turns) and not any(turn.failed for turn in said[i])
        ]
        for i in places:
            talks[i].append(Message(role="user", content=questions[i].turns[number]))
        asks = [
            Ask(
                talks[i],
                questions[i].temperature,
                questions[i].max_new_tokens,
                question_seed(seed, questions[i].id, number),
            )
            for i in places
        ]
        for i, turn in zip(places, answerer.answer(asks, lambda _: None), strict=True):
            said[i].append(turn)
            talks[i].append(Message(role="assistant", content=turn.text))
    return said


def _same_way(row: Mapping[str, Any], how: Mapping[str, Any], path: Path) -> None:
    # Rows without our part were made elsewhere and are taken as they are.
    before = row.get(OURS)
    if before is None:
        return
    for name, value in how.items():
        if before.get(name) != value:
            raise InputError(
                f"{path}: its answers were made with {name} {before.get(name)!r}, now it is {value!r}; "
                "give another --name or --out, or delete the file"
            )


def same_questions(questions: Sequence[Question], rows: Mapping[str, Any], path: Path) -> None:
    """Nothing, where our answers were made with the temperature and limit that are asked for now.

    Raises:
        InputError: one was made otherwise.
    """
    for question in questions:
        before = rows.get(question.id, {}).get(OURS)
        for name in ("temperature", "max_new_tokens"):
            if before is not None and before[name] != getattr(question, name):
                raise InputError(
                    f"{path}: question {question.id} was answered with {name} {before[name]}, now it is "
                    f"{getattr(question, name)}; give --{name.replace('_', '-')} as before, another --name or --out, "
                    "or delete the file"
                )
