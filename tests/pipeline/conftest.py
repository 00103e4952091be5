"""The mock judge and the tiny Llama, as in the tests of evaluation."""

from tests.evaluation.conftest import console, loads, mock, one_llama

__all__ = ["console", "loads", "mock", "one_llama"]
