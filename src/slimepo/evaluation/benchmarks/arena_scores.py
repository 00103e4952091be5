"""Arena-Hard: from verdicts to scores with intervals, by both official rule sets.

A verdict with `>>` counts three times, one with `>` once, a tie once as half. Each question is played twice, with the
baseline as A and as B.

    v0.1  a game without a usable verdict is dropped alone; Bradley-Terry without penalty over all models at once, 100
          bootstraps of all battles, 2.5 to 97.5 percentiles of the rating; score: win rate against the baseline
    v2.0  both games or neither; mean of 100 bootstrap means a model, 5 to 95 percentiles; with style control the
          median of 100 fits (`arena_style`), 5 to 95 percentiles

The official code draws its v2.0 bootstraps without a seed (v0.1: seed 42 at import, over files in no fixed order), so
its intervals differ a little from run to run. Here `seed` fixes them: seed s draws what the official code draws after
`numpy.random.seed(s)`, with the rows in the order given. `seed=None` draws afresh, as upstream's v2.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.benchmarks.arena_style import STYLE_FEATURES, style_scores
from slimepo.evaluation.judge.request import Identity, Measure, Scores, Unscored, sha256_of
from slimepo.evaluation.rows import JsonObject, need

Rules = Literal["v0.1", "v2.0"]
NAMES: Mapping[Rules, str] = {"v0.1": "arena-hard-v0.1", "v2.0": "arena-hard-v2.0"}
ROUNDS = 100
SEED = 42

# What a verdict is worth to the player shown as A, and how often it counts. v0.1 knows the first five only.
_VERDICTS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
_MORE_VERDICTS = {"A<<B": (0.0, 3), "A<B": (0.0, 1), "B=A": (0.5, 1), "B<A": (1.0, 1), "B<<A": (1.0, 3)}
VERDICTS: Mapping[Rules, Mapping[str, tuple[float, int]]] = {
    "v0.1": _VERDICTS,
    "v2.0": _VERDICTS | _MORE_VERDICTS,
}


@dataclass(frozen=True)
class Battle:
    """One counted comparison with the baseline: `outcome` is 1 where the model won, 0.5 for a tie, 0 for a loss."""

    model: str
    question_id: str
    outcome: float


def question_id(row: JsonObject) -> str:
    """The id of a question, answer or judgment: `uid` since 2025, `question_id` before."""
    try:
        return str(row["uid"] if "uid" in row else row["question_id"])
    except KeyError:
        raise InputError(
            f"an Arena-Hard row has neither uid nor question_id (it has {', '.join(row)})"
        ) from None


def battles_of(row: JsonObject, rules: Rules) -> tuple[list[Battle], list[Unscored]]:
    """The battles of one judgment row (two games), repeated by weight, and what had to be left out.

    v2.0 lists the second game first, as upstream does: seeded bootstraps depend on the order.
    """
    model, uid = row["model"], question_id(row)
    outcomes: list[list[float]] = []
    unscored = []
    for number, game in enumerate([*(row["games"] or [])[:2], None, None][:2], 1):
        verdict = game.get("score") if game else None
        worth = VERDICTS[rules].get(verdict) if isinstance(verdict, str) else None
        if worth is None:
            reason = f"verdict '{verdict}' is none of the known ones" if verdict else "no verdict"
            reason = game.get("unscored") or reason if game else "no game"
            unscored.append(Unscored(reason, f"{uid}/game-{number}"))
            outcomes.append([])
        else:
            # The model is B in the first game and A in the second.
            outcomes.append([worth[0] if number == 2 else 1 - worth[0]] * worth[1])
    if rules == "v0.1":
        return [Battle(model, uid, o) for game in outcomes for o in game], unscored
    if unscored:
        return [], [Unscored(unscored[0].reason, uid)]
    return [Battle(model, uid, o) for game in reversed(outcomes) for o in game], []


def game_outcomes(row: JsonObject, rules: Rules) -> list[float | None]:
    """How each of the two games of a judgment row ended for the model, from 0 to 1; None without a usable verdict."""
    outcomes: list[float | None] = []
    # The model is B in the first game and A in the second.
    for number, game in enumerate((row["games"] or [])[:2], 1):
        verdict = game.get("score") if game else None
        worth = VERDICTS[rules].get(verdict) if isinstance(verdict, str) else None
        outcomes.append(None if worth is None else worth[0] if number == 2 else 1 - worth[0])
    return outcomes


def score(
    rows: Sequence[JsonObject],
    *,
    rules: Rules,
    baseline: str,
    category: str | None = None,
    questions: Sequence[JsonObject] | None = None,
    prompts: str | None = None,
    seed: int | None = SEED,
    rounds: int = ROUNDS,
    style: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Scores]:
    """Scores, in percent, of every model in judgment rows against `baseline`; its own rows are left out.

    `category` takes only rows of that category. `questions` makes questions without a row unscored. `prompts` is a hash
    of the judge prompts, for the record. `style` maps model and question id to the style of the answer, for the
    baseline too (`arena_style.style_metadata`); with it the v2.0 scores are style-controlled, over all models at once.

    Measures: "score", and "mean", the plain share of weighted wins, which has no randomness.

    Raises:
        InputError: judges are mixed, or style is asked of v0.1.
        UnscoredError: a model has no usable game.
    """
    need(rows, ("model", "games", "judge"), "Arena-Hard judgment")
    rows = [r for r in rows if (category is None or r.get("category") == category) and r["model"] != baseline]
    judge = _one_judge(rows, baseline, category)
    if style is not None and rules == "v0.1":
        raise InputError("style control follows the v2.0 rules; use rules v2.0, or leave style away")
    battles, scored, unscored = _collect(rows, rules, questions, category)
    if rules == "v0.1":
        headline = _bradley_terry_scores(battles, seed, rounds)
    elif style is None:
        headline = _mean_scores(battles, seed, rounds)
    else:
        headline = style_scores(
            [(b.model, b.question_id, b.outcome) for b in battles], baseline, style, seed, rounds
        )
    settings: dict[str, Any] = {"category": category, "seed": seed, "rounds": rounds}
    settings |= {"style": list(STYLE_FEATURES)} if style is not None else {}
    asked = sha256_of([dict(q) for q in questions]) if questions else None
    identity = Identity(NAMES[rules], judge, rules, prompts, baseline, asked, settings)
    deviations = (f"{rounds} bootstraps; upstream takes {ROUNDS}",) if rounds != ROUNDS else ()
    return {
        model: Scores(
            model,
            identity,
            headline="score",
            unit="%",
            measures={"score": headline[model], "mean": _mean(battles, model)},
            scored=scored[model],
            unscored=tuple(left_out),
            official=not deviations,
            notes=deviations + _repeats(rows, model),
        )
        for model, left_out in unscored.items()
    }


def _one_judge(rows: Sequence[JsonObject], baseline: str, category: str | None) -> str:
    judges = sorted({str(row["judge"]) for row in rows})
    if not judges:
        raise InputError(f"there are no judgments{f' of category {category}' if category else ''} to score")
    if len(judges) > 1:
        raise InputError(f"judgments of different judges ({', '.join(judges)}) cannot be scored together")
    others = [str(row["baseline"]) for row in rows if row.get("baseline") not in (None, baseline)]
    if others:
        raise InputError(f"the judgments are against {others[0]}, not {baseline}")
    return judges[0]


def _repeats(rows: Sequence[JsonObject], model: str) -> tuple[str, ...]:
    questions = [question_id(row) for row in rows if row["model"] == model]
    more = len(questions) - len(set(questions))
    return (f"{more} rows repeat a question that has one already; all count, as upstream does",) * (more > 0)


def _collect(
    rows: Sequence[JsonObject], rules: Rules, questions: Sequence[JsonObject] | None, category: str | None
) -> tuple[list[Battle], dict[str, int], dict[str, list[Unscored]]]:
    """All battles; of each model how many items (v0.1: games; v2.0: pairs of games) are scored, and which are not."""
    battles: list[Battle] = []
    scored: dict[str, int] = {}
    unscored: dict[str, list[Unscored]] = {}
    for row in rows:
        more, left_out = battles_of(row, rules)
        battles += more
        unscored.setdefault(row["model"], []).extend(left_out)
        items = 2 if rules == "v0.1" else 1
        scored[row["model"]] = scored.get(row["model"], 0) + items - len(left_out)
    for model, left_out in unscored.items():
        if scored[model] == 0:
            raise UnscoredError(f"no game of {model} has a usable verdict ({left_out[0].reason})")
        judged = {question_id(r) for r in rows if r["model"] == model}
        for question in questions or ():
            uid = question_id(question)
            if uid not in judged and (category is None or question.get("category", category) == category):
                games = [f"{uid}/game-1", f"{uid}/game-2"] if rules == "v0.1" else [uid]
                left_out += [Unscored("not judged", item) for item in games]
    return battles, scored, unscored


def _mean(battles: Sequence[Battle], model: str) -> Measure:
    outcomes = [b.outcome for b in battles if b.model == model]
    return Measure(100 * float(np.mean(outcomes)), len(outcomes))


def _mean_scores(battles: Sequence[Battle], seed: int | None, rounds: int) -> dict[str, Measure]:
    """The mean of bootstrap means with 5 and 95 percentiles, model by model in order of their short names."""
    random = np.random.RandomState(seed)
    models = sorted({b.model for b in battles}, key=lambda name: name.split("/")[-1])
    outcomes = {m: np.array([b.outcome for b in battles if b.model == m]) for m in models}
    means: dict[str, list[float]] = {m: [] for m in models}
    for _ in range(rounds):
        for model in models:
            n = len(outcomes[model])
            means[model].append(float(outcomes[model][random.choice(n, size=n, replace=True)].mean()))
    ends = {m: [100 * float(q) for q in np.quantile(means[m], [0.05, 0.95])] for m in models}
    return {
        m: Measure(100 * float(np.mean(means[m])), len(outcomes[m]), ends[m][0], ends[m][1]) for m in models
    }


def _bradley_terry_scores(battles: Sequence[Battle], seed: int | None, rounds: int) -> dict[str, Measure]:
    """Win rates against the baseline, with percentiles of the Bradley-Terry ratings.

    All battles are against the one baseline, so that the likelihood falls apart into one factor a model and its
    maximum is in closed form: the win rate is the share s of weighted wins, the rating log(s / (1 - s)), the
    baseline's rating being the zero. (Upstream anchors its bootstraps only where the baseline is gpt-4-0314. With
    another one the baseline's rating floats too and has percentiles of its own, and the interval is the win rate of
    one percentile over the other, which is narrower than the spread of the win rate.)
    """
    models = list(dict.fromkeys(b.model for b in battles))
    player = np.array([models.index(b.model) for b in battles])
    outcome = np.array([b.outcome for b in battles])

    def shares(chosen: Any) -> Any:
        wins = np.bincount(player[chosen], weights=outcome[chosen], minlength=len(models))
        # NaN for a model that was not drawn, which counts in no percentile.
        with np.errstate(invalid="ignore"):
            return wins / np.bincount(player[chosen], minlength=len(models))

    whole = shares(np.arange(len(battles)))
    random = np.random.RandomState(seed)
    draws = np.array(
        [shares(random.choice(len(battles), size=len(battles), replace=True)) for _ in range(rounds)]
    )
    # Percentiles interpolate between ratings, as upstream; that of a model that never lost would be infinite.
    draws = draws.clip(1e-9, 1 - 1e-9)
    ratings = np.nanpercentile(np.log(draws / (1 - draws)), [2.5, 97.5], axis=0)
    lower, upper = 100 / (1 + np.exp(-ratings))
    counts = np.bincount(player)
    return {
        model: Measure(100 * float(whole[i]), int(counts[i]), float(lower[i]), float(upper[i]))
        for i, model in enumerate(models)
    }
