"""A console that can be read back, and jobs of the tiny real Llama."""

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
from tests.evaluation.mock_judge import KEY, MockJudge

QUESTIONS = 3


@pytest.fixture
def console() -> Console:
    return make_console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="session")
def one_llama(llama_folder: Path) -> ChatModel:
    return load_chat_model(str(llama_folder))


@pytest.fixture
def loads(one_llama: ChatModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiny Llama is loaded once for all tests; the names that were asked for."""
    asked: list[str] = []

    def load(name: str, dtype: str) -> ChatModel:
        asked.append(name)
        return one_llama

    monkeypatch.setattr(answerers, "load_chat_model", load)
    return asked


@pytest.fixture
def job(
    data_dir: Path, llama_folder: Path, mock: MockJudge, loads: list[str], tmp_path: Path
) -> Iterator[Callable[..., Job]]:
    """A job of the tiny Llama with short answers to a few questions; `mock` judges unless told otherwise."""

    def make(benchmark: str, name: str | None = None, **options: Any) -> Job:
        values = {
            "benchmark": benchmark,
            "judge": mock.judge,
            "key_variable": "OPENAI_API_KEY",
            "data_dir": str(data_dir),
            "limit": QUESTIONS,
            "max_new_tokens": 12,
            "attempts": 2,
        }
        settings = validate(Evaluation, values | options, "test")
        return make_job(settings, str(llama_folder), tmp_path / "out", name)

    yield make
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def one_file(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path
