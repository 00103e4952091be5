"""MT-Bench: prompts to the byte, ratings, plain means, against published judgments and by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.benchmarks import mt_bench
from slimepo.evaluation.judge.request import JudgeReply, Unscored
from slimepo.evaluation.rows import read_rows

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["1+1?", "2+2?"]},
]
TEMPLATES = mt_bench.templates_by_name(
    [
        {
            "name": name,
            "system_prompt": "Judge.",
            "prompt_template": prompt,
            "output_format": "[[rating]]",
        }
        for name, prompt in {
            "single-v1": "Q {question} A {answer}",
            "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
            "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
            "single-math-v1-multi-turn": "{question_1}|{ref_answer_1}|{answer_1}|"
            "{question_2}|{ref_answer_2}|{answer_2}",
        }.items()
    ]
)


def said(question: int, *turns: str) -> dict[str, Any]:
    return {"question_id": question, "choices": [{"index": 0, "turns": list(turns)}]}


ANSWERS = {"ours": [said(1, "a{x}", "b"), said(101, "2", "4")]}
REFERENCES = [said(101, "two", "four")]


def judged(
    question: int, turn: int, score: float, model: str = "ours", judge: str = "gpt-4"
) -> dict[str, Any]:
    return {
        "question_id": question,
        "model": model,
        "judge": [judge, "single-v1"],
        "judgment": "",
        "score": score,
        "turn": turn,
    }


@pytest.fixture(scope="module")
def folder(official_data: Path) -> Path:
    return official_data / "eval" / "mt_bench"


@pytest.fixture(scope="module")
def judgments(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "judgments" / "gpt-4_single.jsonl.gz")


def test_prompts_are_those_of_the_published_judgments(folder: Path, judgments: list[dict[str, Any]]) -> None:
    requests = mt_bench.judge_requests(
        read_rows(folder / "question.jsonl"),
        {f.name.removesuffix(".jsonl.gz"): read_rows(f) for f in (folder / "model_answer").iterdir()},
        templates=mt_bench.templates_by_name(read_rows(folder / "judge_prompts.jsonl")),
        references=read_rows(folder / "reference_answer" / "gpt-4.jsonl"),
    )
    ours = {(r.question_id, r.model, r.part): (r.template, r.messages[1]["content"]) for r in requests}
    theirs = {
        (str(j["question_id"]), j["model"], f"turn-{j['turn']}"): (j["judge"][1], j["user_prompt"])
        for j in judgments
    }
    assert len(theirs) == 800
    assert ours == theirs


def test_every_published_judgment_is_read_as_recorded(judgments: list[dict[str, Any]]) -> None:
    ratings = [mt_bench.parse_score(j["judgment"]) for j in judgments]
    assert ratings == [j["score"] for j in judgments]
    assert [type(r) for r in ratings] == [type(j["score"]) for j in judgments]


def test_means_are_the_published_ones(folder: Path, judgments: list[dict[str, Any]]) -> None:
    scores = mt_bench.score(judgments, questions=read_rows(folder / "question.jsonl"))
    expected = json.loads((folder / "expected.json").read_text())["models"]
    assert scores.keys() == expected.keys()
    for model, figures in expected.items():
        measures = scores[model].measures
        assert [measures[m].value for m in ("turn-1", "turn-2", "overall")] == [
            figures[m] for m in ("turn1", "turn2", "overall")
        ]
        assert scores[model].unscored == ()


def test_rows_are_written_as_published(folder: Path, judgments: list[dict[str, Any]]) -> None:
    requests = mt_bench.judge_requests(
        read_rows(folder / "question.jsonl"),
        {"llama2_7b": read_rows(folder / "model_answer" / "llama2_7b.jsonl.gz")},
        templates=mt_bench.templates_by_name(read_rows(folder / "judge_prompts.jsonl")),
        references=read_rows(folder / "reference_answer" / "gpt-4.jsonl"),
    )
    published = {(j["question_id"], j["turn"]): j for j in judgments if j["model"] == "llama2_7b"}
    replies = {
        r.key: [JudgeReply(published[int(r.question_id), int(r.part[-1])]["judgment"])] for r in requests
    }
    rows = mt_bench.judgment_rows(requests, replies, "gpt-4")
    for row in rows:
        theirs = published[row["question_id"], row["turn"]]
        assert row | {"tstamp": theirs["tstamp"]} == theirs
    assert len(rows) == 160


def test_the_second_turn_shows_both_and_math_shows_the_reference() -> None:
    requests = mt_bench.judge_requests(QUESTIONS, ANSWERS, templates=TEMPLATES, references=REFERENCES)
    assert {(r.question_id, r.part): r.messages[1]["content"] for r in requests} == {
        ("1", "turn-1"): "Q Write. A a{x}",
        ("101", "turn-1"): "Q 1+1? R two A 2",
        ("1", "turn-2"): "Write.|a{x}|Again.|b",
        ("101", "turn-2"): "1+1?|two|2|2+2?|four|4",
    }
    assert {r.sampling for r in requests} == {mt_bench.JUDGE_SAMPLING}
    assert len({r.key for r in requests}) == 4


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="ours has no answer to MT-Bench question 101"):
        mt_bench.judge_requests(
            QUESTIONS, {"ours": ANSWERS["ours"][:1]}, templates=TEMPLATES, references=REFERENCES
        )
    with pytest.raises(InputError, match=r"question 101 .* has no reference"):
        mt_bench.judge_requests(QUESTIONS, ANSWERS, templates=TEMPLATES, references=[])
    with pytest.raises(InputError, match="no turn 2"):
        mt_bench.judge_requests(
            QUESTIONS[:1], {"ours": [said(1, "a")]}, templates=TEMPLATES, references=REFERENCES
        )
    with pytest.raises(InputError, match="no template 'single-math-v1'"):
        mt_bench.templates_by_name([{"name": "single-v1", "output_format": "[[rating]]"}])


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[8]]", 8),
        ("[[7.5]] and then [[3]]", 7.5),
        ("see [1], so [[9]]", 9),
        ("Rating: [6]", 6),
        ("[2] better than [4]", 2),
        ("[[10.]]", 10.0),
        ("[[ 5 ]] [[5/10]] [3]", 3),
        ("[[0]]", 0),
        ("[[100]]", 100),
    ],
)
def test_ratings(text: str, rating: float) -> None:
    assert mt_bench.parse_score(text) == rating


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Rating: 8/10", "no [[rating]]"),
        ("", "said nothing"),
        ("[[five]]", "no [[rating]]"),
        ("[[08]]", "'08' is no number"),
        ("[[" + "9" * 5000 + "]]", "is no number"),
        ("[[9" + "0" * 20 + "]]", "means anything"),
        ("[[٥]]", "is no number"),
        ("[[-3]]", "no [[rating]]"),
    ],
)
def test_what_is_no_rating_is_unscored_with_its_reason(text: str, reason: str) -> None:
    rating = mt_bench.parse_score(text)
    assert isinstance(rating, Unscored)
    assert reason in rating.reason


@given(st.text(), st.integers(0, 10), st.text())
def test_the_first_double_bracket_wins(before: str, n: int, after: str) -> None:
    assert mt_bench.parse_score(before.replace("[", "") + f"[[{n}]]" + after) == n


@given(st.text(alphabet="[]0123456789. ab\n٥"))
def test_any_text_has_a_rating_or_a_reason(text: str) -> None:
    rating = mt_bench.parse_score(text)
    bracketed = [part.split("]")[0] for part in text.split("[")[1:] if "]" in part]
    if isinstance(rating, Unscored):
        assert rating.reason
    else:
        assert rating in [
            float(b) for b in bracketed if set(b) <= set("0123456789.") and b.count(".") < 2 and b
        ]


def test_means_by_hand() -> None:
    rows = [judged(1, 1, 8), judged(1, 2, 5), judged(101, 1, 2), judged(101, 2, -1)]
    scores = mt_bench.score(rows, questions=QUESTIONS)["ours"]
    # The failed judgment is no zero: (8 + 5 + 2) / 3.
    assert {name: m.value for name, m in scores.measures.items()} == {
        "overall": 5.0,
        "turn-1": 5.0,
        "turn-2": 5.0,
        "category/writing": 6.5,
        "category/math": 2.0,
    }
    assert scores.scored == 3
    assert scores.unscored == (Unscored("the judge said nothing", "101/turn-2"),)
    assert mt_bench.category_table([scores]) == [
        {"model": "ours", "writing": 6.5, "math": 2.0, "turn-1": 5.0, "turn-2": 5.0, "overall": 5.0}
    ]
    other = replace(scores, identity=replace(scores.identity, judge="other"))
    with pytest.raises(InputError, match="not scored alike: judge"):
        mt_bench.category_table([scores, other])


def test_failed_and_missing_judgments_are_unscored() -> None:
    requests = mt_bench.judge_requests(QUESTIONS, ANSWERS, templates=TEMPLATES, references=REFERENCES)
    replies = {
        "mt-bench/ours/1/turn-1": [JudgeReply("Fine. [[7]]")],
        "mt-bench/ours/1/turn-2": [JudgeReply("", error="the judge timed out")],
        "mt-bench/ours/101/turn-1": [JudgeReply("I would not say.")],
    }
    rows = mt_bench.judgment_rows(requests, replies, "local")
    assert [(row["question_id"], row["turn"], row["score"]) for row in rows] == [
        (1, 1, 7),
        (101, 1, -1),
        (1, 2, -1),
    ]
    scores = mt_bench.score(rows, questions=QUESTIONS, templates=TEMPLATES, references=REFERENCES)["ours"]
    assert scores.measures["overall"].value == 7
    assert {u.item: u.reason for u in scores.unscored} == {
        "101/turn-1": "no [[rating]] in the judge's text",
        "1/turn-2": "the judge timed out",
        "101/turn-2": "not judged",
    }


def test_repeated_rows_and_strange_ratings_count_and_are_said() -> None:
    rows = [judged(1, 1, 8), judged(1, 1, 8), judged(1, 2, 90)]
    notes = mt_bench.score(rows, questions=QUESTIONS)["ours"].notes
    assert "1 ratings are outside 1 to 10" in notes[0]
    assert "1 rows repeat a turn" in notes[1]


def test_mixed_judges_and_foreign_questions_are_refused() -> None:
    with pytest.raises(InputError, match="different judges"):
        mt_bench.score([judged(1, 1, 8), judged(1, 2, 8, judge="other")], questions=QUESTIONS)
    with pytest.raises(InputError, match="question 7, which is not in"):
        mt_bench.score([judged(7, 1, 8)], questions=QUESTIONS)
    with pytest.raises(UnscoredError, match="no judgment of ours holds a rating"):
        mt_bench.score([judged(1, 1, -1)], questions=QUESTIONS)


def test_a_null_is_no_rating_and_a_missing_field_is_named() -> None:
    rows = [judged(1, 1, 8), judged(1, 2, 5) | {"score": None}]
    scores = mt_bench.score(rows, questions=QUESTIONS)["ours"]
    assert scores.measures["overall"] == scores.measures["turn-1"]
    assert scores.unscored[0].item == "1/turn-2"
    with pytest.raises(InputError, match=r"MT-Bench judgment 1 has no 'turn' \(it has judge"):
        mt_bench.score([{k: v for k, v in rows[0].items() if k != "turn"}], questions=QUESTIONS)


def test_temperatures_of_the_categories() -> None:
    assert mt_bench.TEMPERATURES == {
        "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
        "humanities": 0.1,
    }  # fmt: skip


def test_an_answer_row_is_read_back() -> None:
    row = mt_bench.answer_row("ours", QUESTIONS[0], ["a", "b"])
    requests = mt_bench.judge_requests(QUESTIONS[:1], {"ours": [row]}, templates=TEMPLATES, references=[])
    assert requests[1].messages[1]["content"] == "Write.|a|Again.|b"


def test_where_no_call_succeeded_the_reason_is_the_calls() -> None:
    row = {
        "question_id": 81,
        "model": "m",
        "judge": ["j", "single-v1"],
        "turn": 1,
        "score": -1,
        "judgment": "",
    }
    question = {"question_id": 81, "category": "writing", "turns": ["a", "b"]}
    with pytest.raises(UnscoredError, match="no connection"):
        mt_bench.score([row | {"unscored": "no connection"}], questions=[question])
