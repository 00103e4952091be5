"""The mock judge and a console that can be read back."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from tests.evaluation.mock_judge import MockJudge, serve

KEY = "sk-test-0123456789abcdefSECRET"


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockJudge]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as judge:
        yield judge


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
