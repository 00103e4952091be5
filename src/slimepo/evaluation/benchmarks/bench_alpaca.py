"""AlpacaEval 2 as it is run: its files, its instructions, its baseline, and what the judge is asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimepo.evaluation.answerers import Turn
from slimepo.evaluation.answers import OURS, Question, facts
from slimepo.evaluation.benchmarks import alpaca_eval
from slimepo.evaluation.benchmarks.alpaca_length import LengthData, length_data
from slimepo.evaluation.benchmarks.base import Answers, Replies, given, given_baseline, variant_of
from slimepo.evaluation.benchmarks.sources import Fetched, fetch
from slimepo.evaluation.judge.many import FollowUp
from slimepo.evaluation.judge.request import JudgeRequest, Scores, sha256_of
from slimepo.evaluation.rows import Row, field, read_rows
from slimepo.evaluation.settings import Evaluation

BASELINE = "alpaca_eval/baseline_gpt4_1106_preview.model_outputs.json"
# Upstream leaves this to each model's own configuration; 2048 is what most of those have.
ANSWER_TOKENS = 2048


@dataclass(frozen=True)
class AlpacaEval:
    """805 instructions, each output compared with the baseline's once."""

    files: Sequence[Fetched]
    questions: Sequence[Question]
    variant: str
    baseline: Sequence[Row]
    template: str
    lengths: LengthData | None
    notes: tuple[str, ...]
    folder: str = "alpaca_eval"
    follow_up: FollowUp | None = None
    answers_list: bool = True

    def cut(self, questions: Sequence[Question]) -> AlpacaEval:
        return replace(self, questions=questions)

    def answers_file(self, name: str) -> str:
        return f"{name}/model_outputs.jsonl"

    def judgments_file(self, name: str, judge: str) -> str:
        return f"{name}/{judge}/annotations.json"

    def id_of(self, row: Row) -> str:
        return str(row["instruction"])

    def model_of(self, row: Row) -> str:
        return str(row["generator_2"])

    def answer_row(self, name: str, question: Question, turns: Sequence[Turn], how: Row) -> dict[str, Any]:
        return {
            "dataset": question.row.get("dataset"),
            "instruction": question.row["instruction"],
            "output": turns[0].text,
            "generator": name,
            OURS: facts(question, turns, how),
        }

    def requests(self, answers: Answers) -> list[JudgeRequest]:
        return [
            request
            for rows in answers.values()
            for request in alpaca_eval.judge_requests(rows, self._shared(rows), template=self.template)
        ]

    def judgments(
        self, answers: Answers, requests: Sequence[JudgeRequest], replies: Replies, judge: str
    ) -> list[dict[str, Any]]:
        return [
            row
            for rows in answers.values()
            for row in alpaca_eval.annotation_rows(rows, self._shared(rows), replies, judge)
        ]

    def scores(self, rows: Sequence[Row]) -> list[Scores]:
        found = alpaca_eval.score(rows, length_data=self.lengths, prompts=sha256_of(self.template))
        return [
            replace(s, official=s.official and not self.notes, notes=(*s.notes, *self.notes))
            for s in found.values()
        ]

    def worths(self, row: Row) -> list[float]:
        return [] if row["preference"] is None else [100 * (row["preference"] - 1)]

    def _shared(self, rows: Sequence[Row]) -> list[Row]:
        """The baseline's rows to the instructions of `rows`."""
        wanted = {row["instruction"] for row in rows}
        return [row for row in self.baseline if row["instruction"] in wanted]


def load_alpaca_eval(
    settings: Evaluation, out: Path, judged: bool, awaited: Collection[str] = ()
) -> AlpacaEval:
    data_dir = settings.data_dir
    asked = fetch(BASELINE, data_dir=data_dir)
    rows = read_rows(asked.file)[: settings.limit]
    questions = [
        Question(
            row["instruction"],
            row,
            [row["instruction"]],
            given(settings.temperature, 0.0),
            given(settings.max_new_tokens, ANSWER_TOKENS),
        )
        for row in rows
    ]
    if not judged:
        return AlpacaEval((asked,), questions, "", (), "", None, ())
    prompt = fetch("alpaca_eval/alpaca_eval_clf.txt", data_dir=data_dir)
    gamed = fetch("alpaca_eval/df_gamed.csv", "alpaca_eval/df_gamed_surrogate.csv", data_dir=data_dir)
    # Difficulties go by position, and belong to the official baseline.
    fits = settings.limit is None and settings.baseline is None
    notes = () if fits else ("no length control: it needs all instructions and the official baseline",)
    if fits and gamed.check == "derived":
        notes = ("length control with a stand-in for upstream's df_gamed.csv",)
    variant = variant_of(settings)
    baseline: Sequence[Row] = rows
    if settings.baseline is not None:
        name, baseline = given_baseline(
            settings.baseline,
            out / "alpaca_eval",
            "generator",
            questions,
            lambda row: str(field(row, "instruction", "an AlpacaEval output")),
            awaited,
        )
        variant = variant_of(settings, name)
    return AlpacaEval(
        (asked, prompt, gamed),
        questions,
        variant,
        baseline,
        prompt.file.read_text(encoding="utf-8"),
        length_data(read_rows(gamed.file)) if fits else None,
        notes,
    )
