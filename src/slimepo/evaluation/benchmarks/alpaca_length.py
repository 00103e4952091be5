"""AlpacaEval's length-controlled win rate: the win rate if outputs were as long as the baseline's.

A logistic model of the preference y (0 to 1) of a model over the baseline on instruction i,

    logit P(y) = a tanh(d_i / sd(d)) + b difficulty_i + c,      d_i = length(baseline) - length(model) in characters,

is fitted to the model's 805 preferences and, with weight 0.1 each, to two runs of the baseline told to be concise or
verbose ("gamed"; they share a and b, but not c). Then d is set to 0 and the predictions are averaged. The difficulties
come with the gamed runs and were fitted once over many models.

The fit is a logistic regression with an L1 penalty (liblinear, no intercept, seed 123) on each row twice, as a win
with weight y and as a loss with weight 1 - y; its strength is the one of ten that predicts held-out instructions best
in five folds.

Source: tatsu-lab/alpaca_eval at cd543a1, metrics/glm_winrate.py, length_controlled_v1 (arXiv 2404.04475).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks.bootstrap import Floats
from slimepo.evaluation.judge.request import Unscored
from slimepo.evaluation.rows import JsonObject

GAMED_WEIGHT = 0.2 / 2  # Upstream's 0.2, over its two gamed runs.
FOLDS = 5
SEED = 123
STRENGTHS = tuple(np.logspace(-4, 4, 10))


@dataclass(frozen=True)
class LengthData:
    """What the fit needs beside the model's own rows.

    `difficulty` [instructions], by position; of the gamed rows the preference (0 to 1), the length difference in
    standard deviations, and the position of the instruction.
    """

    difficulty: Floats
    gamed_preference: Floats
    gamed_length: Floats
    gamed_index: Any


def length_data(rows: Sequence[JsonObject]) -> LengthData:
    """From the rows of upstream's df_gamed.csv: preference, index, std_delta_len, instruction_difficulty.

    Raises:
        InputError: a column is missing or is not a number, or the indices have gaps.
    """
    try:
        index = np.array([int(row["index"]) for row in rows])
        columns = [
            np.array([float(row[name]) for row in rows])
            for name in ("preference", "std_delta_len", "instruction_difficulty")
        ]
    except KeyError as error:
        raise InputError(
            f"the gamed baseline's rows have no column {error}; use upstream's df_gamed.csv"
        ) from None
    except (TypeError, ValueError) as error:
        raise InputError(f"the gamed baseline's rows hold what is no number: {error}") from error
    size = int(index.max(initial=-1)) + 1
    # Where an instruction occurs twice its first difficulty counts, as upstream.
    where, first = np.unique(index, return_index=True)
    if len(where) != size or size == 0:
        raise InputError(f"the gamed baseline's rows name {len(where)} instructions of {size}")
    return LengthData(columns[2][first], columns[0], columns[1], index)


def length_controlled(
    preferences: Sequence[float], differences: Sequence[float], data: LengthData
) -> list[float] | Unscored:
    """The win probability (0 to 1) of each instruction at equal length; the mean is the length-controlled win rate.

    `preferences` are 1 to 2, NaN where there is none (it is predicted all the same, as upstream); `differences` are
    lengths of the baseline's outputs minus the model's. Both are in the order of the benchmark.

    Raises:
        InputError: there are more rows than instructions with a difficulty, or scikit-learn is not installed.
    """
    need_sklearn()
    n = len(preferences)
    if n > len(data.difficulty):
        raise InputError(f"{n} annotations, but instruction difficulties for {len(data.difficulty)} only")
    delta = np.asarray(differences, dtype=np.float64)
    spread = delta.std(ddof=1) if n > 1 else 0.0
    if not spread > 0:
        return Unscored("all length differences are equal")
    difficulty = data.difficulty[:n]
    target = np.asarray(preferences, dtype=np.float64) - 1
    known = ~np.isnan(target)
    own = np.column_stack([np.tanh(delta / spread), difficulty, np.ones(n)])[known]
    gamed = np.column_stack(
        [np.tanh(data.gamed_length), data.difficulty[data.gamed_index], np.zeros(len(data.gamed_index))]
    )
    weights = fit_weights(
        np.concatenate([gamed, own]),
        np.concatenate([data.gamed_preference, target[known]]),
        np.concatenate([np.full(len(gamed), GAMED_WEIGHT), np.ones(len(own))]),
    )
    return [float(p) for p in predictions(weights, difficulty)]


def need_sklearn() -> None:
    """Nothing, where scikit-learn is installed.

    Raises:
        InputError: it is not.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise InputError(
            "AlpacaEval's length control needs scikit-learn, which is not installed: pip install 'slimepo[eval]'"
        )


def predictions(weights: Sequence[float] | Floats, difficulty: Floats) -> Floats:
    """Win probabilities [instructions] at equal length from (length, difficulty, constant) weights."""
    result: Floats = 1 / (1 + np.exp(-(weights[1] * difficulty + weights[2])))
    return result


def fit_weights(features: Floats, target: Floats, weight: Floats) -> Floats:
    """Coefficients [3] of the penalised logistic regression of `target` (0 to 1), its strength chosen in five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    n = len(target)
    doubled = np.concatenate([features, features])
    label = np.repeat([1, 0], n)
    share = np.concatenate([target, 1 - target])
    group = np.tile(np.arange(n), 2)
    weight2 = np.concatenate([weight, weight])
    target2 = np.concatenate([target, target])

    def fitted(rows: Any, strength: float, random: np.random.RandomState) -> Floats:
        model = LogisticRegression(
            C=strength, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=random
        )
        model.fit(doubled[rows], label[rows], sample_weight=(share * weight2)[rows])
        coefficients: Floats = model.coef_[0]
        return coefficients

    losses = np.zeros(len(STRENGTHS))
    for train, test in GroupKFold(FOLDS).split(doubled, label, group):
        # As scikit-learn's own cross-validation, which upstream calls: the strengths of a fold draw in turn.
        random = np.random.RandomState(SEED)
        for i, strength in enumerate(STRENGTHS):
            p = 1 / (1 + np.exp(-doubled[test] @ fitted(train, strength, random)))
            p = np.clip(p, 1e-15, 1 - 1e-15)
            loss = target2[test] * np.log(p) + (1 - target2[test]) * np.log(1 - p)
            losses[i] -= (loss * weight2[test]).mean()
    return fitted(np.arange(2 * n), STRENGTHS[int(losses.argmin())], np.random.RandomState(SEED))
