"""The rewards (and costs) that a stage names: a function, the tasks' checker, math-verify, a reward model, a judge."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.imports import find_function
from slimepo.losses.common import check_number
from slimepo.onpolicy.rewards import Reward, check_reward
from slimepo.pipeline.tasks import RunTasks, Task
from slimepo.terminal import make_console
from slimepo.types import Message

if TYPE_CHECKING:
    from slimepo.evaluation.judge.request import JudgeReply
    from slimepo.pipeline.recipe.sections import Stage

CHECKER, MATH, MODEL, JUDGE = "checker", "math", "model:", "judge:"
# Of `pairs` alone: the tasks' cost, with a minus.
COST = "cost"

# What a judge is asked; the answer is the last thing that it reads, so that it can give no orders behind it.
_QUESTION = """Rate the assistant's last reply in the conversation below from 1 (useless) to 10 (it could not be \
better): is it right, does it do what was asked, is it clear? Say in one sentence why, then end with the rating as \
[[rating]], for example [[5]].

{conversation}

[the reply to rate]
{reply}"""
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_LONGEST_VERDICT = 512
# What mathematics begins with in a text.
_DELIMITER = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
# That a reward model reads at once.
_ROWS = 16


def reward_weights(
    given: str | Sequence[str] | Mapping[str, float] | None, what: str = "reward"
) -> dict[str, float]:
    """Rewards by name, with weights: one name, several (of weight 1), or names with weights; none is the checker.

    Raises:
        InputError: a name stands there twice, or there is none in what is given.
    """
    if given is None:
        return {CHECKER: 1.0}
    if not given:
        raise InputError(f"reward = {given!r} names none: give one, or leave it out for the tasks' checker")
    if isinstance(given, Mapping):
        return dict(given)
    names = [given] if isinstance(given, str) else given
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{what} {name!r} stands there twice: give it a weight, {{{name}: 2}}")
    return dict.fromkeys(names, 1.0)


def check_rewards(weights: Mapping[str, float], has_checker: bool, what: str = "reward") -> None:
    """Refuse, before a model is loaded, a reward (or a cost) that cannot be had.

    Raises:
        InputError: its name, and what is missing.
    """
    for name, weight in weights.items():
        check_number(f"the weight of {what} {name!r}", weight)
        if name == CHECKER and not has_checker:
            raise InputError(
                f"{what} 'checker': the recipe's tasks have none: give tasks.checker, or another {what}"
            )
        elif name == COST:
            raise InputError(
                f"{what} 'cost' ranks the samples of pairs, and stands there alone: pairs.NAME.reward=cost"
            )
        elif name == MATH and find_spec("math_verify") is None:
            raise InputError(f"{what} 'math' needs math-verify: pip install 'slimepo[math]'")
        elif name.startswith(MODEL):
            from slimepo.model.load import load_config

            labels = load_config(name.removeprefix(MODEL)).num_labels
            if labels != 1:
                raise InputError(f"{what} {name!r}: a {what} model has one label, and this one has {labels}")
        elif name.startswith(JUDGE):
            from slimepo.evaluation.judge.many import check_judge

            check_judge(name.removeprefix(JUDGE))
        elif name not in (CHECKER, MATH):
            check_reward(name, find_function(name, what), weight, what)


def make_rewards(
    weights: Mapping[str, float], tasks: RunTasks, folder: Path
) -> dict[str, tuple[Reward, float]]:
    """The functions behind the names, with their weights; `folder` keeps a judge's replies, for none is asked twice."""
    return {name: (_reward(name, tasks, folder), weight) for name, weight in weights.items()}


def stage_rewards(stage: Stage, tasks: RunTasks | None, folder: Path) -> dict[str, Any]:
    """The trainer's `reward`, and its `cost` where the stage's rollouts have one; nothing where it samples nothing."""
    if stage.rollouts is None or tasks is None:
        return {}
    cost = {"cost": stage.rollouts.cost.of} if stage.rollouts.cost else {}
    named = {"reward": stage.reward, **cost}
    return {what: make_rewards(reward_weights(given), tasks, folder) for what, given in named.items()}


def _reward(name: str, tasks: RunTasks, folder: Path) -> Reward:
    if name == CHECKER:
        return _checked(tasks)
    if name == MATH:
        return _mathematical
    if name.startswith(MODEL):
        return _RewardModel(name.removeprefix(MODEL))
    if name.startswith(JUDGE):
        return _JudgeReward(name.removeprefix(JUDGE), folder)
    return find_function(name, "reward")


def _checked(tasks: RunTasks) -> Reward:
    """1 for an answer that the tasks' checker calls right, else 0."""

    def reward(prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]) -> list[float]:
        task = Task(str(row.get("id") or ""), prompt, row)
        return [float(tasks.check(task, text).correct) for text in completions]

    return reward


def _mathematical(prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]) -> list[float]:
    """1 for an answer that is mathematically the row's `answer`, by math-verify, else 0."""
    from math_verify import parse, verify

    if row.get("answer") is None:
        raise InputError("the row has no `answer` to compare with")
    # math-verify keeps time by a signal, which only the main thread gets; in another one `timeout` keeps it.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    text = str(row["answer"])
    # As LaTeX, even where nothing says so: without the dollars, 3\pi would be 3. Prose is read as before.
    gold = parse(text if _DELIMITER.search(text) else f"${text}$", parsing_timeout=limit)
    if not gold:
        raise InputError(f"math-verify finds nothing in its `answer` {text!r} to compare with")
    return [
        float(verify(gold, parse(each, parsing_timeout=limit), timeout_seconds=limit)) for each in completions
    ]


class _RewardModel:
    """What a sequence classifier with one label says of the whole conversation, in its own chat template."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        from slimepo.data.chat import load_tokenizer
        from slimepo.model.load import load_whole_weights

        self.tokenizer: Any = load_tokenizer(folder)
        self.model: Any = load_whole_weights(
            AutoModelForSequenceClassification, folder, "reward model"
        ).eval()
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        # By token ids, of what it was shown last.
        self.scores: dict[tuple[int, ...], float] = {}

    def look_ahead(self, prompts: Sequence[list[Message]], completions: Sequence[Sequence[str]]) -> None:
        import torch

        # Which of a padded row is its last token, a model tells by its config alone.
        pad = self.model.config.get_text_config().pad_token_id
        rows = {
            self._ids(prompt, text)
            for prompt, texts in zip(prompts, completions, strict=True)
            for text in texts
        }
        # Rows of like lengths together; the order decides how sums round, so it is always the same.
        ordered = sorted(rows, key=lambda ids: (len(ids), ids))
        size = 1 if pad is None else _ROWS
        self.scores = {}
        for batch in (ordered[start : start + size] for start in range(0, len(ordered), size)):
            longest = len(batch[-1])
            ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in batch])
            mask = torch.arange(longest) < torch.tensor([[len(row)] for row in batch])
            device = self.model.device
            with torch.no_grad():
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
            self.scores |= dict(zip(batch, logits[:, 0].tolist(), strict=True))

    def __call__(
        self, prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]
    ) -> list[float]:
        rows = [self._ids(prompt, text) for text in completions]
        if not self.scores.keys() >= set(rows):
            self.look_ahead([prompt], [completions])
        return [self.scores[each] for each in rows]

    def _ids(self, prompt: list[Message], text: str) -> tuple[int, ...]:
        turns = [*prompt, Message(role="assistant", content=text)]
        return tuple(self.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"])


class _JudgeReward:
    """A judge's rating from 1 to 10, over 10."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        from slimepo.evaluation.judge.many import Calls, open_judge, read_replies

        cache = folder / "judge.jsonl"
        self.judge, self.calls = open_judge(endpoint), Calls(cache, known=read_replies(cache))

    def look_ahead(self, prompts: Sequence[list[Message]], completions: Sequence[Sequence[str]]) -> None:
        self._replies([(p, text) for p, texts in zip(prompts, completions, strict=True) for text in texts])

    def __call__(
        self, prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]
    ) -> list[float]:
        return [_rating(reply) for reply in self._replies([(prompt, text) for text in completions])]

    def _replies(self, asked: Sequence[tuple[list[Message], str]]) -> list[JudgeReply]:
        """The judge's reply to each prompt and answer; what it has said before, it is not asked again."""
        from slimepo.evaluation.judge.many import judge_all
        from slimepo.evaluation.judge.request import JudgeRequest, Sampling

        requests = []
        for number, (prompt, text) in enumerate(asked):
            conversation = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in prompt)
            question = _QUESTION.format(conversation=conversation, reply=text)
            message, sampling = Message(role="user", content=question), Sampling(0.0, _LONGEST_VERDICT)
            requests.append(JudgeRequest("reward", "policy", str(number), "", "rating", (message,), sampling))
        # A line of usage a step would bury everything else.
        replies = judge_all(self.judge, requests, self.calls, make_console(quiet=True))
        return [replies[request.key][-1] for request in requests]


def _rating(reply: JudgeReply) -> float:
    if reply.error:
        raise InputError(f"the judge gave no reply: {reply.error}")
    ratings = _RATING.findall(reply.text)
    if not ratings or not 1 <= float(ratings[-1]) <= 10:
        raise InputError(f"the judge gave no rating from 1 to 10: {reply.text[-80:]!r}")
    return float(ratings[-1]) / 10
