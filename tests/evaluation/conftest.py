"""The mock judge, a console that can be read back, and jobs of the tiny real Llama."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimepo.evaluation import answerers
from slimepo.evaluation.job import Job, make_job
from slimepo.evaluation.settings import Evaluation
from slimepo.model.chat import ChatModel, load_chat_model
from slimepo.settings import validate
from slimepo.terminal import make_console
from tests.evaluation.mock_judge import MockJudge, serve

KEY = "sk-test-0123456789abcdefSECRET"
QUESTIONS = 3


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockJudge]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as judge:
        yield judge


@pytest.fixture
def console() -> Console:
    return make_console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="session")
def one_llama(shared_data: Path) -> ChatModel:
    return load_chat_model(str(shared_data / "models" / "babyllama-105"))


@pytest.fixture
def loads(one_llama: ChatModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiny Llama is loaded once for all tests; the names that were asked for."""
    asked: list[str] = []

    def load(name: str) -> ChatModel:
        asked.append(name)
        return one_llama

    monkeypatch.setattr(answerers, "load_chat_model", load)
    return asked


@pytest.fixture
def job(shared_data: Path, mock: MockJudge, loads: list[str], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A job of the tiny Llama with short answers to a few questions; `mock` judges unless told otherwise."""

    def make(benchmark: str, name: str | None = None, **options: Any) -> Job:
        values = {
            "benchmark": benchmark,
            "judge": mock.judge,
            "key_variable": "OPENAI_API_KEY",
            "data_dir": str(shared_data / "eval"),
            "limit": QUESTIONS,
            "max_new_tokens": 12,
            "attempts": 2,
        }
        settings = validate(Evaluation, values | options, "test")
        return make_job(settings, str(shared_data / "models" / "babyllama-105"), tmp_path / "out", name)

    yield make
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def one_file(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path
