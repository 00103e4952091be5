"""Callbacks of the trainer: row order, log lines, the metrics file, what is shown in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimepo.training.folder import json_lines

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.order import StepSampler


class EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins; on resume that is the epoch of the checkpoint."""

    sampler: StepSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.epoch = int(state.epoch or 0)


class LogBeforeSave(TrainerCallback):
    """Writes a log line at every checkpoint and at the last step, so that no step's metrics are lost."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_log |= control.should_save or state.global_step >= state.max_steps
        return control


class MetricsFile(TrainerCallback):
    """Appends every log line to a JSONL file; on resume, lines past the checkpoint are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = (
            [line for line in json_lines(self.path) if line["step"] <= state.global_step]
            if state.global_step
            else []
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | logs) + "\n")


class TrainingProgress(TrainerCallback):
    """A progress bar in a terminal; elsewhere one plain line a log."""

    def __init__(self, console: Console | None = None, title: str = "training") -> None:
        from rich.console import Console

        self.console, self.title = console or Console(), title
        self.progress: Any = None
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, TextColumn("{task.fields[facts]}"), console=self.console)
        self.task = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, facts=""
        )
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        facts = log_line(logs or {})
        if self.progress is not None:
            self.progress.update(self.task, facts=facts)
        else:
            self.console.print(f"{self.title} {state.global_step}/{state.max_steps} {facts}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar; also called when training ends in an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def log_line(logs: dict[str, Any]) -> str:
    """The few figures worth a glance while training."""
    shown = {"loss": "loss", "logps/chosen": "chosen", "logps/rejected": "rejected", "margin": "margin"}
    parts = [f"{label} {logs[key]:.3f}" for key, label in shown.items() if key in logs]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)
