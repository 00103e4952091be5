"""What is scored, what is refused, and what keeps two scores apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.benchmarks import arena_scores, arena_style
from slimepo.evaluation.benchmarks.arena_style import STYLE_FEATURES
from slimepo.evaluation.job import Job
from slimepo.evaluation.judge.request import Measure
from slimepo.evaluation.run import run_benchmark
from slimepo.evaluation.settings import STEPS
from tests.evaluation.conftest import one_file, printed
from tests.evaluation.mock_judge import Fail, MockJudge, Say


def test_a_judge_without_logprobs_is_unofficial(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    mock.logprobs = False
    (scores,) = run_benchmark(job("alpaca-eval"), console)
    assert any("without log-probabilities" in note for note in scores.notes)


def test_too_many_unscored_items_refuse_the_score(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    mock.script += [Say("no rating here"), Say("nor here")]
    this = job("mt-bench", concurrency=1)
    with pytest.raises(UnscoredError, match="2 of 6 items"):
        run_benchmark(this, console)
    assert list((this.out / "scores").glob("*.json")) == []
    (scores,) = run_benchmark(job("mt-bench", max_unscored=0.5), console)
    assert (scores.scored, len(scores.unscored)) == (4, 2)
    assert "2 items without a score; most often: no [[rating]] in the judge's text (2)" in printed(console)
    # Only the score step was new.
    assert len(mock.calls) == 6


def test_a_failed_call_is_made_again_and_then_scored(
    job: Callable[..., Job], mock: MockJudge, console: Console
) -> None:
    mock.script += [Fail(500)] * 2
    this = job("mt-bench", concurrency=1)
    with pytest.raises(UnscoredError, match="1 of 6 items"):
        run_benchmark(this, console)
    (scores,) = run_benchmark(this, console)
    assert (scores.scored, len(mock.calls)) == (6, 2 + 5 + 1)


class WordTokenizer:
    """In the place of gpt-4o's tokenizer."""

    def encode(self, text: str, disallowed_special: tuple[str, ...]) -> list[str]:
        return text.split()


def test_style_control_counts_answers_when_it_scores(
    job: Callable[..., Job],
    mock: MockJudge,
    loads: list[str],
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"category": "hard_prompt", "limit": 12, "max_new_tokens": 40, "style_control": True}
    monkeypatch.setattr(arena_style, "_gpt_4o_tokenizer", lambda: None)
    for steps in (STEPS, ["score"]):
        with pytest.raises(InputError, match=r"pip install tiktoken"):
            run_benchmark(job("arena-hard", **options), console, steps)
    assert (loads, mock.calls) == ([], [])
    run_benchmark(job("arena-hard", **options), console, ["answer", "judge"])
    calls = len(mock.calls)
    monkeypatch.setattr(arena_style, "_gpt_4o_tokenizer", WordTokenizer)
    (scores,) = run_benchmark(job("arena-hard", **options), console, ["score"])
    assert scores.identity.settings["style"] == list(STYLE_FEATURES)
    assert 0 <= scores.measures["score"].value <= 100
    assert len(mock.calls) == calls
    assert any("fitted on this model alone" in note for note in scores.notes)
    # A second model of the folder joins the fit of both.
    fitted: list[set[str]] = []

    def fit(battles: Any, *_: object) -> dict[str, Measure]:
        fitted.append({model for model, _, _ in battles})
        return {model: Measure(50, 1) for model in fitted[-1]}

    monkeypatch.setattr(arena_scores, "style_scores", fit)
    (scores,) = run_benchmark(job("arena-hard", "rival", **options), console)
    assert fitted == [{"rival", "tiny-llama"}]
    assert (scores.model, scores.identity.settings["fitted with"]) == ("rival", ["tiny-llama"])


def test_the_categories_of_arena_hard_keep_a_score_each(
    job: Callable[..., Job], console: Console, tmp_path: Path
) -> None:
    run_benchmark(job("arena-hard", "rival", judge=None, category="hard_prompt"), console)
    run_benchmark(job("arena-hard", "rival", judge=None, category="creative_writing"), console)
    for category in ("hard_prompt", "creative_writing"):
        run_benchmark(job("arena-hard", category=category, baseline="rival", max_unscored=0.9), console)
    scored = [json.loads(path.read_text())["scores"][0] for path in (tmp_path / "out" / "scores").iterdir()]
    assert {s["identity"]["settings"]["category"] for s in scored} == {"hard_prompt", "creative_writing"}


def test_judgments_of_other_answers_are_not_scored(job: Callable[..., Job], console: Console) -> None:
    for benchmark in ("mt-bench", "arena-hard", "alpaca-eval"):
        options = {"category": "hard_prompt"} if benchmark == "arena-hard" else {}
        this = job(benchmark, **options)
        run_benchmark(this, console)
        for path in this.out.rglob("tiny-llama.jsonl"):
            if path.parent.name == "model_answer":
                path.unlink()
        for path in this.out.rglob("model_outputs.json*"):
            path.unlink()
        longer = job(benchmark, max_new_tokens=13, **options)
        run_benchmark(longer, console, ["answer"])
        with pytest.raises(
            InputError, match=r"[1-3] questions were judged with other answers; run the step judge"
        ):
            run_benchmark(longer, console, ["score"])
        run_benchmark(longer, console)


def test_judgments_of_another_judge_are_not_scored(job: Callable[..., Job], console: Console) -> None:
    run_benchmark(job("mt-bench", max_unscored=1), console)
    this = job("mt-bench")
    path = one_file(this.out / "mt_bench" / "model_judgment", "*.jsonl")
    path.write_text(path.read_text().replace("mock@", "Mock@"))
    with pytest.raises(InputError, match=r"are by Mock@.*, not by mock@"):
        run_benchmark(this, console, ["score"])
