"""Arena-Hard's scores: by hand, against the published leaderboard, and against what the official code gave."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.benchmarks import arena_scores
from slimepo.evaluation.benchmarks.arena_hard import Rules
from slimepo.evaluation.judge.request import Unscored
from slimepo.evaluation.rows import read_rows


def row(*verdicts: str | None, model: str = "ours", uid: str = "q", **more: Any) -> dict[str, Any]:
    return {"uid": uid, "model": model, "judge": "j", "games": [{"score": v} for v in verdicts], **more}


def outcomes(verdicts: tuple[str | None, str | None], rules: Rules) -> list[float]:
    return [battle.outcome for battle in arena_scores.battles_of(row(*verdicts), rules)[0]]


@pytest.fixture(scope="module")
def folder(official_data: Path) -> Path:
    return official_data / "eval" / "arena_hard" / "ko_v0.1"


@pytest.fixture(scope="module")
def published(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "judgments_ensemble_10models.jsonl.gz")


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "golden_v2_three_models_official_code.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def style(folder: Path) -> dict[str, dict[str, Any]]:
    style: dict[str, dict[str, Any]] = {}
    for entry in read_rows(folder / "conv_metadata_10models.jsonl.gz"):
        style.setdefault(entry["model"], {})[entry["question_id"]] = entry["conv_metadata"]
    return style


def three_models(published: list[dict[str, Any]], golden: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as the official code reads them: one file a model, in order of the names."""
    return sorted((r for r in published if r["model"] in golden["models"]), key=lambda r: r["model"])


def test_strong_verdicts_count_three_times_and_ties_are_half() -> None:
    # The model is B in the first game and A in the second.
    assert outcomes(("A>>B", "A>B"), "v0.1") == [0, 0, 0, 1]
    assert outcomes(("A>>B", "A>B"), "v2.0") == [1, 0, 0, 0]
    assert outcomes(("B>A", "B>>A"), "v0.1") == [1, 0, 0, 0]
    assert outcomes(("A=B", "A=B"), "v2.0") == [0.5, 0.5]


def test_v20_knows_verdicts_written_the_other_way_and_v01_does_not() -> None:
    assert outcomes(("A<B", "B<<A"), "v2.0") == [1, 1, 1, 1]
    assert outcomes(("A<B", "B<A"), "v0.1") == []


def test_v01_drops_a_bad_game_and_v20_both() -> None:
    for bad in (None, "B"):
        assert outcomes((bad, "A>B"), "v0.1") == [1]
        assert outcomes((bad, "A>B"), "v2.0") == []
    left_out = arena_scores.battles_of(row("[[B", "A>B"), "v2.0")[1]
    assert left_out == [Unscored("verdict '[[B' is none of the known ones", "q")]
    assert arena_scores.battles_of({"uid": "q", "model": "m", "games": [None, None]}, "v2.0")[1]
    assert len(arena_scores.battles_of(row("A>B"), "v0.1")[1]) == 1


@pytest.mark.parametrize("rules", ["v0.1", "v2.0"])
def test_a_score_by_hand(rules: Rules) -> None:
    rows = [row("A>>B", "A>B", uid="1"), row("B>A", "A=B", uid="2"), row(None, "A>B", uid="3")]
    scores = arena_scores.score(
        rows, rules=rules, baseline="base", questions=[{"uid": u} for u in ("1", "2", "3", "4")]
    )["ours"]
    # 0, 0, 0, 1 and 1, 1/2: 2.5 of 6. The third row's good game is a win more, but only v0.1 keeps it.
    share = 100 * (2.5 + (rules == "v0.1")) / (6 + (rules == "v0.1"))
    assert scores.measures["mean"].value == pytest.approx(share)
    if rules == "v0.1":
        assert scores.measures["score"].value == pytest.approx(share, abs=1e-3)
        assert (scores.scored, [u.item for u in scores.unscored]) == (5, ["3/game-1", "4/game-1", "4/game-2"])
    else:
        assert (scores.scored, [u.item for u in scores.unscored]) == (2, ["3", "4"])
    interval = scores.measures["score"]
    assert interval.lower is not None
    assert interval.upper is not None
    assert interval.lower < share < interval.upper


def test_the_published_leaderboard_to_two_decimals(folder: Path, published: list[dict[str, Any]]) -> None:
    baseline = "claude-3.7-sonnet"
    scores = arena_scores.score(published, rules="v0.1", baseline=baseline)
    with (folder / "leaderboard_20250423_no_control.csv").open() as file:
        leaderboard = {r["model"]: float(r["score"]) for r in csv.DictReader(file)}
    assert leaderboard.pop(baseline) == 50
    assert {m: round(s.measures["score"].value, 2) for m, s in scores.items()} == leaderboard
    for model_scores in scores.values():
        assert model_scores.measures["score"].value == pytest.approx(
            model_scores.measures["mean"].value, abs=1e-4
        )


def test_the_share_of_weighted_wins_is_the_bradley_terry_fit() -> None:
    """Arena-Hard fits log-odds log(10) (r_m - r_b) by a logistic regression without penalty, a row a battle."""
    random = np.random.default_rng(0)
    verdicts = ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
    judged = [
        row(*random.choice(verdicts, 2), model=model, uid=f"q{at}")
        for model in ("one", "three", "two")
        for at in range(40)
    ]
    linear_model = pytest.importorskip("sklearn.linear_model")
    battles = [battle for each in judged for battle in arena_scores.battles_of(each, "v0.1")[0]]
    models = sorted({battle.model for battle in battles})
    # A tie is half a win for both: every battle is told from both sides, weighted by its outcome.
    players = np.zeros((len(battles), len(models)))
    players[np.arange(len(battles)), [models.index(battle.model) for battle in battles]] = np.log(10)
    wins = np.array([battle.outcome for battle in battles])
    fit = linear_model.LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-8).fit(
        np.concatenate([players, players]),
        np.repeat([1, 0], len(battles)),
        sample_weight=np.concatenate([wins, 1 - wins]),
    )
    rates = 100 / (1 + 10 ** -fit.coef_[0])
    scores = arena_scores.score(judged, rules="v0.1", baseline="base", rounds=1)
    assert len(set(rates)) == 3
    assert [scores[m].measures["score"].value for m in models] == pytest.approx(rates, abs=1e-3)


def test_who_won_every_game_has_all_of_it() -> None:
    measure = arena_scores.score([row("B>A", "A>B")], rules="v0.1", baseline="base")["ours"].measures["score"]
    assert (measure.value, measure.lower, measure.upper) == pytest.approx((100, 100, 100), abs=1e-6)


def test_v01_intervals_are_those_of_the_official_code(published: list[dict[str, Any]]) -> None:
    """Official figures: compute_mle_elo and get_bootstrap_result of arena-hard-auto 5300089 after its own seed (42),
    on these rows without the baseline's, the baseline renamed gpt-4-0314 so that it anchors its bootstraps."""
    scores = arena_scores.score(published, rules="v0.1", baseline="claude-3.7-sonnet")
    official = {
        "claude-3.7-sonnet(thinking)": (57.41, 62.18),
        "chatgpt-4o-latest(2025-03-26)": (47.26, 51.54),
        "command-a": (40.84, 45.8),
        "claude-3.5-sonnet": (16.42, 19.57),
        "claude-3.5-sonnet-20240620": (10.03, 12.83),
        "claude-3.5-haiku": (8.61, 10.65),
        "command-r-plus-08-2024": (6.93, 8.91),
        "command-r-08-2024": (2.69, 3.94),
        "command-r7b-12-2024": (2.75, 4.0),
    }
    for model, interval in official.items():
        measure = scores[model].measures["score"]
        assert measure.lower is not None
        assert measure.upper is not None
        assert (round(measure.lower, 2), round(measure.upper, 2)) == interval


def test_v20_means_and_bootstraps_are_those_of_the_official_code(
    published: list[dict[str, Any]], golden: dict[str, Any]
) -> None:
    scores = arena_scores.score(
        three_models(published, golden), rules="v2.0", baseline=golden["baseline"], seed=0
    )
    for model in golden["models"]:
        mean = scores[model].measures["mean"]
        assert mean.value == 100 * golden["exact_mean"][model]
        assert mean.n == golden["n_battles"][model]
    for official in golden["bootstrap_seed0_noControl"]:
        measure = scores[official["model"]].measures["score"]
        assert (measure.value, measure.lower, measure.upper) == pytest.approx(
            tuple(100 * official[name] for name in ("scores", "lower", "upper")), abs=1e-10
        )


def test_v20_with_style_control_gives_the_official_bootstraps(
    published: list[dict[str, Any]], golden: dict[str, Any], style: dict[str, dict[str, Any]]
) -> None:
    scores = arena_scores.score(
        three_models(published, golden), rules="v2.0", baseline=golden["baseline"], seed=0, style=style
    )
    for official in golden["bootstrap_seed0_styleControl"]:
        if official["model"] != golden["baseline"]:
            measure = scores[official["model"]].measures["score"]
            # Points; float32 sums differ with the number of threads.
            assert (measure.value, measure.lower, measure.upper) == pytest.approx(
                tuple(100 * official[name] for name in ("scores", "lower", "upper")), abs=0.02
            )
            assert scores[official["model"]].official


def test_a_seed_fixes_the_intervals_and_none_draws_afresh() -> None:
    rows = [row("A>B", "A>B", uid=str(i)) if i % 3 else row("B>A", "A=B", uid=str(i)) for i in range(50)]

    def intervals(seed: int | None) -> tuple[float | None, float | None]:
        measure = arena_scores.score(rows, rules="v2.0", baseline="base", seed=seed)["ours"].measures["score"]
        return measure.lower, measure.upper

    assert intervals(3) == intervals(3)
    assert len({intervals(None) for _ in range(4)}) > 1


def test_categories_are_scored_apart_and_the_baseline_s_own_rows_left_out() -> None:
    rows = [
        row("B>A", "A>B", uid="1", category="hard_prompt", baseline="base"),
        row("A>B", "B>A", uid="2", category="creative_writing", baseline="muse"),
        row("A=B", "A=B", uid="1", category="hard_prompt", baseline="base", model="base"),
    ]
    for category, baseline, value in (("hard_prompt", "base", 100), ("creative_writing", "muse", 0)):
        scores = arena_scores.score(rows, rules="v2.0", baseline=baseline, category=category)
        assert scores.keys() == {"ours"}
        assert scores["ours"].measures["score"].value == value
    with pytest.raises(InputError, match="the judgments are against muse, not base"):
        arena_scores.score(rows, rules="v2.0", baseline="base")


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InputError, match="different judges"):
        arena_scores.score([row("A>B", "A>B"), row("A>B", "A>B", judge="k")], rules="v2.0", baseline="base")
    with pytest.raises(InputError, match="no judgments of category math"):
        arena_scores.score([], rules="v2.0", baseline="base", category="math")
    with pytest.raises(UnscoredError, match="no game of ours has a usable verdict"):
        arena_scores.score([row(None, None)], rules="v0.1", baseline="base")
    with pytest.raises(InputError, match=r"style control follows the v2.0 rules"):
        arena_scores.score([row("A>B", "A>B")], rules="v0.1", baseline="base", style={})


def test_repeated_rows_count_and_are_said_and_missing_fields_are_named() -> None:
    rows = [row("A>B", "A>B"), row("B>A", "A>B"), row(None, None, uid="r"), row(uid="s")]
    scores = arena_scores.score(rows, rules="v2.0", baseline="base")["ours"]
    assert scores.measures["mean"].value == 75
    assert scores.official
    assert scores.notes == ("1 rows repeat a question that has one already; all count, as upstream does",)
    assert [u.item for u in scores.unscored] == ["r", "s"]
    with pytest.raises(InputError, match="Arena-Hard judgment 1 has no 'games'"):
        arena_scores.score([{"uid": "q", "model": "m"}], rules="v2.0", baseline="base")


def test_another_fit_or_number_of_bootstraps_is_unofficial() -> None:
    scores = arena_scores.score([row("A>B", "A>B")], rules="v2.0", baseline="base", rounds=10)["ours"]
    assert not scores.official
    assert scores.notes == ("10 bootstraps; upstream takes 100",)
