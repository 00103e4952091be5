"""Answers to prompts from a file or the terminal, through a model's own chat template."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.data.messages import MalformedRow, as_turns, prompt_turns
from slimepo.errors import InputError
from slimepo.files import parse_json
from slimepo.model.chat import load_chat_model
from slimepo.types import Message

if TYPE_CHECKING:
    from rich.console import Console


def read_prompts(texts: Sequence[str], file: Path | None) -> list[list[Message]]:
    """Prompts given as words, from a file (one a line, or JSONL rows with `prompt`), or from the terminal.

    Raises:
        InputError: the file cannot be read, a row has no prompt, or there is no prompt at all.
    """
    prompts: list[Any] = list(texts)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if file.suffix == ".jsonl":
                try:
                    row = parse_json(line)
                    if "prompt" not in row:
                        raise KeyError("prompt")
                    prompts.append(prompt_turns(row))
                except MalformedRow as malformed:
                    raise InputError(f"{file}:{number}: {malformed}") from malformed
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{file}:{number}: no JSON row with a prompt in it") from error
            elif line.strip():
                prompts.append(line)
    if not prompts:
        if sys.stdin.isatty():
            print("prompts, one a line; end with Ctrl-D", file=sys.stderr)
        try:
            prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not {error.encoding} text: {error.reason}") from error
    if not prompts:
        raise InputError("no prompt: give one as an argument, with --prompts FILE, or on standard input")
    try:
        return [
            as_turns(prompt, f"prompt {number}", "user") for number, prompt in enumerate(prompts, start=1)
        ]
    except MalformedRow as malformed:
        raise InputError(str(malformed)) from malformed


def answer_prompts(
    model: str,
    prompts: Sequence[list[Message]],
    system: str | None,
    console: Console,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    grammar: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Load a model and let it answer; a stage of a run stands for the model in it.

    temperature, top_p: None takes those that the model comes with, and says so. grammar: a text that every answer
    follows (see `slimepo.model.grammar`). settings: as `slimepo.model.generate.generate` takes them.

    Returns:
        For each prompt a row: `prompt`, `answers`, and `finished`, which says of each whether it ended by itself.
    """
    from rich.progress import Progress

    from slimepo.data.render import encode_prompt
    from slimepo.model.generate import generate
    from slimepo.model.grammar import grammars_for

    if not math.isfinite(temperature or 0.0):
        raise InputError(f"--temperature {temperature} is no temperature; give a number, such as 1")
    loaded = load_chat_model(model)
    own = loaded.model.generation_config
    if temperature is None and own.do_sample:
        temperature, top_p = own.temperature or 1.0, (own.top_p or 1.0) if top_p is None else top_p
        left_out = f", its top_k {own.top_k} left out" if own.top_k else ""
        console.print(
            f"as the model comes: temperature {temperature:g}, top_p {top_p:g}{left_out}; --temperature 0 takes the "
            "likeliest token"
        )
    elif not temperature and (top_p is not None or settings.get("samples", 1) > 1):
        what = "--top-p has nothing to draw from" if top_p is not None else "all samples are the same answer"
        raise InputError(f"at temperature 0 {what}: give --temperature too, such as 1")
    start: list[Message] = [Message(role="system", content=system)] if system else []
    messages = [start + prompt for prompt in prompts]
    constraints = None
    if grammar is not None:
        grammars = grammars_for(loaded.model, loaded.tokenizer, loaded.end_ids)
        constraints = [functools.partial(grammars, grammar)] * len(prompts)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("answers", total=len(prompts))
        completions = generate(
            loaded.model,
            [encode_prompt(loaded.chat, prompt) for prompt in messages],
            end_token_ids=loaded.end_ids,
            temperature=temperature or 0.0,
            top_p=1.0 if top_p is None else top_p,
            constraints=constraints,
            **settings,
            progress=lambda done: progress.advance(task, done),
        )
    return [
        {
            "prompt": prompt,
            "answers": [loaded.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in of_prompt],
            "finished": [c.finished for c in of_prompt],
        }
        for prompt, of_prompt in zip(messages, completions, strict=True)
    ]


def show_answers(answers: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prompts and answers, readable in a terminal."""
    for row in answers:
        console.print(f"> {row['prompt'][-1]['content']}", style="bold")
        for text, finished in zip(row["answers"], row["finished"], strict=True):
            console.print(text + ("" if finished else " [cut at the token limit]"))
        console.print()
