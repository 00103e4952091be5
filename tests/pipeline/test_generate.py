"""Answers from the command line: how a model samples unless it is told."""

import io
import re
from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.pipeline import generate as module
from slimepo.pipeline.generate import answer_prompts
from slimepo.terminal import make_console
from tests.command import slimepo

PROMPTS = [[{"role": "user", "content": "Tell me a story."}]]


def asked(
    model: Path, monkeypatch: pytest.MonkeyPatch, comes_with: dict[str, Any], **given: Any
) -> tuple[Any, str]:
    """What generation is asked for, and what is said of it."""
    loaded, seen = module.load_chat_model(str(model)), {}
    for name, value in comes_with.items():
        setattr(loaded.model.generation_config, name, value)
    monkeypatch.setattr(module, "load_chat_model", lambda name: loaded)

    def generate(model: Any, prompts: Any, **settings: Any) -> list[Any]:
        seen.update(settings)
        return [[] for _ in prompts]

    monkeypatch.setattr("slimepo.model.generate.generate", generate)
    console = make_console(file=io.StringIO(), width=200)
    answer_prompts("model", PROMPTS, None, console, max_new_tokens=4, **given)
    return (seen["temperature"], seen["top_p"]), console.file.getvalue()


def test_a_model_that_comes_with_sampling_samples_so_and_it_is_said(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comes_with = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    sampling, said = asked(llama_folder, monkeypatch, comes_with)
    assert sampling == (0.6, 0.9)
    assert "temperature 0.6, top_p 0.9, its top_k 20 left out" in said


@pytest.mark.parametrize("comes_with", [{}, {"do_sample": True, "temperature": 0.6}])
def test_what_is_given_counts(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, comes_with: dict[str, Any]
) -> None:
    assert asked(llama_folder, monkeypatch, comes_with, temperature=0.0) == ((0.0, 1.0), "")


def test_any_other_model_says_what_is_likeliest(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(llama_folder, monkeypatch, {}) == ((0.0, 1.0), "")


@pytest.mark.parametrize(
    ("given", "words"),
    [({"top_p": 0.9}, "--top-p has nothing to draw from"), ({"samples": 3}, "the same answer")],
)
@pytest.mark.parametrize("temperature", [0.0, None])
def test_what_only_sampling_can_do_is_refused_of_a_model_that_does_not_sample(
    llama_folder: Path, given: dict[str, Any], words: str, temperature: float | None
) -> None:
    console = make_console(quiet=True)
    with pytest.raises(InputError, match=f"{words}: give --temperature too"):
        answer_prompts(str(llama_folder), PROMPTS, None, console, temperature=temperature, **given)


def test_every_answer_follows_a_grammar_that_is_given(llama_folder: Path) -> None:
    """Of a model with random weights, through the command line's own path."""
    console = make_console(quiet=True)
    rows = answer_prompts(
        str(llama_folder), PROMPTS, None, console, temperature=1.0, samples=4, max_new_tokens=12,
        grammar='root ::= "[" [a-z]+ ("," [a-z]+)* "]"',
    )  # fmt: skip
    assert all(re.fullmatch(r"\[[a-z]+(,[a-z]+)*\]", text) for text in rows[0]["answers"])
    assert rows[0]["finished"] == [True] * 4


def test_a_grammar_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    done = slimepo("generate", "--model", "m", "--grammar", str(tmp_path / "absent.ebnf"), "Hello")
    assert done.returncode == 2
    assert "absent.ebnf: No such file or directory" in done.stderr
