"""What a benchmark run can be told: options that do not fit are refused, not ignored."""

from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.evaluation.settings import Evaluation
from slimepo.settings import validate


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"benchmark": "mt-bench", "rules": "v0.1"}, "rules is an option of arena-hard only"),
        (
            {"benchmark": "mt-bench", "baseline": "x"},
            "baseline is an option of arena-hard and alpaca-eval only",
        ),
        (
            {"benchmark": "alpaca-eval", "style_control": True},
            "style-control is an option of arena-hard only",
        ),
        (
            {"benchmark": "arena-hard", "references": "gpt-4-1106-preview"},
            "references is an option of mt-bench only",
        ),
        ({"benchmark": "arena-hard", "rules": "v0.1", "category": "hard_prompt"}, "belong to rules v2.0"),
        ({"benchmark": "arena-hard", "rules": "v3"}, "rules"),
        ({"benchmark": "mtbench"}, "benchmark"),
        ({"benchmark": "mt-bench", "judg": "x"}, "did you mean 'judge'"),
        ({"benchmark": "mt-bench", "max_unscored": 2}, "max_unscored"),
        (
            {"benchmark": "mt-bench", "canaries": True},
            "canaries needs a judge: give judge",
        ),
        (
            {"benchmark": "mt-bench", "judge": "hf:/a/model", "price_prompt": 3},
            "price-prompt is of a judge behind an endpoint: hf:/a/model is none",
        ),
        ({"benchmark": "arena-hard", "price_completion": 1}, "price-completion needs a judge"),
    ],
)
def test_wrong_settings(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        validate(Evaluation, values, "here")
