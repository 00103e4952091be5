"""Objectives on each answer's own log-ratio: numbers worked by hand, and where their minima are."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.losses import LOSSES, apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from tests.losses.problems import POLICY, REFERENCE, ratios_of, sigmoid, slopes, softplus

# With beta = 0.5 the rewards are w = 0.5 * 2 and v = 0.5 * -3.
W, V = 1.0, -1.5
BY_HAND = {
    nca_pair: softplus(-W) + 0.5 * softplus(W) + 0.5 * softplus(V),
    bco_pair: softplus(-W) + softplus(V),
    # r = 2 and -3 against 1 and -1.
    sppo_hard: (2 - 1) ** 2 + (-3 + 1) ** 2,
    apo_zero: 1 - sigmoid(W) + sigmoid(V),
    apo_down: sigmoid(W) + 1 - sigmoid(W - V),
}
# By w and by v; d softplus(x) is sigma(x), d sigma(x) is sigma(x) sigma(-x).
SLOPES = {
    nca_pair: (-sigmoid(-W) + 0.5 * sigmoid(W), 0.5 * sigmoid(V)),
    bco_pair: (-sigmoid(-W), sigmoid(V)),
    sppo_hard: (2 * (2 - 1) / 0.5, 2 * (-3 + 1) / 0.5),
    apo_zero: (-sigmoid(W) * sigmoid(-W), sigmoid(V) * sigmoid(-V)),
    apo_down: (sigmoid(W) * sigmoid(-W) - sigmoid(V - W) * sigmoid(W - V), sigmoid(V - W) * sigmoid(W - V)),
}
every = pytest.mark.parametrize("objective", BY_HAND, ids=lambda objective: objective.__name__)


@every
def test_a_pair_worked_by_hand(objective) -> None:
    output = objective(POLICY, REFERENCE, beta=0.5)
    assert output.loss.item() == pytest.approx(BY_HAND[objective], rel=1e-13)
    assert (output.metrics["rewards/chosen"].item(), output.metrics["rewards/rejected"].item()) == (W, V)


@every
def test_its_gradient_worked_by_hand(objective) -> None:
    # Every token has the slope of its response's reward, times beta.
    chosen, rejected = slopes(objective(POLICY, REFERENCE, beta=0.5), POLICY)
    by_w, by_v = SLOPES[objective]
    assert chosen[0, :2].tolist() == pytest.approx([0.5 * by_w] * 2, rel=1e-12)
    assert rejected[0, :1].tolist() == pytest.approx([0.5 * by_v], rel=1e-12)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_nca_stops_at_a_chosen_reward_of_log_2(w: float, v: float) -> None:
    # sigma(-w) = sigma(w) / 2 there.
    best = nca_pair(*ratios_of(math.log(2), v), beta=1.0).loss.item()
    assert best <= nca_pair(*ratios_of(w, v), beta=1.0).loss.item() + 1e-12


@given(st.floats(-30, 30))
def test_apo_down_lowers_the_chosen_answer_too_unless_the_rejected_one_is_close(v: float) -> None:
    policy, reference = ratios_of(0.0, v)
    chosen, _ = slopes(apo_down(policy, reference, beta=1.0), policy)
    assert chosen[0, 0].item() >= -1e-12


@pytest.mark.parametrize("name", [objective.__name__ for objective in BY_HAND])
def test_bad_hyperparameters_are_named_with_their_range(name: str) -> None:
    with pytest.raises(InputError, match=r"beta = 0 is out of range: give a finite number > 0"):
        LOSSES[name].function(POLICY, REFERENCE, beta=0)
