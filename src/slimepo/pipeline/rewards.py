"""The rewards that a stage's `reward` names: a function, the tasks' checker, math-verify, a reward model, a judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.imports import find_function
from slimepo.onpolicy.rewards import Reward
from slimepo.pipeline.tasks import RunTasks, Task
from slimepo.types import Message

CHECKER, MATH, MODEL, JUDGE = "checker", "math", "model:", "judge:"

# What a judge is asked; the answer is the last thing that it reads, so that it can give no orders behind it.
_QUESTION = """Rate the assistant's last reply in the conversation below from 1 (useless) to 10 (it could not be \
better): is it right, does it do what was asked, is it clear? Say in one sentence why, then end with the rating as \
[[rating]], for example [[5]].

{conversation}

[the reply to rate]
{reply}"""
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_LONGEST_VERDICT = 512


def reward_weights(given: str | Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
    """Rewards by name, with weights: one name, several (of weight 1), or names with weights; none is the checker."""
    if given is None:
        return {CHECKER: 1.0}
    if isinstance(given, Mapping):
        return dict(given)
    return dict.fromkeys([given] if isinstance(given, str) else given, 1.0)


def check_rewards(weights: Mapping[str, float], has_checker: bool) -> None:
    """Refuse, before a model is loaded, a reward that cannot be had.

    Raises:
        InputError: its name, and what is missing.
    """
    for name in weights:
        if name == CHECKER and not has_checker:
            raise InputError(
                "reward 'checker': the recipe's tasks have none: give tasks.checker, or another reward"
            )
        elif name == MATH and find_spec("math_verify") is None:
            raise InputError("reward 'math' needs math-verify: pip install 'slimepo[math]'")
        elif name.startswith(MODEL):
            from slimepo.model.load import load_config

            labels = load_config(name.removeprefix(MODEL)).num_labels
            if labels != 1:
                raise InputError(f"reward {name!r}: a reward model has one label, and this one has {labels}")
        elif name.startswith(JUDGE):
            from slimepo.evaluation.judge.many import check_judge

            check_judge(name.removeprefix(JUDGE))
        elif name not in (CHECKER, MATH):
            find_function(name, "reward")


def make_rewards(
    weights: Mapping[str, float], tasks: RunTasks, folder: Path
) -> dict[str, tuple[Reward, float]]:
    """The functions behind the names, with their weights; `folder` keeps a judge's replies, for none is asked twice."""
    return {name: (_reward(name, tasks, folder), weight) for name, weight in weights.items()}


def _reward(name: str, tasks: RunTasks, folder: Path) -> Reward:
    if name == CHECKER:
        return _checked(tasks)
    if name == MATH:
        return _mathematical
    if name.startswith(MODEL):
        return _reward_model(name.removeprefix(MODEL))
    if name.startswith(JUDGE):
        return _judged(name.removeprefix(JUDGE), folder)
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
    gold = parse(str(row["answer"]))
    return [float(verify(gold, parse(text))) for text in completions]


def _reward_model(folder: str) -> Reward:
    """What a sequence classifier with one label says of the whole conversation, in its own chat template."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from slimepo.data.chat import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())

    @torch.no_grad()
    def reward(prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]) -> list[float]:
        scores = []
        for text in completions:
            # One at a time: a score does not depend on what else is in a padded batch.
            turns = [*prompt, Message(role="assistant", content=text)]
            ids = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt").to(model.device)
            scores.append(float(model(**ids).logits[0, 0]))
        return scores

    return reward


def _judged(endpoint: str, folder: Path) -> Reward:
    """A judge's rating from 1 to 10, over 10."""
    from rich.console import Console

    from slimepo.evaluation.judge.many import Calls, judge_all, open_judge
    from slimepo.evaluation.judge.request import JudgeRequest, Sampling

    judge, calls = open_judge(endpoint), Calls(folder / "judge.jsonl")
    # A line of usage a prompt would bury everything else.
    quiet = Console(quiet=True)

    def reward(prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]) -> list[float]:
        conversation = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in prompt)
        requests = [
            JudgeRequest(
                "reward",
                "policy",
                str(number),
                "",
                "rating",
                (Message(role="user", content=_QUESTION.format(conversation=conversation, reply=text)),),
                Sampling(0.0, _LONGEST_VERDICT),
            )
            for number, text in enumerate(completions)
        ]
        replies = judge_all(judge, requests, calls, quiet)
        return [_rating(replies[request.key][-1]) for request in requests]

    return reward


def _rating(reply: Any) -> float:
    if reply.error:
        raise InputError(f"the judge gave no reply: {reply.error}")
    ratings = _RATING.findall(reply.text)
    if not ratings or not 1 <= float(ratings[-1]) <= 10:
        raise InputError(f"the judge gave no rating from 1 to 10: {reply.text[-80:]!r}")
    return float(ratings[-1]) / 10
