"""Where a model stands on what is held out, before and after a stage: pairs that are scored, tasks answered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.data.render import ChatFormat
from slimepo.files import is_main_process, write_json, write_json_lines
from slimepo.model.score import PairScores, chosen_fell, distributions, histogram, score_pairs, summary
from slimepo.pipeline.data import StageRows
from slimepo.pipeline.tasks import Answer, answer_tasks, measure

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.trainer import PreferenceTrainer


@dataclass(frozen=True)
class Standing:
    """Where a model stands on what is held out: scores of the pairs, answers to the tasks."""

    scores: PairScores | None
    answers: list[Answer]


def standing(
    trainer: PreferenceTrainer, rows: StageRows, chat: ChatFormat, console: Console, when: str
) -> Standing:
    """Score and answer all that is held out, with the trainer's model as it is now; `when` is for the console."""
    scores, answers = None, []
    if rows.heldout:
        what = f"held-out pairs {when}"
        with console.status(what) as status:
            scores = score_pairs(
                trainer.model,
                rows.heldout,
                progress=lambda done, total: status.update(f"{what}: {done}/{total}"),
                # No more at once than training takes.
                collator=replace(trainer.data_collator, micro_batch_size=trainer.args.eval_batch_size),
            )
    if rows.tasks is not None and rows.tasks.heldout:
        answers = answer_tasks(
            trainer.model, rows.tasks, chat, {chat.end_id}, console, f"held-out tasks {when}"
        )
    return Standing(scores, answers)


def compared(
    rows: StageRows, before: Standing, after: Standing, threshold: float, folder: Path
) -> dict[str, Any]:
    """Figures before and after of what is held out, empty where nothing is; distributions and answers go to files."""
    found: dict[str, Any] = {"before": {}, "after": {}}
    shapes: dict[str, Any] = {}
    standings = {"before": before, "after": after}
    if before.scores is not None and after.scores is not None:
        found |= {"pairs": len(before.scores.chosen), "chosen_fell": chosen_fell(before.scores, after.scores)}
        found |= {"before": summary(before.scores, threshold), "after": summary(after.scores, threshold)}
        shapes = distributions(before.scores, after.scores)
    if rows.tasks is not None and rows.tasks.heldout:
        tasks = rows.tasks.heldout
        found["prompts"] = len(tasks)
        lines: list[dict[str, Any]] = [
            {"task": task.id, "prompt": task.prompt, "gold": task.gold, "family": task.family}
            for task in tasks
        ]
        for when, standing in standings.items():
            found[when] |= measure(tasks, standing.answers)
            for line, answer in zip(lines, standing.answers, strict=True):
                line[when] = {
                    "text": answer.text, "correct": answer.verdict.correct, "valid": answer.verdict.valid,
                    "finished": answer.finished,
                }  # fmt: skip
        was, now = ([answer.tokens for answer in each.answers] for each in standings.values())
        shapes["answer_lengths"] = histogram(was, now)
        if is_main_process():
            write_json_lines(folder / "answers.jsonl", lines)
    if shapes and is_main_process():
        write_json(folder / "distributions.json", shapes)
    return found if found["after"] else {}
