"""Tasks with answers that a function checks: read from files, answered greedily, judged, measured."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.data.files import BadRow, file_rows
from slimepo.data.messages import MalformedRow, as_turns
from slimepo.data.render import ChatFormat, RowRefused, encode_prompt
from slimepo.errors import InputError
from slimepo.imports import find_function
from slimepo.types import Message, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.pipeline.recipe.schema import Recipe

SMOKE_TASKS, SMOKE_TOKENS = 24, 8

_LONGEST_BLOCK = 12
_LOOP_EXTRA = 3


@dataclass(frozen=True)
class Task:
    """A prompt and the whole `row` it stands in, which a checker is given; `id` is the row's, or its place."""

    id: str
    prompt: list[Message]
    row: Mapping[str, Any]

    @property
    def gold(self) -> str | None:
        """The right answer, where the row has one."""
        answer = self.row.get("answer")
        return None if answer is None else str(answer)

    @property
    def family(self) -> str:
        """The kind of task, of which figures are given apart; empty where the row names none."""
        return str(self.row.get("family") or "")


@dataclass(frozen=True)
class Answer:
    """What a model said to a task, judged; `text` is without the end token, `tokens` with it."""

    text: str
    finished: bool
    tokens: int
    verdict: Verdict


@dataclass(frozen=True)
class RunTasks:
    """The tasks of a run, and the function that judges an answer to one of them."""

    train: list[Task]
    heldout: list[Task]
    check: Callable[[Task, str], Verdict]
    max_new_tokens: int
    batch_rows: int

    @property
    def facts(self) -> dict[str, Any]:
        """Counts and fingerprints, so that a run does not go on with other tasks."""
        facts = {}
        for name, tasks in {"train": self.train, "heldout": self.heldout}.items():
            rows = json.dumps([each.row for each in tasks], sort_keys=True, default=str, ensure_ascii=False)
            digest = hashlib.blake2b(rows.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            facts[name] = {"rows": len(tasks), "fingerprint": digest}
        return facts


def load_tasks(recipe: Recipe) -> RunTasks | None:
    """The recipe's tasks with their checker, tried out on one answer; None where it has none.

    Raises:
        InputError: a file or a row of it cannot be used, or the checker is none.
    """
    asked = recipe.tasks
    if asked is None:
        return None
    limit = SMOKE_TASKS if recipe.smoke else None
    train, heldout = (
        read_tasks(recipe.path(name), limit) if name is not None else []
        for name in (asked.train, asked.heldout)
    )
    check = _checker(asked.checker) if asked.checker else _unchecked
    first = next(iter([*train, *heldout]))
    if asked.checker:
        check(first, first.gold or "")
    tokens = min(asked.max_new_tokens, SMOKE_TOKENS) if recipe.smoke else asked.max_new_tokens
    return RunTasks(train, heldout, check, tokens, asked.batch_rows)


def read_tasks(path: str, limit: int | None = None) -> list[Task]:
    """The tasks of a JSONL file (or any other that data may be in): a `prompt` a row, and what its checker needs.

    Raises:
        InputError: the file cannot be read, a row has no prompt, or two have the same id.
    """
    if not Path(path).is_file():
        raise InputError(f"tasks: there is no file {path}")
    tasks: dict[str, Task] = {}
    for place, row in itertools.islice(file_rows(Path(path)), limit):
        if isinstance(row, BadRow):
            raise InputError(f"{place}: {row.reason}")
        try:
            prompt = as_turns(row.get("prompt"), "'prompt'", "user")
        except MalformedRow as malformed:
            raise InputError(f"{place}: a task needs a prompt, text or messages: {malformed}") from malformed
        task = Task(str(row.get("id") or place), prompt, row)
        if task.id in tasks:
            raise InputError(f"{place}: another task has the id {task.id!r} too")
        tasks[task.id] = task
    if not tasks:
        raise InputError(f"tasks: there is no row in {path}")
    return list(tasks.values())


def prompt_ids(tasks: Sequence[Task], chat: ChatFormat) -> list[list[int]]:
    """The token ids that answers start from.

    Raises:
        InputError: the chat template refuses a prompt.
    """
    ids = []
    for task in tasks:
        try:
            ids.append(encode_prompt(chat, task.prompt))
        except RowRefused as refused:
            raise InputError(f"task {task.id}: {refused.reason}: {refused.detail}") from refused
    return ids


def answer_tasks(
    model: Any, tasks: RunTasks, chat: ChatFormat, end_token_ids: Collection[int], console: Console, what: str
) -> list[Answer]:
    """The likeliest answer to every held-out task, judged."""
    from slimepo.model.generate import completion_text, generate
    from slimepo.terminal import counted

    done = 0
    with counted(console, what) as report:

        def progress(more: int) -> None:
            nonlocal done
            done += more
            report(done, len(tasks.heldout))

        completions = generate(
            model,
            prompt_ids(tasks.heldout, chat),
            end_token_ids=end_token_ids,
            max_new_tokens=tasks.max_new_tokens,
            batch_rows=tasks.batch_rows,
            progress=progress,
        )
    answers = []
    for task, (completion,) in zip(tasks.heldout, completions, strict=True):
        text = completion_text(chat.tokenizer, completion)
        verdict = tasks.check(task, text)
        answers.append(Answer(text, completion.finished, len(completion.token_ids), verdict))
    return answers


def measure(tasks: Sequence[Task], answers: Sequence[Answer]) -> dict[str, float]:
    """Figures of one answer a task, as shares of the tasks.

    exact_match: right and finished. format_valid: in the asked form and finished. end_rate: finished. repetition:
    answers that loop (see `loops`), where the tasks have right answers. exact_match/FAMILY: of one family.
    """
    right = [answer.verdict.correct and answer.finished for answer in answers]
    figures = {
        "exact_match": _share(right),
        "format_valid": _share([answer.verdict.valid and answer.finished for answer in answers]),
        "end_rate": _share([answer.finished for answer in answers]),
    }
    golden = [(task.gold, answer.text) for task, answer in zip(tasks, answers, strict=True)]
    if all(gold is not None for gold, _ in golden):
        figures["repetition"] = _share([loops(text, gold or "") for gold, text in golden])
    for family in dict.fromkeys(task.family for task in tasks if task.family):
        of_family = [hit for task, hit in zip(tasks, right, strict=True) if task.family == family]
        figures[f"exact_match/{family}"] = _share(of_family)
    return figures


def loops(answer: str, gold: str) -> bool:
    """Whether a block of 1 to 12 characters stands in a row three times more often than the gold answer has one.

    Measured against gold, because a right answer may repeat ("ko-ko-ko", "1111").
    """
    return longest_run(answer) >= longest_run(gold) + _LOOP_EXTRA


def longest_run(text: str) -> int:
    """The most copies in a row of one block of 1 to 12 characters: "xababab" has 3, an empty text 0."""
    best = min(1, len(text))
    for size in range(1, min(_LONGEST_BLOCK, len(text) // 2) + 1):
        matching = 0
        for at in range(size, len(text)):
            # `matching` characters in a row equal those one block earlier: so many further copies.
            matching = matching + 1 if text[at] == text[at - size] else 0
            best = max(best, 1 + matching // size)
    return best


def _checker(name: str) -> Callable[[Task, str], Verdict]:
    """A checker of the user's own, whose mistakes are told with the task that they were made on."""
    function = find_function(name, "checker")

    def check(task: Task, text: str) -> Verdict:
        try:
            verdict = function(task.row, text)
        except Exception as error:
            # A user's function can fail in any way.
            raise InputError(
                f"checker {name!r} fails on task {task.id}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(verdict, bool):
            return Verdict(correct=verdict, valid=verdict)
        if not isinstance(verdict, Verdict):
            raise InputError(f"checker {name!r} must return a bool or a slimepo.Verdict, not {verdict!r}")
        return verdict

    return check


def _unchecked(task: Task, text: str) -> Verdict:
    raise InputError(f"task {task.id}: the recipe's tasks have no checker")


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
