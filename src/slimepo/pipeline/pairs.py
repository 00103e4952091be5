"""Preference pairs from a model's own samples: sampled, judged by the tasks' checker, kept as ordinary files.

The folder of a recipe's entry `pairs.NAME` holds, for the sets train and heldout, `samples-SET.jsonl` (written as they
come) and `SET.jsonl` (the pairs), and `pairs.json` (written last: the pairs are made).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.files import (
    append_json_lines,
    is_main_process,
    json_lines,
    read_json,
    write_json,
    write_json_lines,
)
from slimepo.onpolicy.rewards import Prompt, Rewarder
from slimepo.onpolicy.rollouts import sample_seed
from slimepo.onpolicy.vllm import open_engine
from slimepo.pipeline.folder import is_held
from slimepo.pipeline.rewards import make_rewards, reward_weights
from slimepo.pipeline.tasks import RunTasks, Task, prompt_ids
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
    """What is chosen and what is rejected in answer to a task, and how that came about."""

    task: Task
    chosen: str
    rejected: str
    gold: bool
    rejected_valid: bool


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

        loaded = load_chat_model(model)
        # The recipe's template, which a model that no stage has made does not come with.
        answerer = replace(loaded, chat=chat, end_ids=loaded.end_ids | {chat.end_id})
    for which, of_set in {"train": tasks.train, "heldout": tasks.heldout}.items():
        if answerer is None:
            pairs = [Pair(task, task.gold or "right", "wrong, and made up", True, True) for task in of_set]
            made = {"tasks": len(of_set), "pairs": len(pairs)}
        else:
            kept = folder / f"samples-{which}.jsonl"
            seed = recipe.seed if settings.seed is None else settings.seed
            samples = sampled(answerer, of_set, settings, tasks.batch_rows, seed, kept, console, name)
            if settings.reward is None:
                pairs, made = judged_pairs(of_set, samples, tasks, gold=settings.gold)
            else:
                rewards = make_rewards(reward_weights(settings.reward), tasks, folder)
                rewarder = Rewarder(rewards, way_out=KEPT)
                pairs, made = rewarded_pairs(of_set, samples, rewarder)
        # A file that any run may train on; `task` says which task a pair is of.
        rows = (
            {"prompt": pair.task.prompt, "chosen": _turn(pair.chosen), "rejected": _turn(pair.rejected)}
            | {"task": pair.task.id}
            for pair in pairs
        )
        write_json_lines(folder / f"{which}.jsonl", rows)
        facts[which] = made
        if which == "train" and not pairs:
            raise InputError(f"pairs {name!r}: none of {len(of_set)} tasks gives a pair ({_counted(made)})")
    facts["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / FACTS, facts)
    note = " (a smoke run samples nothing: they are made up)" if recipe.smoke else ""
    console.print(f"{name}: {_counted(facts['train'])}{note}")


def sampled(
    answerer: ChatModel,
    tasks: Sequence[Task],
    settings: Pairs,
    batch_rows: int,
    seed: int,
    file: Path,
    console: Console,
    name: str,
) -> list[list[str]]:
    """The finished answers of the model to each task; `file` keeps them as they come, and is not asked again."""
    from slimepo.model.generate import completion_text, generate
    from slimepo.terminal import counted

    kept: dict[int, list[str]] = {row["place"]: row["answers"] for row in json_lines(file)}
    waiting = [place for place in range(len(tasks)) if place not in kept]
    if not waiting:
        # Nothing is loaded for nothing.
        return [kept[place] for place in range(len(tasks))]
    with counted(console, f"{name}: samples") as report:

        def keep(places: Sequence[int], completions: Any) -> None:
            rows = []
            for place, given in zip(places, completions, strict=True):
                kept[place] = [completion_text(answerer.tokenizer, c) for c in given if c.finished]
                row = {"place": place, "task": tasks[place].id, "answers": kept[place]}
                rows.append(row | {"unfinished": len(given) - len(kept[place])})
            append_json_lines(file, rows)
            report(len(kept), len(tasks))

        ids = prompt_ids(tasks, answerer.chat)
        if settings.engine != "transformers":
            context = max(map(len, ids), default=0) + settings.max_new_tokens
            dtype = next(answerer.model.parameters()).dtype
            engine = open_engine(
                settings.rollouts, context=context, dtype=dtype, seed=seed, folder=file.parent
            )
            assert engine is not None
            size = max(1, batch_rows // settings.per_prompt)
            try:
                engine.load(answerer.model)
                for start in range(0, len(waiting), size):
                    places = waiting[start : start + size]
                    asked = [Prompt(tasks[at].id, tasks[at].prompt, tasks[at].row, ids[at]) for at in places]
                    seeds = [sample_seed(seed, 0, place, "pairs") for place in places]
                    keep(places, engine.sample(answerer.end_ids, asked, seeds))
            finally:
                engine.close()
            return [kept[place] for place in range(len(tasks))]
        generate(
            answerer.model,
            ids,
            end_token_ids=answerer.end_ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            samples=settings.per_prompt,
            seed=seed,
            batch_rows=batch_rows,
            done=list(kept),
            finished=keep,
        )
    return [kept[place] for place in range(len(tasks))]


def judged_pairs(
    tasks: Sequence[Task], samples: Sequence[Sequence[str]], of: RunTasks, *, gold: bool
) -> tuple[list[Pair], dict[str, int]]:
    """One pair a task that has both a right answer and a wrong sample to set against it; and counts of tasks.

    samples: for each task the texts that the model gave, without the end token; unfinished ones left out.
    Chosen: the most frequent right sample; where none is right, with `gold`, the task's own answer.
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
        "invalid_rejected": sum(not pair.rejected_valid for pair in pairs),
        **{f"dropped: {reason}": counts[reason] for reason in ("all right", "none right", "no sample")},
    }


def rewarded_pairs(
    tasks: Sequence[Task], samples: Sequence[Sequence[str]], rewarder: Rewarder
) -> tuple[list[Pair], dict[str, int]]:
    """The best sample of each task against its worst; and counts of tasks.

    Equal rewards give no pair, nor do answers that are all the same, which are counted apart. Of samples with equal
    reward the earlier one is taken, and empty samples are no answers.

    Raises:
        InputError: a reward failed.
    """
    answers_of = [
        (task, answers) for task, of in zip(tasks, samples, strict=True) if (answers := [*filter(None, of)])
    ]
    prompts = [Prompt(task.id, task.prompt, task.row, []) for task, _ in answers_of]
    found = rewarder.of_all(prompts, [answers for _, answers in answers_of])
    pairs, counts = [], Counter({"no sample": len(tasks) - len(answers_of)})
    for (task, answers), (rewards, _, _) in zip(answers_of, found, strict=True):
        best, worst = (answers[rewards.index(bound(rewards))] for bound in (max, min))
        if best == worst or min(rewards) == max(rewards):
            counts["equal rewards" if len(set(answers)) > 1 else "identical answers"] += 1
            continue
        pairs.append(Pair(task, best, worst, gold=False, rejected_valid=True))
    return pairs, {
        "tasks": len(tasks),
        "pairs": len(pairs),
        **{
            f"dropped: {reason}": counts[reason]
            for reason in ("equal rewards", "identical answers", "no sample")
        },
    }


def read_pairs(path: Path) -> list[Preference]:
    """The pairs of a file that `make_pairs` has written; each is called after its task."""
    return [
        Preference(row["prompt"], row["chosen"], row["rejected"], row["task"]) for row in json_lines(path)
    ]


def _turn(text: str) -> list[Message]:
    return [Message(role="assistant", content=text)]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items() if value or key == "pairs"
    )


def _most_frequent(texts: Sequence[str]) -> str:
    # Counter keeps the order of first appearance among equals.
    return Counter(texts).most_common(1)[0][0]
