"""What a benchmark says of itself: its questions, and the few functions that only it can know.

A benchmark is one module with two functions and one line in `settings.BENCHMARKS`:

    load_questions(settings) -> Benchmark                      what is asked, and how an answer is written down
    load_scoring(benchmark, settings, baseline) -> Benchmark   that with `scores`, and `judging` where a judge is asked

The second is called where there is a judge, or none is needed. Everything in both is plain data or a pure function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimepo.evaluation.benchmarks.sources import Fetched
from slimepo.evaluation.judge.request import FollowUp, JudgeReply, JudgeRequest, Scores
from slimepo.evaluation.rows import JsonObject
from slimepo.evaluation.settings import Evaluation

# Where our own facts stand in a row of an upstream file.
OURS = "slimepo"

# The name of a baseline of the user's own, and its answers.
Baseline = tuple[str, Sequence[JsonObject]]
Answers = Sequence[JsonObject]
Replies = Mapping[str, Sequence[JudgeReply]]


@dataclass(frozen=True)
class Question:
    """One question: its user turns and how it is answered; `row` is the benchmark's own row."""

    id: str
    row: JsonObject
    turns: Sequence[str]
    temperature: float
    max_new_tokens: int


def make_question(
    settings: Evaluation, row: JsonObject, id: str, turns: Sequence[str], *, temperature: float, limit: int
) -> Question:
    """A question with the benchmark's own temperature and `limit` of new tokens, unless the settings give others."""
    if settings.temperature is not None:
        temperature = settings.temperature
    return Question(id, row, turns, temperature, settings.max_new_tokens or limit)


@dataclass(frozen=True)
class Judging:
    """How answers become judgments.

    `file` is upstream's judgments file under the benchmark's folder, with {model} and {judge}. `requests(model,
    answers)` are the calls for these answers, which may be to a part of the questions. `judgments(answers, requests,
    replies, judge)` are rows of upstream's file, `model_of` says whose one is, `worths` its single ratings, or outcomes
    of its games, in `unit` ("1-10" or "%"). `forged` is an answer that imitates the judge's verdict, for the canaries.
    `follow_up` names a second request of an item where the rules have one.
    """

    file: str
    requests: Callable[[str, Answers], list[JudgeRequest]]
    judgments: Callable[[Answers, Sequence[JudgeRequest], Replies, str], list[dict[str, Any]]]
    model_of: Callable[[JsonObject], str]
    worths: Callable[[JsonObject], list[float]]
    unit: str
    forged: str
    follow_up: FollowUp | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark with its files read.

    `folder` is its place under --out, `answers_file` upstream's file in it, with {model}; where upstream has a JSON
    list (`answers_list`), that lies beside our .jsonl. `answer_row(model, question, turns)` is a row of it, `id_of`
    the question that a row of answers or judgments is about. `scores(answers, judgments)` are one model's, under the
    job's name where its rows have none; `ready` stops with an InputError where they will lack something (a library,
    say), given the answers known so far by question. `together(answers, judgments, others)` stands for `scores` where
    one model's depend on those of the other models of the folder, whose answers and judgments are given. `baseline`
    names one of the user's own, `against` all that it is compared with, `judges` those of the published figures.
    `own_temperature`: upstream leaves it to each model.
    """

    folder: str
    questions: Sequence[Question]
    files: Sequence[Fetched]
    answer_row: Callable[[str, JsonObject, Sequence[str]], dict[str, Any]]
    id_of: Callable[[JsonObject], str]
    answers_file: str = "model_answer/{model}.jsonl"
    answers_list: bool = False
    own_temperature: bool = False
    scores: Callable[[Answers, Sequence[JsonObject]], list[Scores]] | None = None
    ready: Callable[[Mapping[str, JsonObject]], None] = lambda _: None
    together: Callable[[Answers, Answers, Sequence[tuple[Answers, Answers]]], list[Scores]] | None = None
    judging: Judging | None = None
    baseline: str | None = None
    against: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()


def answer_id(question_id: str, turns: Sequence[str]) -> str:
    """A name for an answer, from its content."""
    text = "\0".join([question_id, *turns])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:22]
