"""Where a model stands on what is held out, before, while and after it trains: pairs are scored, tasks answered."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimepo.data.render import ChatFormat
from slimepo.files import append_json_lines, is_main_process, json_lines, write_json, write_json_lines
from slimepo.model.adapters import adapter_state
from slimepo.model.modes import in_parts
from slimepo.model.score import (
    PairScores,
    add_rows,
    add_weights,
    chosen_fell,
    distributions,
    histogram,
    score_pairs,
    summary,
)
from slimepo.monitor.settings import look_steps
from slimepo.pipeline.data import StageRows, template_facts
from slimepo.pipeline.tasks import Answer, RunTasks, Said, Task, answer_tasks, judged, measure
from slimepo.terminal import make_console
from slimepo.versions import versions

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.trainer import PreferenceTrainer


# Changes with what a kept file holds, and with how scores and answers are made.
_VERSION = 1


@dataclass(frozen=True)
class Standing:
    """Where a model stands on what is held out: scores of the pairs, answers to the tasks."""

    scores: PairScores | None
    answers: list[Answer]


def standing(
    trainer: PreferenceTrainer,
    rows: StageRows,
    chat: ChatFormat,
    console: Console,
    when: str,
    kept: Path | None = None,
) -> Standing:
    """Score and answer all that is held out, with the trainer's model as it is now; `when` is for the console.

    `kept`: a folder that keeps what the model says, for those that start from the same weights. It is judged anew.
    """
    model = trainer.whole_model()
    file, found = None, None
    asked = rows.heldout or (rows.tasks is not None and rows.tasks.heldout)
    if kept is not None and asked and trainer.args.world_size == 1 and not in_parts(model):
        file = kept / f"standing-{_identity(model, trainer, rows, chat)}.npz"
        found = _read(file)
    if found is None:
        found = _look(model, trainer, rows, chat, console, when)
        if file is not None:
            _write(file, *found)
    scores, said = found
    return Standing(scores, judged(rows.tasks, said) if rows.tasks is not None else [])


def _look(
    model: nn.Module,
    trainer: PreferenceTrainer,
    rows: StageRows,
    chat: ChatFormat,
    console: Console,
    when: str,
) -> tuple[PairScores | None, list[Said]]:
    scores, said = None, []
    if rows.heldout:
        what = f"held-out pairs {when}"
        with console.status(what) as status:
            scores = score_pairs(
                model,
                rows.heldout,
                progress=lambda done, total: status.update(f"{what}: {done}/{total}"),
                # No more at once than training takes.
                collator=replace(trainer.data_collator, micro_batch_size=trainer.args.eval_batch_size),
            )
    if rows.tasks is not None and rows.tasks.heldout:
        what = f"held-out tasks {when}"
        said = answer_tasks(model, rows.tasks, chat, {chat.end_id}, console, what)
    return scores, said


def _identity(model: Any, trainer: PreferenceTrainer, rows: StageRows, chat: ChatFormat) -> str:
    """A digest of what scores and answers depend on, to the last bit: weights, rows, and how they are computed."""
    args, tasks, digest = trainer.args, rows.tasks, hashlib.blake2b(digest_size=16)
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    # An adapter's weights say nothing of what they are scaled by.
    how: list[Any] = [_VERSION, versions(), name, model.config.to_json_string(), adapter_state(model)]
    how += [model.config._attn_implementation, args.tf32, args.eval_batch_size]
    how += [trainer.data_collator.layout, trainer.data_collator.max_tokens]
    if tasks is not None:
        how += [
            tasks.facts["heldout"],
            tasks.max_new_tokens,
            tasks.batch_rows,
            chat.end_id,
            template_facts(chat.tokenizer, chat.template_options),
        ]
    digest.update(json.dumps(how, default=str).encode())
    add_rows(digest, rows.heldout)
    add_weights(digest, model)
    return digest.hexdigest()


def _write(file: Path, scores: PairScores | None, said: Sequence[Said]) -> None:
    arrays: dict[str, Any] = {"said": np.array(json.dumps(said))}
    if scores is not None:
        arrays |= {"chosen": scores.chosen, "rejected": scores.rejected}
        arrays["lengths"] = np.array([len(tokens) for tokens in scores.rejected_tokens], np.int64)
        arrays["tokens"] = np.concatenate([np.zeros(0), *scores.rejected_tokens])
    temporary = file.with_suffix(f".{os.getpid()}.part")
    with temporary.open("wb") as whole:
        np.savez(whole, **arrays)
    os.replace(temporary, file)


def _read(file: Path) -> tuple[PairScores | None, list[Said]] | None:
    try:
        with np.load(file) as found:
            said = [Said(*each) for each in json.loads(str(found["said"]))]
            if "chosen" not in found:
                return None, said
            ends = np.cumsum(found["lengths"])
            tokens = np.split(found["tokens"], ends[:-1]) if len(ends) else []
            return PairScores(found["chosen"], found["rejected"], tokens), said
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        # Not there, or damaged: it is asked again, and written anew.
        return None


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
        lines = [_asked(task) for task in tasks]
        for when, standing in standings.items():
            found[when] |= measure(tasks, standing.answers)
            for line, answer in zip(lines, standing.answers, strict=True):
                line[when] = _told(answer)
        was, now = ([answer.tokens for answer in each.answers] for each in standings.values())
        shapes["answer_lengths"] = histogram(was, now)
        if is_main_process():
            write_json_lines(folder / "answers.jsonl", lines)
    if shapes and is_main_process():
        write_json(folder / "distributions.json", shapes)
    return found if found["after"] else {}


class AnswersByStep(TrainerCallback):
    """Answers the held-out tasks now and then while a stage trains; `answers-by-step.jsonl` keeps what came of it.

    It touches neither weights nor random states. A resumed run answers again what is behind its checkpoint.

    Args:
        every: steps from one time to the next; below 1 a share of all steps.
        before: the answers of the model that the stage starts from.
        whole: gives the model with all of its weights.
        say: is told how many were right.

    Its `seconds` are what this process has spent on them.
    """

    FILE = "answers-by-step.jsonl"

    def __init__(
        self,
        folder: Path,
        tasks: RunTasks,
        chat: ChatFormat,
        every: float,
        before: Sequence[Answer],
        whole: Callable[[], nn.Module],
        say: Callable[[str], None],
    ) -> None:
        self.file, self.tasks, self.chat, self.every = folder / self.FILE, tasks, chat, every
        self.before, self.whole, self.say = before, whole, say
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        last = state.max_steps
        self.steps = look_steps(last, math.ceil(self.every if self.every >= 1 else self.every * last) or 1)
        if state.is_world_process_zero:
            kept = [line for line in json_lines(self.file) if 0 < line["step"] <= state.global_step]
            write_json_lines(self.file, [])
            self.keep(0, self.before)
            append_json_lines(self.file, kept)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Behind the last step the stage itself asks.
        if state.global_step not in self.steps or state.global_step == state.max_steps:
            return
        started = time.perf_counter()
        # The panel of training stays on show.
        quiet, what = make_console(quiet=True), f"held-out tasks at step {state.global_step}"
        said = answer_tasks(self.whole(), self.tasks, self.chat, {self.chat.end_id}, quiet, what)
        answers = judged(self.tasks, said)
        self.keep(state.global_step, answers)
        self.seconds += time.perf_counter() - started
        self.say(f"{what}: exact match {measure(self.tasks.heldout, answers)['exact_match']:.1%}")

    def keep(self, step: int, answers: Sequence[Answer]) -> None:
        """Write down the answers at a step, in the order of the tasks, with their figures; first also the tasks."""
        tasks = self.tasks.heldout
        line = {
            "step": step,
            "figures": measure(tasks, answers),
            "answers": [_told(each) for each in answers],
        }
        if step == 0:
            line["tasks"] = [_asked(task) for task in tasks]
        if is_main_process():
            append_json_lines(self.file, [line])


def _asked(task: Task) -> dict[str, Any]:
    return {"task": task.id, "prompt": task.prompt, "gold": task.gold, "family": task.family}


def _told(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "correct": answer.verdict.correct,
        "valid": answer.verdict.valid,
        "finished": answer.finished,
        **({"said": answer.said} if answer.said not in (None, answer.text) else {}),
        **({"cost": answer.cost} if answer.cost is not None else {}),
    }
