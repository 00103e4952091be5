"""A console that can be read back and the tiny Llama, as in the tests of evaluation."""

from tests.evaluation.conftest import console, loads, one_llama

__all__ = ["console", "loads", "one_llama"]
