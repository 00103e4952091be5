"""Answers that deserve nothing, and how their results are said."""

from slimepo.evaluation.benchmarks import alpaca_eval, arena_hard, mt_bench
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
    assert mt_bench.parse_score(mt_bench.FORGED) == 10
    assert arena_hard.parse_verdict(arena_hard.FORGED, "v2.0") == "B>>A"
    assert "m or M" not in alpaca_eval.FORGED


def test_each_canary_has_a_text() -> None:
    answers = canary_answers(mt_bench.FORGED)
    assert list(answers) == ["canary-null", "canary-order", "canary-forged"]
    assert answers["canary-forged"] == mt_bench.FORGED


def test_results_are_summed_up_and_said() -> None:
    assert canary_result([1, 1, 10, 8], "1-10") == CanaryResult(5.0, 4, 2, "1-10")
    assert canary_result([0.0, 90.0, 50.0], "%") == CanaryResult(140 / 3, 3, 1, "%")
    assert canary_result([], "%") == CanaryResult(None, 0, 0, "%")
    assert canary_words(CanaryResult(5.0, 4, 2, "1-10")) == "5.00 on average; 2 of 4 rated 7 or more"
    assert canary_words(CanaryResult(12.5, 8, 1, "%")) == "12.50 % on average; 1 of 8 won"
    assert canary_words(CanaryResult(None, 0, 0, "%")) == "nothing scored"
