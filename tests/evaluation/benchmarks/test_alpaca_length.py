"""The length-controlled win rate on made-up models whose answer is known."""

import math

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks import alpaca_length
from slimepo.evaluation.benchmarks.alpaca_length import LengthData, length_controlled
from slimepo.evaluation.judge.request import Unscored

sklearn = pytest.importorskip("sklearn")
N = 200


def sigmoid(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-x))
    return result


@pytest.fixture(scope="module")
def data() -> LengthData:
    """Gamed runs of which one is shorter and loses by the same law by which the other is longer and wins."""
    length = np.random.RandomState(0).normal(size=N) - 1
    return LengthData(
        np.zeros(N),
        sigmoid(-2 * np.tanh(np.concatenate([length, -length]))),
        np.concatenate([length, -length]),
        np.tile(np.arange(N), 2),
    )


def test_a_model_that_wins_by_length_alone_is_even_at_equal_length(data: LengthData) -> None:
    differences = np.random.RandomState(1).normal(size=N) * 500 - 400
    share = sigmoid(-2 * np.tanh(differences / differences.std(ddof=1)))
    controlled = length_controlled((1 + share).tolist(), differences.tolist(), data)
    assert not isinstance(controlled, Unscored)
    assert share.mean() > 0.65
    assert np.mean(controlled) == pytest.approx(0.5, abs=0.01)


def test_what_the_model_wins_beside_length_stays(data: LengthData) -> None:
    differences = np.random.RandomState(1).normal(size=N) * 500
    share = sigmoid(-2 * np.tanh(differences / differences.std(ddof=1)) + 1)
    controlled = length_controlled((1 + share).tolist(), differences.tolist(), data)
    assert not isinstance(controlled, Unscored)
    assert np.mean(controlled) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_the_penalty_is_the_one_that_scikit_learns_cross_validation_chooses() -> None:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    random = np.random.RandomState(5)
    features, target = random.normal(size=(300, 3)), random.uniform(size=300)
    weight = np.where(np.arange(300) < 100, 0.1, 1.0)
    x, y = np.tile(features, (2, 1)), np.repeat([1, 0], 300)
    share, both = np.concatenate([target, 1 - target]), np.tile(weight, 2)

    def loss(truth: np.ndarray, p: np.ndarray, share: np.ndarray, both: np.ndarray) -> float:
        wanted = np.where(truth == 1, share, 1 - share)
        return -float(np.mean(both * (wanted * np.log(p) + (1 - wanted) * np.log(1 - p))))

    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(loss, response_method="predict_proba", greater_is_better=False)
        theirs = LogisticRegressionCV(
            cv=GroupKFold(5), scoring=scorer.set_score_request(share=True, both=True), random_state=123,
            l1_ratios=(1,), solver="liblinear", fit_intercept=False, use_legacy_attributes=False,
        )  # fmt: skip
        theirs.set_fit_request(sample_weight=True)
        groups = np.tile(np.arange(300), 2)
        theirs.fit(x, y, sample_weight=share * both, groups=groups, share=share, both=both)
    np.testing.assert_array_equal(alpaca_length.fit_weights(features, target, weight), theirs.coef_[0])


def test_rows_without_preference_are_predicted_all_the_same(data: LengthData) -> None:
    differences = np.random.RandomState(1).normal(size=N) * 500
    preferences = (1 + sigmoid(-differences / 500)).tolist()
    preferences[3] = math.nan
    controlled = length_controlled(preferences, differences.tolist(), data)
    assert not isinstance(controlled, Unscored)
    assert len(controlled) == N
    assert not any(math.isnan(p) for p in controlled)


def test_predictions_by_hand() -> None:
    # logit = 2 * 0.5 - 1 = 0 and 2 * 1 - 1 = 1; the weight of length plays no part.
    assert alpaca_length.predictions([9.0, 2.0, -1.0], np.array([0.5, 1.0])) == pytest.approx(
        [0.5, 1 / (1 + math.exp(-1))]
    )


def test_columns_of_the_gamed_rows() -> None:
    rows = [
        {"preference": "0.1", "index": "1", "std_delta_len": "2.5", "instruction_difficulty": "-1", "x": ""},
        {"preference": "0.3", "index": "0", "std_delta_len": "0", "instruction_difficulty": "4", "x": ""},
        {"preference": "0.4", "index": "1", "std_delta_len": "1", "instruction_difficulty": "-1", "x": ""},
    ]
    data = alpaca_length.length_data(rows)
    assert data.difficulty.tolist() == [4, -1]
    assert data.gamed_preference.tolist() == [0.1, 0.3, 0.4]
    assert data.gamed_length.tolist() == [2.5, 0, 1]
    assert data.gamed_index.tolist() == [1, 0, 1]


def test_a_file_that_is_not_upstream_s_is_refused() -> None:
    row = {"preference": 0.1, "index": 0, "std_delta_len": 1, "instruction_difficulty": 1}
    with pytest.raises(InputError, match="no column 'preference'"):
        alpaca_length.length_data([{"index": 0}])
    with pytest.raises(InputError, match="hold what is no number"):
        alpaca_length.length_data([row | {"preference": "much"}])
    with pytest.raises(InputError, match="name 1 instructions of 4"):
        alpaca_length.length_data([row | {"index": 3}])
    with pytest.raises(InputError, match="2 annotations, but instruction difficulties for 1 only"):
        length_controlled([1.0, 2.0], [1.0, 2.0], alpaca_length.length_data([row]))
