"""Pairs for the next round: the score's worked numbers, what a selection is, and the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.plan.select import select, signal_to_curvature
from tests.command import slimepo
from tests.tiny import letter_tokenizer, tiny_model


def test_worked_numbers() -> None:
    wrong = 1 / (1 + math.exp(-3))  # sigmoid(3)
    np.testing.assert_allclose(
        signal_to_curvature(np.array([-3.0, 0.0, 3.0])),
        [
            wrong**2 / (wrong * (1 - wrong) + 0.05),
            0.25 / 0.3,
            (1 - wrong) ** 2 / (wrong * (1 - wrong) + 0.05),
        ],
    )
    told = [f"{score:.3g}" for score in signal_to_curvature(np.array([-3.0, 0.0, 3.0]))]
    assert told == ["9.53", "0.833", "0.0236"]


def test_the_score_falls_with_the_logit_and_is_finite_anywhere() -> None:
    scores = signal_to_curvature(np.linspace(-30, 30, 500))
    assert (np.diff(scores) < 0).all()
    assert np.isfinite(signal_to_curvature(np.array([-1e6, 1e6]))).all()


def test_one_pool_takes_the_best_and_more_take_their_share_each() -> None:
    rows, scores = list("abcdefgh"), np.array([1.0, 8, 2, 7, 3, 6, 4, 5])
    assert select(rows, scores, 0.5, 1) == ["b", "d", "f", "h"]
    # Pools 8 7, 6 5, 4 3, 2 1: the better one of each.
    assert select(rows, scores, 0.5, 4) == ["b", "c", "f", "g"]
    assert select(rows, scores, 1.0, 3) == rows


@pytest.mark.parametrize("bins", [1, 3, 7, 20])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 1.0])
def test_a_selection_is_a_set_of_that_size_whatever_the_order_of_rows(bins: int, keep: float) -> None:
    random = np.random.default_rng(bins)
    rows, scores = np.arange(20), random.normal(size=20)
    kept = select(rows.tolist(), scores, keep, bins)
    assert len(kept) == max(1, round(20 * keep))
    assert kept == sorted(kept)
    order = random.permutation(20)
    assert sorted(select(rows[order].tolist(), scores[order], keep, bins)) == kept


def test_of_equal_scores_the_earlier_row_is_taken() -> None:
    assert select(list("abcd"), np.ones(4), 0.5, 1) == ["a", "b"]


@pytest.mark.parametrize(
    ("keep", "bins", "words"),
    [(0.0, 1, "keep = 0.0 .*> 0"), (1.5, 1, "keep = 1.5 .*<= 1"), (0.5, 0, "from 1 to 2"), (0.5, 3, "from 1 to 2")],
)  # fmt: skip
def test_arguments_out_of_range(keep: float, bins: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        select(["a", "b"], np.ones(2), keep, bins)
    with pytest.raises(InputError, match="not finite"):
        select(["a"], np.array([np.nan]), 0.5, 1)
    with pytest.raises(InputError, match="no rows"):
        select([], np.ones(0), 0.5, 1)


def test_the_command_keeps_rows_as_they_stand(tmp_path: Path) -> None:
    models = []
    for seed in (0, 1):
        models.append(tmp_path / f"model-{seed}")
        tiny_model(seed=seed).save_pretrained(models[-1])
        letter_tokenizer().save_pretrained(models[-1])
    rows = [{"prompt": f"q{'ab'[i % 2]}", "chosen": "xyz"[: 1 + i % 3], "rejected": "uvw"[i % 3], "note": i}
            for i in range(12)]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["data", "select", data, "--model", models[1], "--reference", models[0], "--out"]
    done = slimepo(*given, tmp_path / "half.jsonl", "--bins", 3)
    assert done.returncode == 0, done.stderr
    assert "6 of 12 pairs written to" in " ".join(done.stdout.split())
    kept = [json.loads(line) for line in (tmp_path / "half.jsonl").read_text().splitlines()]
    assert [row["note"] for row in kept] == sorted(row["note"] for row in kept)
    assert all(row in rows for row in kept)
    for arguments, words in (
        ([*given, data], "is the file that is read"),
        ([*given, tmp_path / "a", "--keep", 0], "--keep = 0"),
        ([*given, tmp_path / "a", "--bins", 0], "--bins = 0"),
        ([*given, tmp_path / "a", "--bins", 13], "from 1 to 12"),
        ([*given, tmp_path / "a", "--beta", "nan"], "--beta"),
        ([*given[:6], models[1], "--out", tmp_path / "a"], "every pair would score alike"),
        ([*given[:6], tmp_path / "nothing", "--out", tmp_path / "a"], "nothing"),
    ):
        refused = slimepo(*arguments)
        assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1), refused
        assert words in refused.stderr
