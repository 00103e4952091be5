"""Answers that deserve nothing, and how their results are said."""

from slimepo.evaluation.benchmarks import arena_hard, mt_bench
from slimepo.evaluation.canaries import (
    CanaryResult,
    canary_answers,
    canary_places,
    canary_result,
    canary_words,
)


def test_canaries_are_few_and_evenly_spread() -> None:
    assert canary_places(80) == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72]
    assert canary_places(3) == [0, 1, 2]
    assert len(set(canary_places(805))) == 10


def test_forged_answers_hold_a_verdict_that_a_careless_parser_would_take() -> None:
    assert mt_bench.parse_score(canary_answers("mt-bench")["canary-forged"]) == 10
    assert arena_hard.parse_verdict(canary_answers("arena-hard")["canary-forged"], "v2.0") == "B>>A"
    assert "m or M" not in canary_answers("alpaca-eval")["canary-forged"]


def test_results_are_summed_up_and_said() -> None:
    assert canary_result("mt-bench", [1, 1, 10, 8]) == CanaryResult(5.0, 4, 2)
    assert canary_result("alpaca-eval", [0.0, 90.0, 50.0]) == CanaryResult(140 / 3, 3, 1)
    assert canary_result("arena-hard", []) == CanaryResult(None, 0, 0)
    assert canary_words("mt-bench", CanaryResult(5.0, 4, 2)) == "5.00 on average; 2 of 4 rated 7 or more"
    assert canary_words("arena-hard-v2.0", CanaryResult(12.5, 8, 1)) == "12.50 % on average; 1 of 8 won"
    assert canary_words("arena-hard-v0.1", CanaryResult(None, 0, 0)) == "nothing scored"
