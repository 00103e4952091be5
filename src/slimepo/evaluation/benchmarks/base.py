"""What a benchmark has to say for itself so that it can be answered, judged and scored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from slimepo.errors import InputError
from slimepo.evaluation.answerers import Turn
from slimepo.evaluation.answers import Question
from slimepo.evaluation.benchmarks.sources import Fetched
from slimepo.evaluation.judge.many import FollowUp
from slimepo.evaluation.judge.request import JudgeReply, JudgeRequest, Scores
from slimepo.evaluation.rows import Row, read_rows
from slimepo.evaluation.settings import Evaluation

Answers = Mapping[str, Sequence[Row]]
Replies = Mapping[str, Sequence[JudgeReply]]


class Kind(Protocol):
    """One benchmark with its files read.

    `folder` is its place under --out, `variant` tells judgments of other choices apart (`variant_of`), `follow_up`
    names a second request of an item where the rules have one. `answers_list`: upstream's answers file is a JSON list
    (.json) beside our .jsonl. `worths` are the figures that one judgment row adds to a mean.
    """

    @property
    def folder(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def files(self) -> Sequence[Fetched]: ...
    @property
    def questions(self) -> Sequence[Question]: ...
    @property
    def follow_up(self) -> FollowUp | None: ...
    @property
    def answers_list(self) -> bool: ...

    def cut(self, questions: Sequence[Question]) -> Kind: ...
    def answers_file(self, name: str) -> str: ...
    def judgments_file(self, name: str, judge: str) -> str: ...
    def id_of(self, row: Row) -> str: ...
    def model_of(self, row: Row) -> str: ...
    def answer_row(
        self, name: str, question: Question, turns: Sequence[Turn], how: Row
    ) -> dict[str, Any]: ...
    def requests(self, answers: Answers) -> list[JudgeRequest]: ...
    def judgments(
        self, answers: Answers, requests: Sequence[JudgeRequest], replies: Replies, judge: str
    ) -> list[dict[str, Any]]: ...
    def scores(self, rows: Sequence[Row]) -> list[Scores]: ...
    def worths(self, row: Row) -> list[float]: ...


def given_baseline(
    text: str,
    folder: Path,
    key: str,
    questions: Sequence[Question],
    id_of: Callable[[Row], str],
    awaited: Collection[str] = (),
) -> tuple[str, list[dict[str, Any]]]:
    """Name and rows of `--baseline`: an answers file, or a model that has answered in the same folder.

    A model that is `awaited` may answer later and has no rows yet.

    Raises:
        InputError: there is neither, the rows name no model, or answers to some questions are missing.
    """
    places = [Path(text), folder / f"{text}.jsonl", folder / text / "model_outputs.json"]
    place = next((path for path in places if path.is_file()), None)
    if place is None and text in awaited:
        return text, []
    if place is None:
        raise InputError(
            f"--baseline {text}: neither a file nor a model with answers in {folder}; let it answer first"
        )
    rows = read_rows(place)
    # Upstream's answers of 2024 say `model_id`.
    names = sorted({str(row.get(key) or row.get("model_id")) for row in rows})
    if len(names) != 1 or names == ["None"]:
        raise InputError(
            f"--baseline {place}: its rows must name one {key}; they name {', '.join(names) or 'none'}"
        )
    there = {id_of(row) for row in rows}
    lacking = sum(question.id not in there for question in questions)
    if lacking:
        raise InputError(
            f"--baseline {place}: answers to {lacking} of {len(questions)} questions are missing"
        )
    return names[0], rows


def variant_of(settings: Evaluation, baseline: str | None = None) -> str:
    """What a judge's name in file names ends in, so that a trial or another choice replaces no other judgments."""
    parts = [
        baseline and f"vs-{baseline}",
        settings.references != "gpt-4" and f"references-{settings.references}",
        settings.category,
        settings.limit and f"first-{settings.limit}",
    ]
    return "".join(f"--{part}" for part in parts if part)


def given(value: Any, default: Any) -> Any:
    """`value`, or `default` where nothing was given."""
    return default if value is None else value
