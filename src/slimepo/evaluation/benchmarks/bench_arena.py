"""Arena-Hard as it is run: its files, its questions, its baselines, and what the judge is asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.evaluation.answerers import Turn
from slimepo.evaluation.answers import OURS, Question, answer_id, facts, now
from slimepo.evaluation.benchmarks import arena_hard
from slimepo.evaluation.benchmarks.arena_scores import battles_of
from slimepo.evaluation.benchmarks.arena_scores import score as arena_score
from slimepo.evaluation.benchmarks.arena_style import style_metadata
from slimepo.evaluation.benchmarks.base import Answers, Replies, given, given_baseline, variant_of
from slimepo.evaluation.benchmarks.sources import Fetched, fetch
from slimepo.evaluation.judge.many import FollowUp
from slimepo.evaluation.judge.request import JudgeRequest, Scores, sha256_of
from slimepo.evaluation.rows import Row, read_rows
from slimepo.evaluation.settings import Evaluation


@dataclass(frozen=True)
class ArenaHard:
    """500 or 750 questions, each answer compared with a baseline's in both orders."""

    files: Sequence[Fetched]
    questions: Sequence[Question]
    variant: str
    rules: arena_hard.Rules
    baselines: Mapping[str, tuple[str, Sequence[Row]]]
    prompts: Mapping[str, arena_hard.CategoryRules]
    template: str
    style_control: bool
    answers: Path
    answers_list: bool = False

    @property
    def folder(self) -> str:
        return arena_hard.BENCHMARKS[self.rules]

    @property
    def follow_up(self) -> FollowUp | None:
        return arena_hard.follow_up

    def cut(self, questions: Sequence[Question]) -> ArenaHard:
        return replace(self, questions=questions)

    def answers_file(self, name: str) -> str:
        return f"model_answer/{name}.jsonl"

    def judgments_file(self, name: str, judge: str) -> str:
        return f"model_judgment/{judge}/{name}.jsonl"

    def id_of(self, row: Row) -> str:
        return arena_hard.question_id(row)

    def model_of(self, row: Row) -> str:
        return str(row["model"])

    def answer_row(self, name: str, question: Question, turns: Sequence[Turn], how: Row) -> dict[str, Any]:
        return arena_hard.answer_row(
            question.row,
            turns[0].text,
            name,
            answer_id=answer_id(question.id, turns),
            tstamp=now(),
            **_style(turns[0].text),
            **{OURS: facts(question, turns, how)},
        )

    def requests(self, answers: Answers) -> list[JudgeRequest]:
        return arena_hard.judge_requests(
            [q.row for q in self.questions],
            answers,
            baselines=self.baselines,
            rules=self.rules,
            settings=self.prompts,
            template=self.template,
        )

    def judgments(
        self, answers: Answers, requests: Sequence[JudgeRequest], replies: Replies, judge: str
    ) -> list[dict[str, Any]]:
        return arena_hard.judgment_rows(requests, replies, judge)

    def scores(self, rows: Sequence[Row]) -> list[Scores]:
        if self.rules == "v0.1":
            return self._scores(rows, None, [q.row for q in self.questions], "arena-hard-v0.1")
        found = []
        for category in dict.fromkeys(str(q.row["category"]) for q in self.questions):
            asked = [q.row for q in self.questions if q.row["category"] == category]
            found += self._scores(rows, category, asked, category)
        return found

    def _scores(
        self, rows: Sequence[Row], category: str | None, asked: Sequence[Row], key: str
    ) -> list[Scores]:
        name, baseline_rows = self.baselines[key]
        rules = self.prompts[key]
        style: dict[str, Any] = {}
        if self.style_control:
            models = {name: baseline_rows} | {m: read_rows(self._answers_of(m)) for m in _models(rows)}
            style = {
                "style": {
                    model: {self.id_of(r): _metadata(r) for r in said} for model, said in models.items()
                },
            }
        found = arena_score(
            rows,
            rules=self.rules,
            baseline=name,
            category=category,
            questions=asked,
            prompts=sha256_of({"system": rules.system_prompt, "user": self.template}),
            **style,
        )
        return list(found.values())

    def _answers_of(self, model: str) -> Path:
        return self.answers / self.answers_file(model)

    def worths(self, row: Row) -> list[float]:
        return [100 * battle.outcome for battle in battles_of(row, self.rules)[0]]


def load_arena_hard(
    settings: Evaluation, out: Path, judged: bool, awaited: Collection[str] = ()
) -> ArenaHard:
    rules, data_dir = settings.rules, settings.data_dir
    asked = fetch(f"arena_hard/{rules}/question.jsonl", data_dir=data_dir)
    rows = read_rows(asked.file)
    known = list(dict.fromkeys(str(row["category"]) for row in rows))
    rows = [row for row in rows if settings.category in (None, row["category"])]
    if not rows:
        raise InputError(
            f"Arena-Hard {rules} has no category {settings.category!r}; it has {', '.join(known)}"
        )
    questions = [
        Question(
            arena_hard.question_id(row),
            row,
            [arena_hard.question_text(row)],
            given(settings.temperature, 0.0),
            given(settings.max_new_tokens, arena_hard.ANSWER_TOKENS),
        )
        for row in rows[: settings.limit]
    ]
    answers = out / arena_hard.BENCHMARKS[rules]
    if not judged:
        return ArenaHard((asked,), questions, "", rules, {}, {}, "", settings.style_control, answers)
    prompts = fetch(
        "arena_hard/config/judge_utils.py", "arena_hard/config/judge_settings.json", data_dir=data_dir
    )
    config = fetch(f"arena_hard/config/arena-hard-{rules}.yaml", data_dir=data_dir)
    system = arena_hard.read_judge_settings(prompts.file)
    categories = list(dict.fromkeys(str(q.row["category"]) for q in questions))
    baselines: dict[str, tuple[str, Sequence[Row]]] = {}
    files = [asked, prompts, config]
    if settings.baseline is not None:
        folder = answers / "model_answer"
        own = given_baseline(settings.baseline, folder, "model", questions, arena_hard.question_id, awaited)
        baselines = dict.fromkeys(categories, own)
        variant = variant_of(settings, own[0])
    else:
        for category in categories:
            name = system[category].baseline
            file = fetch(f"arena_hard/{rules}/answer.{name}.jsonl", data_dir=data_dir)
            baselines[category] = (name, read_rows(file.file))
            files.append(file)
        variant = variant_of(settings)
    template = arena_hard.read_prompt_template(config.file)
    return ArenaHard(
        files, questions, variant, rules, baselines, system, template, settings.style_control, answers
    )


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["model"]) for row in rows))


def _metadata(row: Row) -> Any:
    """Length and markdown of an answer: as its row has them, or counted now.

    Raises:
        InputError: the row has none, and gpt-4o's tokenizer is not at hand.
    """
    found = row["metadata"] if "metadata" in row else _style(arena_hard.answer_text(row)).get("metadata")
    if found is None:
        raise _no_tokenizer()
    return found


def need_tokenizer(kind: ArenaHard, known: Mapping[str, Row]) -> None:
    """Nothing, unless style control will have to count tokens, in answers to come, those `known` or the baseline's.

    Raises:
        InputError: it will, and gpt-4o's tokenizer is not at hand.
    """
    if not kind.style_control:
        return
    rows = [known.get(question.id, {}) for question in kind.questions]
    rows += [row for _, said in kind.baselines.values() for row in said]
    if not all("metadata" in row for row in rows) and _gpt_4o_tokenizer() is None:
        raise _no_tokenizer()


def _no_tokenizer() -> InputError:
    return InputError(
        "style control counts tokens as gpt-4o does: pip install tiktoken (it fetches its vocabulary once)"
    )


def _style(text: str) -> dict[str, Any]:
    """Length and markdown as upstream writes them, where gpt-4o's tokenizer is at hand."""
    encoding = _gpt_4o_tokenizer()
    if encoding is None:
        return {}
    return {"metadata": style_metadata(text, len(encoding.encode(text, disallowed_special=())))}


def _gpt_4o_tokenizer() -> Any:
    try:
        import tiktoken

        return tiktoken.get_encoding("o200k_base")
    except (ImportError, OSError):
        return None
