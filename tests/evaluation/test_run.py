"""Answers, judgments and scores of the tiny real Llama against the mock judge, as the command line runs them."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.benchmarks import mt_bench
from slimepo.evaluation.benchmarks.base import OURS, Answers, Benchmark, make_question
from slimepo.evaluation.job import Job
from slimepo.evaluation.judge.request import Identity, Measure, Scores, scores_of_row
from slimepo.evaluation.rows import JsonObject, read_rows
from slimepo.evaluation.run import load_benchmark, run_benchmark
from slimepo.evaluation.settings import BENCHMARKS, Evaluation, Known
from slimepo.report.page import write_report
from tests.evaluation.conftest import QUESTIONS, one_file, printed
from tests.evaluation.mock_judge import KEY, MockJudge, Say


@pytest.mark.parametrize(
    ("benchmark", "options", "calls", "measures"),
    [
        ("mt-bench", {}, 2 * QUESTIONS, {"overall", "turn-1", "turn-2", "category/writing"}),
        ("mt-bench", {"references": "gpt-4-1106-preview"}, 2 * QUESTIONS, {"overall"}),
        ("arena-hard", {"rules": "v0.1"}, 2 * QUESTIONS, {"score", "mean"}),
        ("arena-hard", {"category": "hard_prompt"}, 2 * QUESTIONS, {"score", "mean"}),
        ("alpaca-eval", {}, QUESTIONS, {"win_rate", "average_length"}),
    ],
)
def test_answer_judge_score(
    job: Callable[..., Job],
    mock: MockJudge,
    console: Console,
    benchmark: str,
    options: dict[str, Any],
    calls: int,
    measures: set[str],
) -> None:
    if benchmark == "arena-hard":
        # Every game is decided, so that few questions are enough for a fit.
        mock.script += [
            Say("[[A>B]]"),
            Say("[[A>B]]"),
            Say("[[B>A]]"),
            Say("[[B>A]]"),
            Say("[[A=B]]"),
            Say("[[A=B]]"),
        ]
    this = job(benchmark, concurrency=1, **options)
    (scores,) = run_benchmark(this, console)
    assert len(mock.calls) == calls
    assert measures <= set(scores.measures)
    assert (scores.model, scores.identity.judge) == ("tiny-llama", mock.judge)
    assert not scores.official
    assert "the first 3 questions only" in scores.notes
    record = json.loads(one_file(this.out / "scores", "*.json").read_text())
    assert scores_of_row(record["scores"][0]) == scores
    assert record["judge"]["name"] == mock.judge
    assert record["answers"]["made"]["backend"] == "transformers"
    assert all(len(file["sha256"]) == 64 for file in record["files"])
    # Again: nothing is generated or asked, and the result is the same.
    assert run_benchmark(this, console) == [scores]
    assert len(mock.calls) == calls
    assert "judge: 0 calls" in printed(console)


def test_alpaca_eval_writes_upstreams_list(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("alpaca-eval")
    (scores,) = run_benchmark(this, console)
    folder = this.out / "alpaca_eval" / "tiny-llama"
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [set(row) for row in outputs] == [
        {"dataset", "instruction", "output", "generator", OURS}
    ] * QUESTIONS
    # What we add is one word a row: the official code reads the list into a table.
    assert {row[OURS] for row in outputs} == {"model_outputs.jsonl"}
    (annotations,) = folder.glob("*/annotations.json")
    for row in json.loads(annotations.read_text()):
        assert row["raw_completion"]["logprobs"]["content"][0]["top_logprobs"]
    assert {(call["temperature"], call["max_tokens"], call["top_logprobs"]) for call in mock.calls} == {
        (1.0, 1, 5)
    }
    assert 0 < scores.measures["win_rate"].value < 100


def test_each_step_takes_up_what_the_one_before_left(
    job: Callable[..., Job], mock: MockJudge, loads: list[str], console: Console
) -> None:
    this = job("mt-bench")
    with pytest.raises(InputError, match="3 of 3 answers are missing; run the step answer"):
        run_benchmark(this, console, ["judge"])
    run_benchmark(this, console, ["answer"])
    assert mock.calls == []
    with pytest.raises(InputError, match="run the step judge"):
        run_benchmark(this, console, ["score"])
    loads.clear()
    assert run_benchmark(this, console, ["judge"]) == []
    (scores,) = run_benchmark(this, console, ["score"])
    assert scores.scored == 6
    assert loads == []


def test_without_a_judge_only_answers_are_written(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("arena-hard", judge=None)
    assert run_benchmark(this, console) == []
    assert "no --judge: answers only" in printed(console)
    assert [path.name for path in (this.out / "arena-hard-v2.0").iterdir()] == ["model_answer"]
    with pytest.raises(InputError, match="needs --judge"):
        run_benchmark(this, console, ["judge"])


@pytest.mark.parametrize("steps", [["judge"], ["answer", "judge"], ["judge", "score"]])
def test_a_step_that_a_benchmark_does_not_have_is_refused(
    job: Callable[..., Job], console: Console, steps: list[str]
) -> None:
    with pytest.raises(InputError, match="ifeval has no step judge: code scores its answers"):
        run_benchmark(job("ifeval", judge=None, key_variable=None), console, steps)


def test_a_baseline_of_ones_own(
    job: Callable[..., Job], mock: MockJudge, console: Console, tmp_path: Path
) -> None:
    run_benchmark(job("arena-hard", "rival", judge=None, category="creative_writing"), console)
    this = job("arena-hard", baseline="rival", category="creative_writing")
    # Against itself: both orders are the same prompt, which is asked once.
    mock.script += [Say("?")] * 3
    with pytest.raises(UnscoredError):
        run_benchmark(this, console)
    shutil.rmtree(this.out / "judge_calls")
    (scores,) = run_benchmark(this, console)
    assert scores.identity.baseline == "rival"
    assert one_file(this.out / "scores", "*--vs-rival--*.json")
    with pytest.raises(InputError, match="--baseline nobody: neither a file nor a model"):
        run_benchmark(job("arena-hard", baseline="nobody"), console)
    # Upstream's answers of 2024 call the model `model_id`.
    rows = read_rows(this.out / "arena-hard-v2.0" / "model_answer" / "rival.jsonl")
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps({**r, "model_id": r["model"], "model": None}) + "\n" for r in rows))
    (same,) = run_benchmark(job("arena-hard", baseline=str(old), category="creative_writing"), console)
    assert (same.identity.baseline, same.measures) == ("rival", scores.measures)
    nameless = tmp_path / "nameless.jsonl"
    nameless.write_text('{"uid": "x"}\n')
    with pytest.raises(InputError, match="must name one model"):
        run_benchmark(job("arena-hard", baseline=str(nameless)), console)


def test_a_missing_official_baseline_is_found_before_anything_is_generated(
    job: Callable[..., Job], loads: list[str], console: Console
) -> None:
    with pytest.raises(InputError, match=r"no arena_hard/v2\.0/answer\.gemini-2\.0-flash-001\.jsonl"):
        run_benchmark(job("arena-hard", category="creative_writing"), console)
    assert loads == []


def test_a_dry_run_counts_and_makes_no_call(
    job: Callable[..., Job], mock: MockJudge, loads: list[str], console: Console
) -> None:
    this = job("arena-hard", category="hard_prompt", price_prompt=2.0, price_completion=8.0)
    assert run_benchmark(this, console, dry_run=True) == []
    text = printed(console)
    assert "answers: 3 questions, 3 to answer in 3 turns, at most 36 tokens" in text
    assert "judge: 6 calls, 6 to make" in text
    assert "at most 96,000 completion tokens" in text
    assert "$" in text
    assert (mock.calls, loads, this.out.exists()) == ([], [], False)


def test_a_missing_key_shows_before_anything_is_generated(
    job: Callable[..., Job], loads: list[str], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="set the environment variable OPENAI_API_KEY"):
        run_benchmark(job("mt-bench", judge="gpt-4"), console)
    assert loads == []


@pytest.mark.parametrize(
    ("library", "benchmark", "options"),
    [
        ("openai", "mt-bench", {}),
        ("sklearn", "alpaca-eval", {"limit": None}),
    ],
)
def test_a_missing_library_shows_before_anything_is_generated(
    job: Callable[..., Job],
    loads: list[str],
    mock: MockJudge,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    benchmark: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    this = job(benchmark, **options)
    with pytest.raises(InputError, match=r"not installed: pip install 'slimepo\[eval\]'$") as caught:
        run_benchmark(this, console)
    assert "\n" not in str(caught.value)
    assert (loads, mock.calls, this.out.exists()) == ([], [], False)


def test_answers_alone_need_no_library_of_the_judge(
    job: Callable[..., Job], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run_benchmark(job("arena-hard", rules="v0.1"), console, ["answer"]) == []


def test_a_model_behind_an_endpoint_answers_and_is_judged(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    local = job("mt-bench")
    this = Job(local.settings, mock.judge, "remote", local.out)
    (scores,) = run_benchmark(this, console)
    assert (scores.scored, len(mock.calls)) == (6, 12)
    assert "note: the model judges itself" in printed(console)
    # The judge's key is no business of the model's server.
    assert mock.keys == {"none", KEY}


def test_a_trial_of_a_few_questions_leaves_the_whole_run_alone(
    job: Callable[..., Job], console: Console
) -> None:
    for benchmark in ("mt-bench", "arena-hard", "alpaca-eval"):
        category = {"category": "hard_prompt"} if benchmark == "arena-hard" else {}
        this = job(benchmark, **category)
        run_benchmark(this, console)
        before = {path: path.read_bytes() for path in this.out.rglob("*.json*") if path.is_file()}
        run_benchmark(job(benchmark, limit=2, **category), console)
        changed = [path.name for path, content in before.items() if path.read_bytes() != content]
        assert [name for name in changed if name != before_calls(this)] == []


def before_calls(this: Job) -> str:
    return one_file(this.out / "judge_calls", "*").name


@pytest.mark.parametrize("benchmark", ["arena-hard", "alpaca-eval"])
def test_a_baseline_that_lacks_answers_is_found_before_anything_is_generated(
    job: Callable[..., Job], loads: list[str], console: Console, tmp_path: Path, benchmark: str
) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text(
        '{"uid": "x", "instruction": "x", "model": "short", "generator": "short", "output": "y"}\n'
    )
    options = {"category": "hard_prompt"} if benchmark == "arena-hard" else {}
    with pytest.raises(InputError, match=r"short\.jsonl: answers to 3 of 3 questions are missing"):
        run_benchmark(job(benchmark, baseline=str(path), **options), console)
    assert loads == []


def test_from_answers_over_judgments_and_scores_to_the_report(
    job: Callable[..., Job], mock: MockJudge, console: Console, tmp_path: Path
) -> None:
    # Questions of all eight categories, so that the page has a radar plot; the canaries answer some of them too.
    this = job("mt-bench", canaries=True, limit=None, max_new_tokens=4)
    scores = []
    for name in ("tiny", "other"):
        run_benchmark(replace(this, name=name), console, ["answer"])
        run_benchmark(replace(this, name=name), console, ["judge"])
        scores += run_benchmark(replace(this, name=name), console, ["score"])
    # Both say the same, so that the second is judged from the cache: 10 questions of two turns, three canaries.
    assert len(mock.calls) == 2 * 10 * (1 + 3)
    write_report([this.out], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    markdown = (tmp_path / "report.md").read_text()
    record = json.loads(one_file(this.out / "scores", "*--tiny--*.json").read_text())
    overall = scores[0].measures["overall"]
    for text in (page, markdown):
        assert f"{overall.value:.2f} [{overall.lower:.2f}, {overall.upper:.2f}]" in text
        for canary in record["canaries"].values():
            assert f"{canary['mean']:.2f} on average; {canary['high']} of 20 rated 7 or more" in text
    picture = re.search(r'aria-label="(MT-Bench by category, judge mock[^"]*mean ratings[^"]*)"', page)
    assert picture
    for name in mt_bench.CATEGORIES:
        assert f"{name} {scores[0].measures[f'category/{name}'].value:.2f}" in picture.group(1)
    assert "tiny: " in picture.group(1)
    assert "other: " in picture.group(1)


def test_the_judgments_of_mt_bench_are_fastchats(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("mt-bench")
    run_benchmark(this, console)
    run_benchmark(job("mt-bench", "other"), console)
    rows = read_rows(one_file(this.out / "mt_bench" / "model_judgment", "*_single.jsonl"))
    # One file a judge, with all its models; a model's rows stand there once.
    assert [row["model"] for row in rows] == ["tiny-llama"] * 6 + ["other"] * 6
    run_benchmark(this, console)
    assert len(read_rows(one_file(this.out / "mt_bench" / "model_judgment", "*_single.jsonl"))) == 12
    assert {call["messages"][0]["role"] for call in mock.calls} == {"system"}
    assert {(call["temperature"], call["max_tokens"]) for call in mock.calls} == {(0.0, 2048)}


def test_v01_asks_once_more_where_there_is_no_verdict(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    mock.script += [
        Say("let me think"),
        *[Say("[[A>B]]"), Say("[[B>A]]")] * 2,
        Say("[[B>A]]"),
        Say("[[A=B]]"),
    ]
    this = job("arena-hard", rules="v0.1", concurrency=1)
    run_benchmark(this, console)
    assert len(mock.calls) == 7
    assert [message["role"] for message in mock.calls[6]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    rows = read_rows(one_file(this.out / "arena-hard-v0.1" / "model_judgment", "*/tiny-llama.jsonl"))
    assert rows[0]["games"][0]["judgment"] == "\nlet me think\n[[A=B]]"


def test_answers_made_elsewhere_are_judged_as_they_are(
    job: Callable[..., Job], mock: MockJudge, loads: list[str], console: Console
) -> None:
    this = job("mt-bench", "theirs", limit=None, max_new_tokens=None)
    folder = this.out / "mt_bench" / "model_answer"
    folder.mkdir(parents=True)
    given = [
        {"question_id": 81 + at, "choices": [{"index": 0, "turns": [f"Yes {at}.", f"No {at}."]}]}
        for at in range(10)
    ]
    (folder / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    (scores,) = run_benchmark(this, console)
    assert (scores.scored, len(mock.calls), loads) == (20, 20, [])
    # Made as published but for the judge.
    assert not scores.official
    assert scores.notes == (f"judged by {mock.judge}; published figures by gpt-4",)
    asked = [call["messages"][-1]["content"] for call in mock.calls]
    assert all(sum(f"Yes {at}." in text for text in asked) == 2 for at in range(10))


def test_a_local_model_judges_greedily(
    job: Callable[..., Job], mock: MockJudge, console: Console, llama_folder: Path
) -> None:
    # Its context is far too small for these prompts: every item is unscored and says so.
    this = job("alpaca-eval", judge=f"hf:{llama_folder}", limit=2)
    with pytest.raises(UnscoredError):
        run_benchmark(this, console)
    (annotations,) = (this.out / "alpaca_eval" / "tiny-llama").glob("hf-tiny-llama@*/annotations.json")
    assert "fills its context" in json.loads(annotations.read_text())[0]["unscored"]
    assert mock.calls == []


def test_the_baseline_itself_needs_no_judge(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("alpaca-eval", "gpt4_1106_preview")
    path = this.out / "alpaca_eval" / "gpt4_1106_preview" / "model_outputs.json"
    path.parent.mkdir(parents=True)
    questions = load_benchmark(this.settings, this.out).questions
    path.write_text(json.dumps([dict(question.row) for question in questions]))
    (scores,) = run_benchmark(this, console)
    assert (scores.measures["win_rate"].value, mock.calls) == (50.0, [])


def test_canaries_are_judged_apart_and_reported(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    this = job("mt-bench", canaries=True)
    (scores,) = run_benchmark(this, console)
    assert len(mock.calls) == 2 * QUESTIONS * 4
    record = json.loads(one_file(this.out / "scores", "*.json").read_text())
    assert set(record["canaries"]) == {"canary-null", "canary-order", "canary-forged"}
    assert all(result["scored"] == 6 and 1 <= result["mean"] <= 10 for result in record["canaries"].values())
    assert "canary-null: " in printed(console)
    official = read_rows(one_file(this.out / "mt_bench" / "model_judgment", "*.jsonl"))
    assert {row["model"] for row in official} == {"tiny-llama"}
    assert scores.scored == 6


def test_a_new_benchmark_is_a_module_and_a_line(
    job: Callable[..., Job], console: Console, mock: MockJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a judge: is the answer at least three words long?"""

    def answer_row(model: str, question: JsonObject, turns: Sequence[str]) -> dict[str, Any]:
        return {"id": question["id"], "model": model, "text": turns[0]}

    def load_questions(settings: Evaluation) -> Benchmark:
        rows = [{"id": str(i), "text": f"Tell me {i} stories."} for i in range(9)][: settings.limit]
        questions = [
            make_question(settings, row, row["id"], [row["text"]], temperature=0.0, limit=99) for row in rows
        ]
        return Benchmark("toy", questions, (), answer_row, id_of=lambda row: str(row["id"]))

    def load_scoring(benchmark: Benchmark, settings: Evaluation, baseline: object) -> Benchmark:
        def scores(answers: Answers, judgments: Sequence[JsonObject]) -> list[Scores]:
            right = [len(row["text"].split()) >= 3 for row in answers]
            measures = {"long": Measure(100 * sum(right) / len(right), len(right))}
            return [Scores(answers[0]["model"], Identity("toy", "", "v1"), "long", "%", measures, len(right))]

        return replace(benchmark, scores=scores)

    module = SimpleNamespace(load_questions=load_questions, load_scoring=load_scoring)
    monkeypatch.setitem(sys.modules, "slimepo.evaluation.benchmarks.toy", module)
    monkeypatch.setitem(BENCHMARKS, "toy", Known("Toy", "three words or more."))

    with pytest.raises(
        InputError, match="judge is an option of mt-bench and arena-hard and alpaca-eval only"
    ):
        job("toy")
    this = job("toy", judge=None, key_variable=None)
    run_benchmark(this, console, dry_run=True)
    (scores,) = run_benchmark(this, console)
    assert (scores.scored, scores.notes[0]) == (3, "the first 3 questions only")
    assert run_benchmark(this, console, ["score"]) == [scores]
    record = json.loads((this.out / "scores" / "toy--tiny-llama--first-3.json").read_text())
    assert scores_of_row(record["scores"][0]) == scores
    assert "judge" not in record
    assert mock.calls == []
    write_report([this.out], this.out / "report.html")
    assert "Toy, long (%)" in (this.out / "report.html").read_text()
