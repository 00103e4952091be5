"""Preference pairs from a model's own samples: sampled, judged by the tasks' checker, kept as ordinary files.

The folder of a recipe's entry `pairs.NAME` holds, for the sets train and heldout, `samples-SET.jsonl` (written as they
come) and `SET.jsonl` (the pairs), and `pairs.json` (written last: the pairs are made).
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.files import is_main_process, json_lines, read_json, write_json, write_json_lines
from slimepo.onpolicy.best_of import evenly, settled
from slimepo.onpolicy.rewards import Prompt, Rewarder
from slimepo.pipeline.folder import is_held
from slimepo.pipeline.pairs.samples import sampled
from slimepo.pipeline.rewards import COST, make_rewards, reward_weights
from slimepo.pipeline.tasks import RunTasks, Task, answer_function
from slimepo.types import Message, Preference, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.data.render import ChatFormat
    from slimepo.model.chat import ChatModel
    from slimepo.pipeline.recipe.schema import Recipe
    from slimepo.pipeline.recipe.sections import Pairs

FACTS = "pairs.json"
# Seconds after which a rank that waits looks whether the first one, which makes the pairs, is still there.
PATIENCE_S = 30.0
# What may be done about a reward that fails.
KEPT = "the samples are kept: mend the reward, and run this again"


@dataclass(frozen=True)
class Pair:
    """What is chosen and what is rejected in answer to a task, and how that came about; `rewards` of the two."""

    task: Task
    chosen: str
    rejected: str
    gold: bool
    rejected_valid: bool
    rewards: tuple[float, float] | None = None


def make_pairs(
    recipe: Recipe, name: str, model: str, tasks: RunTasks, chat: ChatFormat, folder: Path, console: Console
) -> None:
    """Write the pairs `name` of a recipe, from samples of `model`, unless that is done; a killed run goes on.

    Raises:
        InputError: no task for training gives a pair.
    """
    if not is_main_process():
        # The other ranks read what the first one writes, however long that takes, as long as it is there.
        waited = 0.0
        while read_json(folder / FACTS) is None:
            time.sleep(0.5)
            waited += 0.5
            if waited % PATIENCE_S == 0 and not is_held(folder.parent):
                raise InputError(f"pairs {name!r}: the first process has ended before they were made")
        return
    if read_json(folder / FACTS) is not None:
        return
    settings, started = recipe.pairs[name], time.monotonic()
    facts: dict[str, Any] = {"model": settings.model or recipe.model}
    answerer: ChatModel | None = None
    if not recipe.smoke:
        from slimepo.model.chat import load_chat_model

        loaded = load_chat_model(model, settings.dtype)
        # The recipe's template, which a model that no stage has made does not come with.
        answerer = replace(loaded, chat=chat, end_ids=loaded.end_ids | {chat.end_id})
    for which, of_set in {"train": tasks.train, "heldout": tasks.heldout}.items():
        if answerer is None:
            worth = None if settings.reward is None else (-1.0, -2.0)
            pairs = [
                Pair(task, task.gold or "right", "wrong, and made up", True, True, worth) for task in of_set
            ]
            made = {"tasks": len(of_set), "pairs": len(pairs)}
        else:
            kept = folder / f"samples-{which}.jsonl"
            seed = recipe.seed if settings.seed is None else settings.seed
            lots = range(1, (settings.most or 0) // settings.per_prompt)
            samples = sampled(answerer, of_set, tasks, settings, seed, kept, console, name)
            if settings.reward is None:
                mend = None if settings.repair is None else answer_function(settings.repair, "repair")
                pairs, made = judged_pairs(of_set, samples, tasks, gold=settings.gold, mend=mend)
            else:
                rewards_of = sample_rewards(settings, tasks, folder)
                rewards = rewards_of(of_set, samples)
                for lot in lots:
                    more = [place for place, found in enumerate(rewards) if not settled(found)]
                    again = [of_set[place] for place in more]
                    drawn = sampled(answerer, again, tasks, settings, seed, kept, console, name, lot=lot)
                    for place, answers, found in zip(more, drawn, rewards_of(again, drawn), strict=True):
                        samples[place], rewards[place] = samples[place] + answers, rewards[place] + found
                pairs, made = rewarded_pairs(of_set, samples, rewards, settings.keep)
            if settings.most is not None:
                made["samples"] = sum(settings.per_prompt for line in json_lines(kept))
            if tasks.repair is not None:
                both = [zip(line["answers"], line["said"], strict=True) for line in json_lines(kept)]
                made["samples_repaired"] = sum(now != was for of_task in both for now, was in of_task)
        write_json_lines(folder / f"{which}.jsonl", map(_row, pairs))
        facts[which] = made
        if which == "train" and not pairs:
            raise InputError(f"pairs {name!r}: none of {len(of_set)} tasks gives a pair ({_counted(made)})")
    facts["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / FACTS, facts)
    note = " (a smoke run samples nothing: they are made up)" if recipe.smoke else ""
    console.print(f"{name}: {_counted(facts['train'])}{note}")


def judged_pairs(
    tasks: Sequence[Task],
    samples: Sequence[Sequence[str]],
    of: RunTasks,
    *,
    gold: bool,
    mend: Callable[[Task, str], str] | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """One pair a task that has both a right answer and a wrong sample to set against it; and counts of tasks.

    samples: for each task the texts that the model gave, without the end token; unfinished ones left out.
    Chosen: the most frequent right sample; where none is right, the first wrong one that `mend` makes right, against
    itself as it was; or else, with `gold`, the task's own answer.
    Rejected: among the wrong samples those of valid form, or all where none is valid (a fluent mistake teaches more
    than a broken one); of these the most frequent. The earlier sample wins a tie, and empty samples are no answers.
    """
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for task, texts in zip(tasks, samples, strict=True):
        answers = [text for text in texts if text]
        verdicts: dict[str, Verdict] = {text: of.check(task, text) for text in dict.fromkeys(answers)}
        right = [text for text in answers if verdicts[text].correct]
        wrong = [text for text in answers if not verdicts[text].correct]
        if mend is not None and not right:
            mended = ((mend(task, text), text) for text in dict.fromkeys(wrong))
            found = next((each for each in mended if of.check(task, each[0]).correct), None)
            if found is not None:
                counts["mended"] += 1
                pairs.append(Pair(task, *found, False, verdicts[found[1]].valid))
                continue
        chosen = _most_frequent(right) if right else task.gold if gold else None
        if not wrong or chosen is None:
            counts["all right" if right else "no sample" if not wrong else "none right"] += 1
            continue
        rejected = _most_frequent([text for text in wrong if verdicts[text].valid] or wrong)
        pairs.append(Pair(task, chosen, rejected, not right, verdicts[rejected].valid))
    return pairs, {
        "tasks": len(tasks),
        "pairs": len(pairs),
        "gold_chosen": sum(pair.gold for pair in pairs),
        **({"mended_chosen": counts["mended"]} if mend is not None else {}),
        "invalid_rejected": sum(not pair.rejected_valid for pair in pairs),
        **{f"dropped: {reason}": counts[reason] for reason in ("all right", "none right", "no sample")},
    }


def sample_rewards(
    settings: Pairs, of: RunTasks, folder: Path
) -> Callable[[Sequence[Task], Sequence[Sequence[str]]], list[list[float]]]:
    """What gives every sample of some tasks its reward, NaN for an empty one, or one that has no cost.

    By cost, an answer that the checker does not call valid has none, and a valid one is worth its cost with a minus.

    Raises (what it gives):
        InputError: a reward failed.
    """
    if settings.reward == COST:

        def worth(task: Task, text: str) -> float:
            assert of.cost is not None
            try:
                return -of.cost(task, text) if text and of.check(task, text).valid else math.nan
            except InputError as error:
                raise InputError(f"{error}; {KEPT}, with --accept as it then says") from error

        return lambda tasks, samples: [
            [worth(task, text) for text in texts] for task, texts in zip(tasks, samples, strict=True)
        ]
    rewarder = Rewarder(make_rewards(reward_weights(settings.reward), of, folder), way_out=KEPT)

    def rewards(tasks: Sequence[Task], samples: Sequence[Sequence[str]]) -> list[list[float]]:
        said = [[text for text in texts if text] for texts in samples]
        prompts = [Prompt(task.id, task.prompt, task.row, []) for task in tasks]
        asked = [(prompt, texts) for prompt, texts in zip(prompts, said, strict=True) if texts]
        found = iter(rewarder.of_all([prompt for prompt, _ in asked], [texts for _, texts in asked]))
        of_said = [iter(next(found)[0] if texts else ()) for texts in said]
        return [
            [next(numbers) if text else math.nan for text in texts]
            for texts, numbers in zip(samples, of_said, strict=True)
        ]

    return rewards


def rewarded_pairs(
    tasks: Sequence[Task],
    samples: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float]],
    keep: int = 2,
) -> tuple[list[Pair], dict[str, int]]:
    """The best sample of each task against others; and counts of tasks.

    `keep` samples are taken, spread evenly over the ranks from best to worst, and each but the best gives a pair with
    it; two are the best and the worst. Of samples with equal rewards the earliest alone counts, and a text counts once,
    with the earliest of its rewards. NaN: no answer.
    """
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for task, texts, numbers in zip(tasks, samples, rewards, strict=True):
        worth: dict[str, float] = {}
        for text, number in zip(texts, numbers, strict=True):
            if not math.isnan(number):
                worth.setdefault(text, number)
        if not worth:
            counts["no sample"] += 1
            continue
        # The earliest text of each reward; rewards that differ by rounding are one.
        ranked: list[tuple[str, float]] = []
        for text, number in sorted(worth.items(), key=lambda each: -each[1]):
            if not ranked or not math.isclose(number, ranked[-1][1]):
                ranked.append((text, number))
        if len(ranked) == 1:
            counts["equal rewards" if len(worth) > 1 else "identical answers"] += 1
            continue
        counts["paired"] += 1
        (chosen, best), *others = (ranked[rank] for rank in evenly(len(ranked), keep))
        pairs += [
            Pair(task, chosen, text, gold=False, rejected_valid=True, rewards=(best, number))
            for text, number in others
        ]
    return pairs, {
        "tasks": len(tasks),
        "pairs": len(pairs),
        **({"tasks with pairs": counts["paired"]} if keep > 2 else {}),
        **{
            f"dropped: {reason}": counts[reason]
            for reason in ("equal rewards", "identical answers", "no sample")
        },
    }


def read_pairs(path: Path, *, by_cost: bool = False) -> list[Preference]:
    """The pairs of a file that `make_pairs` has written; each is called after its task, further ones with a number.

    by_cost: a pair's `weight` is the cost of the rejected answer over that of the chosen one, as `bopo` asks for it.
    """
    pairs = []
    of_task: Counter[str] = Counter()
    for row in json_lines(path):
        of_task[row["task"]] += 1
        name = row["task"] + (f" ({of_task[row['task']]})" if of_task[row["task"]] > 1 else "")
        scores = (row["score_chosen"], row["score_rejected"]) if "score_chosen" in row else None
        weight = scores[1] / scores[0] if by_cost and scores else 1.0
        pairs.append(Preference(row["prompt"], row["chosen"], row["rejected"], name, weight, scores=scores))
    return pairs


def first_of(name: str) -> str:
    """What the first pair of a task is called, by the name of any of its pairs."""
    return re.sub(r" \(\d+\)$", "", name)


def _row(pair: Pair) -> dict[str, Any]:
    """A line of a file that any run may train on; `task` says which task a pair is of."""
    scores = (
        {}
        if pair.rewards is None
        else dict(zip(("score_chosen", "score_rejected"), pair.rewards, strict=True))
    )
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    turns = {side: [Message(role="assistant", content=text)] for side, text in sides.items()}
    return {"prompt": pair.task.prompt, **turns, "task": pair.task.id, **scores}


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items() if value or key == "pairs"
    )


def _most_frequent(texts: Sequence[str]) -> str:
    # Counter keeps the order of first appearance among equals.
    return Counter(texts).most_common(1)[0][0]
