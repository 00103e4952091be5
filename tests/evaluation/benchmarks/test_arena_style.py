"""Style control: counts of markdown, features by hand, and the published fit at 50 and 500 steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks import arena_style
from slimepo.evaluation.benchmarks.arena_hard import answer_text
from slimepo.evaluation.benchmarks.arena_scores import battles_of
from slimepo.evaluation.rows import read_rows


def counts(tokens: int, headers: int = 0, lists: int = 0, bold: int = 0) -> dict[str, Any]:
    return {
        "token_len": tokens,
        "header_count": {"h1": headers, "h2": 0},
        "list_count": {"ordered": 0, "unordered": lists},
        "bold_count": {"**": bold, "__": 0},
    }


# Two answers of `m` and two of the baseline `b` that differ in all four features.
STYLE = {
    "m": {"1": counts(300, 3, 1, 2), "2": counts(100, 0, 4, 0)},
    "b": {"1": counts(100, 1, 1, 0), "2": counts(100, 2, 0, 3)},
}
BATTLES = [("m", "1", 1.0), ("m", "2", 0.0)]


def test_markdown_is_counted_as_in_the_published_answers(official_data: Path) -> None:
    answers = read_rows(official_data / "eval" / "arena_hard" / "v2.0" / "answer.o3-mini-2025-01-31.jsonl.gz")
    assert len(answers) == 750
    for row in answers:
        assert arena_style.style_metadata(answer_text(row), row["metadata"]["token_len"]) == row["metadata"]


def test_markdown_inside_code_does_not_count() -> None:
    text = "# One\n### Three\n1. a\n - b\n**bold** __too__\n```\n# no\n- no\n**no**\n```"
    assert arena_style.style_metadata(text, 7) == {
        "token_len": 7,
        "header_count": {"h1": 1, "h2": 0, "h3": 1, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 1, "unordered": 1},
        "bold_count": {"**": 1, "__": 1},
    }


def test_features_by_hand() -> None:
    design, outcomes, models = arena_style.design_matrix(BATTLES, "b", STYLE)
    assert models == ["b", "m"]
    assert outcomes.tolist() == [1.0, 0.0]
    # Length: 200/400 and 0; two values have mean their middle and deviation |difference| / sqrt(2): +-1/sqrt(2).
    # Headers per token: 3/301 > 1/101, then 0 < 2/101. Lists: 1/301 < 1/101, then more. Bold: more, then less.
    r = 0.5**0.5
    assert design.numpy() == pytest.approx(np.array([[-1, 1, r, r, -r, r], [-1, 1, -r, -r, r, -r]]), abs=1e-6)


def test_what_style_cannot_be_computed_is_named() -> None:
    with pytest.raises(InputError, match="style of m's answer to 3; '3' is missing"):
        arena_style.design_matrix([("m", "3", 1.0)], "b", STYLE)
    same = {"m": {"1": counts(9), "2": counts(9)}, "b": {"1": counts(9), "2": counts(9)}}
    with pytest.raises(InputError, match="token_len is the same in all battles"):
        arena_style.design_matrix(BATTLES, "b", same)


@pytest.fixture(scope="module")
def problem(official_data: Path) -> tuple[dict[str, Any], Any]:
    folder = official_data / "eval" / "arena_hard" / "ko_v0.1"
    golden = json.loads((folder / "golden_v2_three_models_official_code.json").read_text())
    style: dict[str, dict[str, Any]] = {}
    for row in read_rows(folder / "conv_metadata_10models.jsonl.gz"):
        style.setdefault(row["model"], {})[row["question_id"]] = row["conv_metadata"]
    rows = read_rows(folder / "judgments_ensemble_10models.jsonl.gz")
    rows = sorted((r for r in rows if r["model"] in golden["models"]), key=lambda r: r["model"])
    battles = [(b.model, b.question_id, b.outcome) for r in rows for b in battles_of(r, "v2.0")[0]]
    return golden, arena_style.design_matrix(battles, golden["baseline"], style)


@pytest.mark.parametrize(
    ("steps", "coefficients", "table"),
    [
        (50, "fullfit50_coefs", "fullfit50_styleControl"),
        (500, "fullfit_coefs_sorted_models_then_4_style", "fullfit_styleControl"),
    ],
)
def test_the_published_fit(
    problem: tuple[dict[str, Any], Any], steps: int, coefficients: str, table: str
) -> None:
    golden, (design, outcomes, models) = problem
    fit = arena_style.fit_style(design, outcomes, steps)
    assert fit == pytest.approx(golden[coefficients], abs=1e-3)
    rates = dict(zip(models, arena_style.win_rates(fit, models, golden["baseline"]), strict=True))
    for entry in golden[table]:
        assert rates[entry["model"]] == pytest.approx(entry["scores"], abs=5e-5)
