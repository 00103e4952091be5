"""MT-Bench as it is run: its files, its questions, and what the judge is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimepo.evaluation.answerers import Turn
from slimepo.evaluation.answers import OURS, Question, answer_id, facts, now
from slimepo.evaluation.benchmarks import mt_bench
from slimepo.evaluation.benchmarks.base import Answers, Replies, given, variant_of
from slimepo.evaluation.benchmarks.sources import Fetched, fetch
from slimepo.evaluation.judge.many import FollowUp
from slimepo.evaluation.judge.request import JudgeRequest, Scores
from slimepo.evaluation.rows import Row, read_rows
from slimepo.evaluation.settings import Evaluation


@dataclass(frozen=True)
class MTBench:
    """80 questions of two turns, each turn graded 1 to 10 by itself."""

    files: Sequence[Fetched]
    questions: Sequence[Question]
    variant: str
    templates: Mapping[str, Row]
    references: Sequence[Row]
    folder: str = "mt_bench"
    follow_up: FollowUp | None = None
    answers_list: bool = False

    def cut(self, questions: Sequence[Question]) -> MTBench:
        return replace(self, questions=questions)

    def answers_file(self, name: str) -> str:
        return f"model_answer/{name}.jsonl"

    def judgments_file(self, name: str, judge: str) -> str:
        return f"model_judgment/{judge}_single.jsonl"

    def id_of(self, row: Row) -> str:
        return str(row["question_id"])

    def model_of(self, row: Row) -> str:
        return str(row["model"])

    def answer_row(self, name: str, question: Question, turns: Sequence[Turn], how: Row) -> dict[str, Any]:
        return mt_bench.answer_row(
            question.row,
            [turn.text for turn in turns],
            name,
            answer_id=answer_id(question.id, turns),
            tstamp=now(),
            **{OURS: facts(question, turns, how)},
        )

    def requests(self, answers: Answers) -> list[JudgeRequest]:
        rows = [q.row for q in self.questions]
        return mt_bench.judge_requests(rows, answers, templates=self.templates, references=self.references)

    def judgments(
        self, answers: Answers, requests: Sequence[JudgeRequest], replies: Replies, judge: str
    ) -> list[dict[str, Any]]:
        return mt_bench.judgment_rows(requests, replies, judge, tstamp=now())

    def scores(self, rows: Sequence[Row]) -> list[Scores]:
        questions = [q.row for q in self.questions]
        found = mt_bench.score(
            rows, questions=questions, templates=self.templates, references=self.references
        )
        return list(found.values())

    def worths(self, row: Row) -> list[float]:
        return [row["score"]] if row["score"] != -1 else []


def load_mt_bench(settings: Evaluation, judged: bool) -> MTBench:
    asked = fetch("mt_bench/question.jsonl", data_dir=settings.data_dir)
    questions = [
        Question(
            str(row["question_id"]),
            row,
            row["turns"],
            given(settings.temperature, mt_bench.temperature(row["category"])),
            given(settings.max_new_tokens, mt_bench.ANSWER_TOKENS),
        )
        for row in read_rows(asked.file)[: settings.limit]
    ]
    variant = variant_of(settings)
    if not judged:
        return MTBench((asked,), questions, variant, {}, ())
    prompts = fetch("mt_bench/judge_prompts.jsonl", data_dir=settings.data_dir)
    right = fetch(f"mt_bench/reference_answer/{settings.references}.jsonl", data_dir=settings.data_dir)
    templates = mt_bench.templates_by_name(read_rows(prompts.file))
    return MTBench((asked, prompts, right), questions, variant, templates, read_rows(right.file))
