"""Callbacks of the trainer: row order, log lines, the metrics file, what is shown in the terminal."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimepo.errors import InputError, NonFiniteLossError
from slimepo.files import json_lines, write_text
from slimepo.parallel.agree import any_rank, of_all_ranks
from slimepo.parallel.engines import held_part, refuse_whole
from slimepo.terminal import Report, counted, make_console

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.steps import StepSampler


# A root mean square that no weight of a working model has.
_BEYOND = 1e6
# Signals that come within so many seconds are one.
_SAME_SIGNAL_S = 2.0
# SLIME's, in the order of its equation.
_TERMS = ("chosen", "rejected", "distance")


class Sharding(TrainerCallback):
    """Stops a run whose weights are not shared out as its arguments ask."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        refuse_whole(args.parallel, given["model"], given["optimizer"], args.world_size)


class EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins; on resume that is the epoch of the checkpoint.

    A run that has taken all of its steps, as one may that is resumed, takes no further one.
    """

    sampler: StepSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.epoch = int(state.epoch or 0)
            self.sampler.finished = state.global_step >= state.max_steps
            control.should_training_stop |= self.sampler.finished


class FiniteWeights(TrainerCallback):
    """Ends a run after the step that has made its weights useless, before a checkpoint can be written of them."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        name = useless_weight(given["model"])
        found = [each for each in of_all_ranks(name) if each]
        if found:
            raise NonFiniteLossError(
                f"the weights are not finite, or beyond all measure, after step {state.global_step}: {found[0]} first. "
                "Its loss and gradient were finite, and no checkpoint was written of it. Lower the learning rate"
            )


class LogBeforeSave(TrainerCallback):
    """Writes a log line at every checkpoint and at the last step, so that no step's metrics are lost."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_log |= control.should_save or state.global_step >= state.max_steps
        return control


# A moving reference's weights in a checkpoint.
_REFERENCE = "reference.pt"


class MovingReference(TrainerCallback):
    """Moves the reference towards the policy every so many steps: TR-DPO (arXiv 2404.09656).

    Every parameter becomes share * policy + (1 - share) * reference. A checkpoint has the reference as it was then.
    """

    def __init__(self, reference: nn.Module, every: int, share: float) -> None:
        self.reference, self.every, self.share = reference, every, share

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        sizes = ({n: p.shape for n, p in m.named_parameters()} for m in (given["model"], self.reference))
        if len({tuple(of_model.items()) for of_model in sizes}) > 1:
            raise InputError(
                "sync_reference: the reference has other weights than the policy: use reference 'copy'"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if state.global_step % self.every == 0:
            with torch.no_grad():
                parameters = zip(self.reference.parameters(), given["model"].parameters(), strict=True)
                for theirs, ours in parameters:
                    theirs.lerp_(ours.to(theirs), self.share)

    def save(self, checkpoint: Path) -> None:
        """Put the reference into a checkpoint."""
        torch.save(self.reference.state_dict(), checkpoint / _REFERENCE)

    def load(self, checkpoint: Path) -> None:
        """Take the reference of a checkpoint. Raises InputError where it has none."""
        if not (checkpoint / _REFERENCE).is_file():
            raise InputError(
                f"sync_reference: {checkpoint} has no {_REFERENCE}: it is of a run whose reference stood still"
            )
        self.reference.load_state_dict(
            torch.load(checkpoint / _REFERENCE, map_location="cpu", weights_only=True)
        )


class WholeRollouts(TrainerCallback):
    """Puts a checkpoint off until the steps of a rollout are done: what a resumed run samples is then what it was."""

    def __init__(self, steps: int) -> None:
        self.steps, self.put_off = steps, False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        wanted = control.should_save or self.put_off
        whole = state.global_step % self.steps == 0 or state.global_step >= state.max_steps
        control.should_save, self.put_off = wanted and whole, wanted and not whole
        return control

    # An epoch may end, and be saved, in the midst of a rollout.
    on_epoch_end = on_step_end


class SaveOnTerm(TrainerCallback):
    """Told to end by SIGTERM or SIGINT, a run writes a checkpoint at the end of the step, and stops.

    All ranks do so at the same step, whichever was told. `steps`: those of a whole rollout, which are taken first.
    Outside of training, and when it is told again, a signal does what it did before. (A terminal and a launcher may
    both pass one Ctrl-C on.)
    """

    def __init__(self, steps: int = 1) -> None:
        self.steps, self.stopped = steps, False
        self.told: float | None = None
        self.before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Signals come to the main thread alone; Ray trains in another one.
        if threading.current_thread() is threading.main_thread():
            self.before = {each: signal.signal(each, self._tell) for each in (signal.SIGTERM, signal.SIGINT)}

    def _tell(self, number: int, _: Any) -> None:
        if self.told is not None and time.monotonic() - self.told > _SAME_SIGNAL_S:
            self.restore()
            signal.raise_signal(number)
        self.told = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        told = any_rank(self.told is not None)
        whole = state.global_step % self.steps == 0 or state.global_step >= state.max_steps
        if told and whole:
            control.should_log = control.should_save = control.should_training_stop = self.stopped = True
        return control

    def restore(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.restore()


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
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

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
    """A live panel in a terminal; elsewhere one plain line a log."""

    def __init__(self, console: Console | None = None, title: str = "training") -> None:
        self.console, self.title = console or make_console(), title
        self.progress: Any = None
        self.live: Any = None
        self.task: Any = None
        self.facts: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        self.progress = Progress(*columns, console=self.console)
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step)
        self.live = Live(get_renderable=self._panel, console=self.console, refresh_per_second=2)
        self.live.start()

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
        facts = log_lines(logs or {})
        # A probe is not made at every log line; until the next one its figures stay on show.
        self.facts = facts if len(facts) > 1 else [*facts, *self.facts[1:]]
        if self.live is None:
            line = "  ".join(facts)
            self.console.print(f"{self.title} {state.global_step}/{state.max_steps} {line}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def warn(self, message: str) -> None:
        """Show a warning of the monitor: as a line of its own, above the panel where there is one."""
        self.console.print(f"{self.title}: {message}", style="yellow")

    def say(self, message: str) -> None:
        """Show a line of its own."""
        self.console.print(f"{self.title}: {message}")

    def counted(self, what: str) -> AbstractContextManager[Report]:
        """Show how far work before training is."""
        return counted(self.console, f"{self.title}: {what}")

    def close(self) -> None:
        """Stop the panel; also called when training ends in an error."""
        if self.live is not None:
            self.live.stop()
            self.live = self.progress = None

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.padding import Padding
        from rich.text import Text

        return Group(self.progress, *(Padding(Text(line), (0, 0, 0, 2)) for line in self.facts))


def useless_weight(model: torch.nn.Module) -> str | None:
    """The first trained weight, by its name, of which this rank's part is not finite, or is beyond all measure."""
    trained = [(name, held_part(p)) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return None
    norms = torch._foreach_norm([part for _, part in trained], 2, torch.float32)
    limits = torch.tensor([_BEYOND * math.sqrt(part.numel()) for _, part in trained])
    # Not "> limit", which NaN is not.
    sound = (torch.stack([norm.to(norms[0].device) for norm in norms]).cpu() <= limits).tolist()
    return next((name for (name, _), fine in zip(trained, sound, strict=True) if not fine), None)


def log_lines(logs: dict[str, Any]) -> list[str]:
    """What is worth a glance while training: the step's figures, and in a second line the monitor's if new."""
    shown = {
        "logps/chosen": "chosen",
        "logps/rejected": "rejected",
        "logps/sampled": "sampled",
        "margin": "Δ",
    }
    terms = [f"{name} {logs[key]:.3f}" for name in _TERMS if (key := f"loss/{name}") in logs]
    parts = [f"loss {logs['loss']:.3f}{' = ' + ' + '.join(terms) if terms else ''}"]
    parts += [f"{label} {logs[key]:.3f}" for key, label in shown.items() if key in logs]
    if "reward" in logs:
        parts += [f"reward {logs['reward']:.3f}", f"{logs['sampled/tokens']:,.0f} tokens a sample"]
        parts += [f"entropy {logs['sampled/entropy']:.3f}"] if "sampled/entropy" in logs else []
    if "tokens_per_second" in logs:
        parts += [f"{logs['tokens_per_second']:,.0f} tok/s", f"padding {logs['padding_share']:.0%}"]
    if (memory := peak_memory()) is not None:
        parts.append(f"{memory / 2**30:.1f} GiB at most")
    name = "heldout" if "monitor/heldout/chosen_change" in logs else "train"
    change = logs.get(f"monitor/{name}/chosen_change")
    if change is None:
        return [" · ".join(parts)]
    fell, pairs = (logs[f"monitor/{name}/chosen_{key}"] for key in ("fell", "pairs"))
    words = "held out" if name == "heldout" else "trained on"
    return [
        " · ".join(parts),
        f"since step 0: chosen answers {words} {change:+.3f} nats per token, {fell:.0%} of {pairs:,} fell",
    ]


def peak_memory() -> int | None:
    """Most bytes that were in use: on the accelerator if there is one, else by this process; None where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    return most if sys.platform == "darwin" else most * 1024
