"""Arena-Hard's prompts, verdicts and files, under both rule sets."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks import arena_hard
from slimepo.evaluation.benchmarks.arena_hard import CategoryRules, Rules
from slimepo.evaluation.judge.request import JudgeReply, JudgeRequest, Unscored
from slimepo.evaluation.rows import read_rows

TEMPLATE = "Q {QUESTION} A {ANSWER_A} B {ANSWER_B}"
SETTINGS = {
    "hard_prompt": CategoryRules("base", "Judge."),
    "creative_writing": CategoryRules("muse", "Judge verse."),
}
QUESTIONS = [
    {"uid": "q1", "category": "hard_prompt", "prompt": "1+1?"},
    {"uid": "q2", "category": "creative_writing", "prompt": "Sing {a}."},
]


def answer(question: dict[str, str], text: str, model: str) -> dict[str, Any]:
    return arena_hard.answer_row(model, question, [text])


def requests_of(rules: Rules, questions: list[dict[str, str]] = QUESTIONS) -> list[JudgeRequest]:
    return arena_hard.judge_requests(
        questions,
        {"ours": [answer(q, f"ours {q['uid']}", "ours") for q in QUESTIONS]},
        baselines={
            "hard_prompt": ("base", [answer(QUESTIONS[0], "two", "base")]),
            "creative_writing": ("muse", [answer(QUESTIONS[1], "la", "muse")]),
        },
        rules=rules,
        settings=SETTINGS,
        template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def folder(official_data: Path) -> Path:
    return official_data / "eval" / "arena_hard"


@pytest.fixture(scope="module")
def sample(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "judgments_sample" / "gpt-4o_judge.126rows.jsonl.gz")


@pytest.mark.parametrize("rules", ["v0.1", "v2.0"])
def test_every_published_verdict_is_read_as_recorded(sample: list[dict[str, Any]], rules: Rules) -> None:
    games = [game for row in sample for game in row["games"]]
    assert len(games) == 252
    assert [arena_hard.parse_verdict(g["judgment"], rules) for g in games] == [g["score"] for g in games]


def test_the_published_prompts_are_made_from_their_own_parts(
    folder: Path, sample: list[dict[str, Any]]
) -> None:
    """Question and answers, cut out of the first game's prompt, give the second game's prompt to the byte."""
    template = arena_hard.read_prompt_template(folder / "config" / "arena-hard-v0.1.yaml")
    assert template == arena_hard.read_prompt_template(folder / "config" / "arena-hard-v2.0.yaml")
    settings = arena_hard.read_judge_settings(folder / "config" / "judge_settings.json")
    parts = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.*)", re.escape(template), flags=re.ASCII), re.DOTALL)
    category = "arena-hard-v0.1"
    for row in sample:
        found = parts.fullmatch(row["games"][0]["user_prompt"])
        assert found
        question = {"uid": row["question_id"], "category": category, "prompt": found["QUESTION"]}
        both = arena_hard.judge_requests(
            [question],
            {"ours": [answer(question, found["ANSWER_B"], "ours")]},
            baselines={category: ("base", [answer(question, found["ANSWER_A"], "base")])},
            rules="v0.1",
            settings=settings,
            template=template,
        )
        assert [r.messages[1]["content"] for r in both] == [g["user_prompt"] for g in row["games"]]


def test_both_published_answer_files_are_read(folder: Path) -> None:
    for version, model in (("v0.1", "gpt-4-0314"), ("v2.0", "o3-mini-2025-01-31")):
        questions = read_rows(folder / version / "question.jsonl.gz")
        answers = read_rows(folder / version / f"answer.{model}.jsonl.gz")
        assert {arena_hard.question_id(q) for q in questions} == {arena_hard.question_id(a) for a in answers}
        assert all(arena_hard.question_text(q) for q in questions)
        assert all(isinstance(arena_hard.answer_text(a), str) for a in answers)


def test_the_baseline_is_a_and_then_b_with_the_category_s_prompt() -> None:
    assert [
        (r.question_id, r.part, r.messages[0]["content"], r.messages[1]["content"], r.baseline, r.swapped)
        for r in requests_of("v2.0")
    ] == [
        ("q1", "game-1", "Judge.", "Q 1+1? A two B ours q1", "base", False),
        ("q1", "game-2", "Judge.", "Q 1+1? A ours q1 B two", "base", True),
        ("q2", "game-1", "Judge verse.", "Q Sing {a}. A la B ours q2", "muse", False),
        ("q2", "game-2", "Judge verse.", "Q Sing {a}. A ours q2 B la", "muse", True),
    ]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="ours has no answer to Arena-Hard question q3"):
        requests_of("v2.0", [{"uid": "q3", "category": "hard_prompt", "prompt": ""}])
    with pytest.raises(InputError, match="no judge prompt for the Arena-Hard category 'math'"):
        requests_of("v2.0", [{"uid": "q1", "category": "math", "prompt": ""}])
    with pytest.raises(InputError, match="base has no answer to Arena-Hard question q2"):
        requests_of("v2.0", [{"uid": "q2", "category": "hard_prompt", "prompt": ""}])
    with pytest.raises(InputError, match="neither uid nor question_id"):
        arena_hard.question_id({"id": 1})
    with pytest.raises(InputError, match="answer to q holds no text"):
        arena_hard.answer_text({"uid": "q", "choices": []})


@pytest.mark.parametrize(
    ("text", "v01", "v20"),
    [
        ("so [[A>B]].", "A>B", "A>B"),
        ("[[A>B]] hence [[A>B]]", "A>B", "A>B"),
        ("[[A>B]] but no: [[B>A]]", None, "B>A"),
        ("[[a>>b]]", None, "A>>B"),
        ("verdict: [B>>A]", None, "B>>A"),
        ("[A>B] or [[A=B]]", "A=B", "A=B"),
        ("[[A<B]]", "A<B", "A<B"),
        ("[[B]]", "B", "B"),
        ("[[ A>B ]]", None, None),
        ("no idea", None, None),
        ("", None, None),
    ],
)
def test_verdicts_by_each_rule(text: str, v01: str | None, v20: str | None) -> None:
    for rules, expected in (("v0.1", v01), ("v2.0", v20)):
        verdict = arena_hard.parse_verdict(text, rules)  # type: ignore[arg-type]
        assert (None if isinstance(verdict, Unscored) else verdict) == expected


VERDICTS = st.sampled_from(["A>>B", "A>B", "A=B", "B>A", "B>>A"])
PROSE = st.text().map(lambda text: text.replace("[", "").replace("]", ""))


@given(PROSE, st.lists(st.tuples(VERDICTS, PROSE), min_size=1))
def test_v01_wants_one_verdict_and_v20_takes_the_last(start: str, found: list[tuple[str, str]]) -> None:
    text = start + "".join(f"[[{verdict}]]{prose}" for verdict, prose in found)
    old = arena_hard.parse_verdict(text, "v0.1")
    if len({verdict for verdict, _ in found}) == 1:
        assert old == found[0][0]
    else:
        assert isinstance(old, Unscored)
        assert "different verdicts" in old.reason
    assert arena_hard.parse_verdict(text, "v2.0") == found[-1][0]


@given(st.text(alphabet="[]AaBb<>= \nß"), st.sampled_from(["v0.1", "v2.0"]))
def test_any_text_has_a_verdict_that_stands_in_it_or_a_reason(text: str, rules: Rules) -> None:
    verdict = arena_hard.parse_verdict(text, rules)
    if isinstance(verdict, Unscored):
        assert verdict.reason
    else:
        assert f"[{verdict}]" in (text if rules == "v0.1" else text.upper())


def test_v01_asks_once_more_where_there_is_no_verdict_at_all() -> None:
    request = requests_of("v0.1")[0]
    again = arena_hard.follow_up(request, [JudgeReply("Both are fine.")])
    assert again
    assert again.key == request.key
    assert again.attempt == 1
    assert [dict(m) for m in again.messages[2:]] == [
        {"role": "assistant", "content": "Both are fine."},
        {"role": "user", "content": "continue your judgment and finish by outputting a final verdict label"},
    ]
    assert arena_hard.follow_up(request, [JudgeReply("Both."), JudgeReply("Still both.")]) is None
    assert arena_hard.follow_up(request, [JudgeReply("[[A>B]]")]) is None
    assert arena_hard.follow_up(request, [JudgeReply("[[A>B]] [[B>A]]")]) is None
    assert arena_hard.follow_up(request, [JudgeReply("", error="timed out")]) is None
    assert arena_hard.follow_up(requests_of("v2.0")[0], [JudgeReply("Both.")]) is None


def test_rows_of_v01_join_both_replies() -> None:
    requests = requests_of("v0.1", QUESTIONS[:1])
    replies = {
        requests[0].key: [JudgeReply("Hm."), JudgeReply("[[A>B]]")],
        requests[1].key: [JudgeReply("[[A>B]] [[B>A]]")],
    }
    assert arena_hard.judgment_rows(requests, replies, "gpt-4") == [
        {
            "question_id": "q1",
            "category": "hard_prompt",
            "judge": "gpt-4",
            "model": "ours",
            "baseline": "base",
            "games": [
                {"score": "A>B", "user_prompt": "Q 1+1? A two B ours q1", "judgment": "\nHm.\n[[A>B]]"},
                {
                    "score": None,
                    "user_prompt": "Q 1+1? A ours q1 B two",
                    "judgment": "\n[[A>B]] [[B>A]]",
                    "unscored": "different verdicts in one text (A>B, B>A)",
                },
            ],
        }
    ]


def test_rows_of_v20_keep_the_prompt_and_wait_for_both_games() -> None:
    requests = requests_of("v2.0")
    replies = {r.key: [JudgeReply("[[B>A]]")] for r in requests[:3]}
    rows = arena_hard.judgment_rows(requests, replies, "gpt-4.1")
    assert [row["uid"] for row in rows] == ["q1"]
    assert rows[0]["games"][1] == {
        "score": "B>A",
        "judgment": {"answer": "[[B>A]]"},
        "prompt": [dict(m) for m in requests[1].messages],
    }
    replies[requests[3].key] = [JudgeReply("", error="refused")]
    rows = arena_hard.judgment_rows(requests, replies, "gpt-4.1")
    assert rows[1]["games"][1]["score"] is None
    assert rows[1]["games"][1]["unscored"] == "refused"


def test_judge_settings_are_read_from_upstream_s_python_without_running_it(tmp_path: Path) -> None:
    plain = {"hard_prompt": {"baseline": "base", "system_prompt": "Judge."}}
    (tmp_path / "judge_settings.json").write_text(json.dumps(plain))
    (tmp_path / "judge_utils.py").write_text(
        'PROMPT = "Judge."\nJUDGE_SETTINGS = {"hard_prompt": {"baseline": "base", "system_prompt": PROMPT}}\n'
    )
    for name in ("judge_settings.json", "judge_utils.py"):
        assert arena_hard.read_judge_settings(tmp_path / name) == {"hard_prompt": SETTINGS["hard_prompt"]}
    (tmp_path / "bad.py").write_text("JUDGE_SETTINGS = open('x')\n")
    with pytest.raises(InputError, match=r"bad\.py has no judge settings"):
        arena_hard.read_judge_settings(tmp_path / "bad.py")
    (tmp_path / "bad.yaml").write_text("prompt_template: nothing\n")
    with pytest.raises(InputError, match=r"bad\.yaml has no"):
        arena_hard.read_prompt_template(tmp_path / "bad.yaml")
