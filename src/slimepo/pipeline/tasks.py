"""Tasks with answers that a function checks: read from files, answered greedily, judged, measured."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from slimepo.data.files import BadRow, file_rows
from slimepo.data.messages import MalformedRow, prompt_turns
from slimepo.data.render import ChatFormat, RowRefused, encode_prompt
from slimepo.errors import InputError
from slimepo.imports import find_function
from slimepo.types import Message, Verdict
from slimepo.words import first_line

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
    """What a model said to a task, judged; `text` is without the end token, `tokens` with it.

    `said`: what the model wrote, where tasks have a repair, which made `text` of it. `cost`: of a valid answer, where
    tasks have costs.
    """

    text: str
    finished: bool
    tokens: int
    verdict: Verdict
    said: str | None = None
    cost: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it can be used as it is: it ended by itself, or went through a repair."""
        return self.finished or self.said is not None


@dataclass(frozen=True)
class RunTasks:
    """The tasks of a run, the function that judges an answer to one of them, and what else they have (see `Tasks`)."""

    train: list[Task]
    heldout: list[Task]
    check: Callable[[Task, str], Verdict]
    max_new_tokens: int
    batch_rows: int
    grammar: Callable[[Task], str] | None = None
    repair: Callable[[Task, str], str] | None = None
    cost: Callable[[Task, str], float] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Counts and fingerprints, so that a run does not go on with other tasks."""
        facts = {}
        for name, tasks in {"train": self.train, "heldout": self.heldout}.items():
            shown = [each.row for each in tasks]
            shown += [{"grammar": self.grammar(each)} for each in tasks] if self.grammar else []
            rows = json.dumps(shown, sort_keys=True, default=str, ensure_ascii=False)
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
    grammar = _grammar(asked.grammar, recipe) if asked.grammar else None
    repair = answer_function(asked.repair, "repair") if asked.repair else None
    cost = _cost(asked.cost) if asked.cost else None
    if grammar is not None:
        from slimepo.model.grammar import check_grammar

        texts = {grammar(task): task for task in (*train, *heldout)}
        for text, task in texts.items():
            try:
                check_grammar(text)
            except InputError as error:
                raise InputError(f"task {task.id}: {error}") from error
    if repair is not None:
        repair(first, first.gold or "")
    if cost is not None and first.gold is not None and check(first, first.gold).valid:
        cost(first, first.gold)
    return RunTasks(train, heldout, check, tokens, asked.batch_rows, grammar, repair, cost)


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
            prompt = prompt_turns(row)
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


def constraints(
    of: RunTasks, tasks: Sequence[Task], model: Any, tokenizer: Any, end_token_ids: Collection[int]
) -> list[Callable[[], Any]] | None:
    """What makes a constraint for an answer to each task, as `generate` takes it; None where there is no grammar."""
    if of.grammar is None:
        return None
    from slimepo.model.grammar import grammars_for

    grammars = grammars_for(model, tokenizer, end_token_ids)
    return [functools.partial(grammars, of.grammar(task), f"the grammar of task {task.id}") for task in tasks]


class Said(NamedTuple):
    """What a model wrote to a task, before anybody looked at it; `tokens` with the end token."""

    text: str
    finished: bool
    tokens: int


def answer_tasks(
    model: Any, tasks: RunTasks, chat: ChatFormat, end_token_ids: Collection[int], console: Console, what: str
) -> list[Said]:
    """The likeliest answer to every held-out task."""
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
            constraints=constraints(tasks, tasks.heldout, model, chat.tokenizer, end_token_ids),
            progress=progress,
        )
    return [
        Said(completion_text(chat.tokenizer, each), each.finished, len(each.token_ids))
        for (each,) in completions
    ]


def judged(tasks: RunTasks, said: Sequence[Said]) -> list[Answer]:
    """What was said to every held-out task, mended where the tasks have a repair, and judged."""
    answers = []
    for task, each in zip(tasks.heldout, said, strict=True):
        text = each.text if tasks.repair is None else tasks.repair(task, each.text)
        verdict = tasks.check(task, text)
        cost = tasks.cost(task, text) if tasks.cost is not None and verdict.valid else None
        wrote = None if tasks.repair is None else each.text
        answers.append(Answer(text, each.finished, each.tokens, verdict, wrote, cost))
    return answers


def measure(tasks: Sequence[Task], answers: Sequence[Answer]) -> dict[str, float]:
    """Figures of one answer a task, as shares of the tasks.

    exact_match: right and finished, or repaired. format_valid: in the asked form and finished, or repaired. end_rate:
    finished by themselves. repaired: changed by the tasks' repair. cost: mean of the valid answers, where tasks have
    costs. repetition: answers that loop (see `loops`), where the tasks have right answers. exact_match/FAMILY: of one
    family.
    """
    right = [answer.verdict.correct and answer.whole for answer in answers]
    figures = {
        "exact_match": _share(right),
        "format_valid": _share([answer.verdict.valid and answer.whole for answer in answers]),
        "end_rate": _share([answer.finished for answer in answers]),
    }
    if any(answer.said is not None for answer in answers):
        figures["repaired"] = _share([answer.said != answer.text for answer in answers])
    costs = [answer.cost for answer in answers if answer.cost is not None and answer.whole]
    if costs:
        figures["cost"] = fmean(costs)
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


def _grammar(name: str, recipe: Recipe) -> Callable[[Task], str]:
    """The grammar of each task: that of a file, or what the user's own function says."""
    if not name.endswith(".ebnf"):
        if ":" not in name:
            raise InputError(
                f"tasks.grammar {name!r}: give a file, its name ending in .ebnf, or package.module:function"
            )
        return _of_task(name, "grammar", _is_text, "a text")
    from slimepo.model.grammar import read_grammar

    text = read_grammar(recipe.path(name))
    return lambda task: text


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _is_cost(found: Any) -> bool:
    return isinstance(found, numbers.Real) and not isinstance(found, bool) and 0 < float(found) < math.inf


def _of_task(name: str, what: str, fits: Callable[[Any], bool], kind: str) -> Callable[..., Any]:
    """A function of the user's own of a task's row (and an answer), whose mistakes are told with the task."""
    function = find_function(name, what)

    def call(task: Task, *answer: str) -> Any:
        try:
            found = function(task.row, *answer)
        except Exception as error:
            # A user's function can fail in any way.
            raise InputError(
                f"{what} {name!r} fails on task {task.id}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not fits(found):
            raise InputError(f"{what} {name!r} must return {kind}, and gave {found!r} on task {task.id}")
        return found

    return call


def answer_function(name: str, what: str) -> Callable[[Task, str], str]:
    """A function of the user's own that makes an answer of an answer.

    Raises:
        InputError: it cannot be imported; and what it gives, where it fails or gives no text.
    """
    found: Callable[[Task, str], str] = _of_task(name, what, _is_text, "a text")
    return found


def _cost(name: str) -> Callable[[Task, str], float]:
    """The cost of an answer as a plain number, which files can hold whatever numbers the user's function returns."""
    found = _of_task(name, "cost", _is_cost, "a number above 0")
    return lambda task, text: float(found(task, text))


def _unchecked(task: Task, text: str) -> Verdict:
    raise InputError(f"task {task.id}: the recipe's tasks have no checker")


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
