"""What a cost takes off the reward, by either gate, and the policy that is best then."""

import json
import math
from typing import Any, Literal

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.losses import find_objective
from slimepo.model.generate import Completion
from slimepo.onpolicy.costs import costs_of, mean_cost, penalised, shaped
from slimepo.onpolicy.rewards import Prompt, Rewarder
from slimepo.onpolicy.rollouts import figures, records, roll_out
from slimepo.onpolicy.settings import Cost, rollout_settings

Gate = Literal["answer", "batch"]
THRESHOLD = 1 + math.log(3)


def best_share(weight: float, limit: float = 0.25, gate: Gate = "batch") -> float:
    """p of the first of two answers with r = c = (1, 0) where J_R - KL(p || uniform) less the penalty is highest.

    Its derivative is s_1 - s_0 - log(p / (1 - p)) with s the shaped rewards of the policy p, and falls in p.
    """
    cost = Cost(limit=limit, weight=weight, gate=gate)
    low, high = 0.0, 1.0
    while high - low > 1e-15 * high:
        p = (low + high) / 2
        first, second = shaped(np.array([1.0, 0.0]), np.array([1.0, 0.0]), p, cost)
        low, high = (p, high) if first - second > math.log(p / (1 - p)) else (low, p)
    return low


class TestTheBestPolicy:
    """Two answers, r = c = (1, 0), a uniform reference, beta = 1, a limit of .25."""

    @pytest.mark.parametrize("weight", [THRESHOLD, 3.0, 20.0, 1e6])
    def test_from_the_threshold_on_it_costs_the_limit_exactly(self, weight: float) -> None:
        assert pytest.approx(2.0986, abs=1e-4) == THRESHOLD
        assert best_share(weight) == pytest.approx(0.25, abs=1e-12)

    def test_below_it_costs_more(self) -> None:
        """p = sigmoid(1 - weight), down to the limit."""
        assert best_share(1.0) == pytest.approx(0.5, abs=1e-12)
        assert best_share(THRESHOLD - 0.01) == pytest.approx(1 / (1 + math.exp(THRESHOLD - 1.01)), abs=1e-12)
        assert best_share(THRESHOLD - 0.01) > 0.25

    def test_a_penalty_without_a_gate_refuses_nearly_everything(self) -> None:
        assert best_share(20.0, limit=-1.0) == pytest.approx(5.6e-9, rel=1e-2)

    def test_the_answer_gate_goes_on_below_the_limit(self) -> None:
        """p = sigmoid(1 - .75 weight): the limit is met at (1 + ln 3) / .75 alone."""
        assert best_share(THRESHOLD / 0.75, gate="answer") == pytest.approx(0.25, abs=1e-12)
        assert best_share(20.0, gate="answer") == pytest.approx(8.3e-7, rel=1e-2)

    def test_no_policy_is_penalised_less_by_the_answer_gate(self) -> None:
        costs = np.array([1.0, 0.3, -0.5])
        cost = Cost(limit=0.25, weight=2.0, gate="answer")
        for share in np.random.default_rng(0).dirichlet(np.ones(3), 200):
            penalty = -share @ shaped(np.zeros(3), costs, math.nan, cost)
            assert penalty >= 2.0 * max(share @ costs - 0.25, 0) - 1e-12


class TestGates:
    def test_answer_by_answer(self) -> None:
        cost = Cost(limit=0.5, weight=4.0, gate="answer")
        found = shaped(np.array([[1.0, 1.0, 1.0]]), np.array([[0.75, 0.5, -3.0]]), 9.0, cost)
        assert found.tolist() == [[0.0, 1.0, 1.0]]

    @pytest.mark.parametrize(("mean", "left"), [(0.6, [-2.0, 1.0, 3.0]), (0.5, [1.0, 1.0, 1.0])])
    def test_all_answers_or_none(self, mean: float, left: list[float]) -> None:
        """At the limit itself nothing comes off; beyond it a cost below 0 is worth something."""
        cost = Cost(limit=0.5, weight=4.0)
        assert shaped(np.ones(3), np.array([0.75, 0.0, -0.5]), mean, cost).tolist() == left

    @pytest.mark.parametrize("gate", ["answer", "batch"])
    def test_without_a_reward_or_a_cost_there_is_no_reward(self, gate: Gate) -> None:
        cost = Cost(limit=0.5, weight=4.0, gate=gate)
        found = shaped(np.array([math.nan, 1.0]), np.array([0.0, math.nan]), 0.0, cost)
        assert np.isnan(found).all()

    def test_the_mean_is_over_all_answers_in_any_order(self) -> None:
        costs = np.random.default_rng(0).normal(size=1000).tolist()
        assert mean_cost([costs[:10], costs[10:]]) == mean_cost([costs[::-1]]) == math.fsum(costs) / 1000
        assert math.isnan(mean_cost([[], []]))


def worth(prompt: Any, texts: Any, row: Any) -> list[float]:
    return [float(len(text)) for text in texts]


def price(prompt: Any, texts: Any, row: Any) -> list[float]:
    if row.get("free"):
        raise ValueError("no price")
    return [float(text.count("a")) for text in texts]


def test_a_rollout_with_costs() -> None:
    """Two prompts with two samples and two answers of an opponent each; the second has no price."""
    prompts = [Prompt("p0", [], {}, [0]), Prompt("p1", [], {"free": True}, [1])]

    def saying(*texts: str) -> Any:
        return lambda given, seeds: [[Completion([*map(ord, text)], True) for text in texts] for _ in given]

    given = roll_out(
        prompts, [0, 1], saying("aa", "bbb"), lambda c: "".join(map(chr, c.token_ids)),
        Rewarder({"worth": (worth, 1.0)}), (saying("a", "b"), [2, 3]),
        Rewarder({"price": (price, 1.0)}, on_error="skip", what="cost"),
    )  # fmt: skip
    rollout = penalised(given, mean=1.0, cost=Cost(limit=0.5, weight=2.0))
    np.testing.assert_array_equal(rollout.rewards, [[-2.0, 3.0], [math.nan] * 2])
    assert rollout.against is not None
    np.testing.assert_array_equal(rollout.against.rewards, [[-1.0, 1.0], [math.nan] * 2])
    assert rollout.skipped == ["", "cost 'price' fails on row p1: ValueError: no price"]
    lines = [json.loads(json.dumps(line)) for line in records(rollout, 3)]
    assert lines[0]["rewards"] == [-2.0, 3.0]
    assert (lines[0]["parts"], lines[0]["costs"]) == ({"worth": [2.0, 3.0]}, [2.0, 0.0])
    assert lines[0]["against"]["costs"] == [1.0, 0.0]
    assert lines[1]["costs"] == [None, None]
    assert costs_of(lines, steps=1) == [[2.0, 0.0]]
    found = figures(rollout, [], pairs=False)
    assert (found["sampled/cost"], found["reward"], found["reward/worth"]) == (1.0, 0.5, 2.5)


def test_costs_of_a_file_are_those_of_each_rollout() -> None:
    lines = [{"step": step, "costs": [float(step), None]} for step in (1, 1, 2, 3, 4, 5)]
    assert costs_of(lines, steps=2) == [[1.0, 1.0, 2.0], [3.0, 4.0], [5.0]]


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        ({"weight": 1}, "cost.limit is missing"),
        ({"limit": 1}, "cost.weight is missing"),
        ({"limit": "inf", "weight": 1}, "cost.limit: Input should be a finite number"),
        ({"limit": 1, "weight": 0}, "cost.weight: Input should be greater than 0"),
        ({"limit": 1, "weight": 1, "gate": "row"}, "cost.gate: Input should be 'answer' or 'batch'"),
        ({"limit": 1, "weight": 1, "window": 0}, "cost.window: Input should be greater than or equal to 1"),
        ({"limit": 1, "weight": 1, "windw": 2}, "did you mean 'window'"),
        ({"limit": 1, "weight": 1, "gate": "answer", "window": 2}, "cost.window is for gate: batch"),
    ],
)
def test_what_is_refused(cost: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        rollout_settings({"cost": cost}, "grpo", find_objective("grpo"))


def test_the_batch_gate_would_mislead_a_search_of_thresholds() -> None:
    rollouts: dict[str, Any] = {"admit": {"thresholds": [0, 1]}, "cost": {"limit": 1, "weight": 1}}
    with pytest.raises(InputError, match=r"give cost\.gate = answer"):
        rollout_settings(rollouts, "slime", find_objective("slime"))
    rollouts["cost"]["gate"] = "answer"
    assert rollout_settings(rollouts, "slime", find_objective("slime")) is not None
