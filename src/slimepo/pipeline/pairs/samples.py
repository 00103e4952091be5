"""A model's own answers to tasks, written as they come and never sampled twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.files import append_json_lines, json_lines
from slimepo.onpolicy.rewards import Prompt
from slimepo.onpolicy.rollouts import sample_seed
from slimepo.onpolicy.vllm import open_engine
from slimepo.pipeline.tasks import RunTasks, Task, constraints, prompt_ids

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.model.chat import ChatModel
    from slimepo.pipeline.recipe.sections import Pairs


def sampled(
    answerer: ChatModel,
    tasks: Sequence[Task],
    of: RunTasks,
    settings: Pairs,
    seed: int,
    file: Path,
    console: Console,
    name: str,
    *,
    lot: int = 0,
) -> list[list[str]]:
    """`per_prompt` answers of the model to each task, the finished ones; with a repair all of them, as it leaves them.

    `file` keeps what came, a line a task and lot; a task that it has is not asked again. Each lot draws anew.
    """
    from slimepo.model.generate import completion_text, generate
    from slimepo.terminal import counted

    lines = [line for line in json_lines(file) if line.get("lot", 0) == lot]
    kept: dict[str, list[str]] = {line["task"]: line["answers"] for line in lines}
    waiting = [place for place, task in enumerate(tasks) if task.id not in kept]
    if not waiting:
        # Nothing is loaded for nothing.
        return [kept[task.id] for task in tasks]
    with counted(console, f"{name}: samples" + (f", lot {lot + 1}" if lot else "")) as report:

        def keep(places: Sequence[int], completions: Any) -> None:
            rows = []
            for place, given in zip(places, completions, strict=True):
                task = tasks[place]
                if task.id in kept:
                    # Of a batch that was cut short some lines were written.
                    continue
                row: dict[str, Any] = {"task": task.id}
                if of.repair is None:
                    answers = [completion_text(answerer.tokenizer, each) for each in given if each.finished]
                    row |= {"answers": answers, "unfinished": len(given) - len(answers)}
                else:
                    said = [completion_text(answerer.tokenizer, each) for each in given]
                    answers = [of.repair(task, text) for text in said]
                    row |= {"answers": answers, "said": said}
                kept[task.id] = answers
                rows.append(row | ({"lot": lot} if lot else {}))
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
            size = max(1, of.batch_rows // settings.per_prompt)
            try:
                engine.load(answerer.model)
                for start in range(0, len(waiting), size):
                    places = waiting[start : start + size]
                    asked = [Prompt(tasks[at].id, tasks[at].prompt, tasks[at].row, ids[at]) for at in places]
                    seeds = [sample_seed(seed, lot, place, "pairs") for place in places]
                    keep(places, engine.sample(answerer.end_ids, asked, seeds))
            finally:
                engine.close()
            return [kept[task.id] for task in tasks]
        generate(
            answerer.model,
            ids,
            end_token_ids=answerer.end_ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            samples=settings.per_prompt,
            seed=sample_seed(seed, lot, 0, "pairs") if lot else seed,
            batch_rows=of.batch_rows,
            constraints=constraints(of, tasks, answerer.model, answerer.tokenizer, answerer.end_ids),
            done=[place for place in range(len(tasks)) if place not in waiting],
            finished=keep,
        )
    return [kept[task.id] for task in tasks]
