"""Optional libraries that a benchmark run will need, looked for before anything is generated, trained or paid for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from slimepo.errors import InputError
from slimepo.evaluation.judge.client import is_endpoint
from slimepo.evaluation.judge.many import LOCAL
from slimepo.evaluation.settings import Evaluation


def need_libraries(settings: Evaluation, model: str, steps: Sequence[str]) -> None:
    """Nothing, where every library that these steps will import is there.

    Raises:
        InputError: one is not; the line says what needs it and how to install it.
    """
    judge = settings.judge
    asks = "judge" in steps and judge is not None and not judge.startswith(LOCAL)
    answers_by_endpoint = "answer" in steps and is_endpoint(model)
    if asks or answers_by_endpoint:
        _need("openai", "the openai library", f"the judge {judge}" if asks else model)
    if judge is not None and "score" in steps and _fits(settings):
        _need("sklearn", "scikit-learn", f"the score of {settings.benchmark}")
    if "answer" in steps and settings.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed: pip install vllm, or take backend hf")


def _fits(settings: Evaluation) -> bool:
    """Whether the score comes from a regression: AlpacaEval's length control."""
    return settings.benchmark == "alpaca-eval" and settings.limit is None and settings.baseline is None


def _need(module: str, library: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{what} needs {library}, which is not installed: pip install 'slimepo[eval]'")
