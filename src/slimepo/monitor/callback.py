"""The displacement monitor: where training moves a fixed sample of pairs, as it happens, and a word when that is bad.

It touches neither weights, gradients nor random states, so that a run with it ends in the same weights as one without.
What it looks at, and when, is a function of the rows, the recipe and the seed alone. docs/monitor.md says how to read
what it writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimepo.data.batch import StepCollator
from slimepo.data.rows import PAIR, Row
from slimepo.errors import InputError
from slimepo.losses import find_objective, hyperparameters, slime
from slimepo.losses.table import with_anchor_times
from slimepo.model.score import PairScores
from slimepo.monitor.bounds import bound_figures, bounded
from slimepo.monitor.cures import ANCHOR_FACTOR, RATE_FACTOR, lower_rate, still_falls
from slimepo.monitor.displacement import BINS, SideScores, figures, flat, of_scores
from slimepo.monitor.fallen import fell_most, first_tokens
from slimepo.monitor.probe import (
    end_token,
    entanglement,
    gradient_share,
    greedy_answers,
    prompts_for,
    sample,
    score_sample,
)
from slimepo.monitor.record import FILE, VERSION, MonitorRecord, cured_in
from slimepo.monitor.settings import MonitorSettings, look_steps, sample_size
from slimepo.monitor.verdicts import judge_answers, judge_pairs


@dataclass(frozen=True)
class Watched:
    """What a trainer hands over: its objective by name, with options, its rows, and how they become batches.

    train, heldout: the rows to draw from; `heldout` may be empty. collator: lays out the rows that are scored, with its
    own limits. whole: gives the model with all of its weights, where training cuts it into parts; all ranks call it.
    change: trains with another loss, options included, from the next step on; all ranks call it.
    """

    loss: str
    loss_options: Mapping[str, Any]
    train: Sequence[Row]
    heldout: Sequence[Row]
    collator: StepCollator
    whole: Callable[[], nn.Module] | None = None
    change: Callable[[str, Mapping[str, Any]], None] | None = None


class DisplacementMonitor(TrainerCallback):
    """Scores a fixed sample of training and held-out pairs now and then, writes figures and warns.

    `PreferenceTrainer` makes one by itself (`monitor` in its config); one that is given to it as a callback is used
    instead. Any other trainer of transformers calls `watch` before it trains.

    Args:
        settings: what is measured and how often.
        folder: where `monitor.jsonl` goes; a resumed run finds the figures of step 0 there.
        heldout: rows that are not trained on, in place of those that the trainer hands over.
        valid: whether an answer has the form that its row asks for, `(row_id, text) -> bool`.
        say: what warnings are given to; the trainer's panel where it has one, else a logger.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        folder: str | Path,
        heldout: Sequence[Row] | None = None,
        valid: Callable[[str, str], bool] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.settings, self.heldout, self.valid = settings, heldout, valid
        self.record = MonitorRecord(Path(folder) / FILE, say)
        self._watched: Watched | None = None
        # What this process has spent on it.
        self.seconds = 0.0
        self._unlogged: dict[str, float] = {}

    def watch(self, watched: Watched) -> None:
        """Say what is watched, before training begins."""
        self._watched = watched

    def figures_to_log(self) -> dict[str, float]:
        """The figures measured since this was last called, under flat names; for the trainer's next log line."""
        unlogged, self._unlogged = self._unlogged, {}
        return unlogged

    def conclude(self, before: PairScores, after: PairScores) -> None:
        """Judge the run once more by all held-out pairs, where they were scored before and after it anyway.

        What the sample was too small for is said here, and what it was wrong about is taken back.
        """
        probes = self.record.of_kind("probe")
        if probes:
            now, start = (of_scores(scores, before, self._options["threshold"]) for scores in (after, before))
            # Without the mild thresholds of a warning that is on: what the sample said has no say here.
            verdicts = judge_pairs({"heldout": now}, {"heldout": start}, on={})
            self.record.conclude(probes[-1]["step"], verdicts, now["chosen_pairs"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        watched, settings, tokenizer = self._watched, self.settings, given["processing_class"]
        if watched is None:
            raise InputError(
                "DisplacementMonitor has nothing to watch: give it to a PreferenceTrainer, or call watch"
            )
        self._stopping = False
        # The chosen answers as they were at the last look.
        self._chosen: SideScores | None = None
        self._steps = look_steps(state.max_steps, settings.every)
        self._decode: Callable[[list[int]], str | None] = lambda ids: (
            str(tokenizer.decode(ids)) if tokenizer else None
        )
        heldout = list(watched.heldout if self.heldout is None else self.heldout)
        trained = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        pairs = settings.pairs or sample_size(trained, len(self._steps))
        self._rows = {
            "train": sample(watched.train, pairs, args.seed),
            "heldout": sample(heldout, pairs, args.seed),
        }
        # Whose answers are kept token by token.
        self._shown = "heldout" if self._rows["heldout"] else "train"
        rows = [row for of in self._rows.values() for row in of]
        self._end = end_token(rows)
        self._prompts = prompts_for(heldout or watched.train, settings.prompts, args.seed)
        longest = max((len(answer) for row in rows for answer in row.responses), default=1)
        self._max_new_tokens = min(settings.max_new_tokens, 2 * longest)
        if settings.cure == "raise-anchor" and watched.change is None:
            raise InputError(
                "on_unlearning: raise-anchor changes the loss, and this trainer lets nobody do that"
            )
        self._use(watched.loss, watched.loss_options)
        model = self._whole(given["model"])
        kept = (
            self.record.up_to(state.global_step) if state.global_step and state.is_world_process_zero else []
        )
        if settings.cure == "raise-anchor":
            # A checkpoint knows the learning rate, and not the loss: how often it was changed is in the file.
            lost = state.is_world_process_zero and state.global_step and not kept
            cured = cured_in(kept)
            told = broadcast(torch.tensor([float(lost), float(cured)], device=args.device))
            if told[0]:
                raise InputError(
                    f"{self.record.path} is not there, and it alone says how far the anchor was raised: start anew, or "
                    "leave on_unlearning: raise-anchor out"
                )
            self._raise_anchor(int(told[1]))
        if state.is_world_process_zero:
            self._take_up_or_begin(model, args, state, kept)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> TrainerControl:
        if state.global_step not in self._steps:
            return control
        model = self._whole(given["model"])
        if state.is_world_process_zero:
            self._look(model, args, state)
        settings = self.settings
        if settings.stops or settings.cure:
            # The main process alone has measured, and all must do the same behind the same step.
            main, last = state.is_world_process_zero, state.global_step >= state.max_steps
            cures = main and settings.cure is not None and not last and still_falls(self.record)
            told = [self.record.stopped is not None, cures, self.record.cured]
            stop, cure, cured = broadcast(
                torch.tensor(told, dtype=torch.float32, device=args.device)
            ).tolist()
            if stop:
                control.should_training_stop, control.should_log, control.should_save = True, True, False
                self._stopping = True
            elif cure:
                words = self._cure(given, int(cured) + 1)
                if main:
                    self.record.cure(state.global_step, words)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        # No checkpoint where it stops: a run that went on from one would take one step more before it stopped again.
        control.should_save &= not self._stopping
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        record, step = self.record, state.global_step
        model = self._whole(given["model"])
        if state.is_world_process_zero:
            # A run that ends early, by whatever callback, has its last figures too.
            if record.of_kind("probe")[-1]["step"] < step:
                self._look(model, args, state)
            reason = "stopped" if record.stopped else "finished"
            self._keep_fallen(step)
            record.append({"kind": "end", "step": step, "reason": reason, "warnings": record.holding()})

    def _use(self, loss: str, options: Mapping[str, Any]) -> None:
        """Take the figures of SLIME, if it is that, as it is with these options."""
        objective = find_objective(loss)
        self._slime = {**objective.preset, **options} if objective.function is slime else None
        self._options = hyperparameters(slime) | (self._slime or {})

    def _cure(self, given: Mapping[str, Any], times: int) -> str:
        """Change the run for the `times`-th time, on every rank, and say what is so from now on."""
        if self.settings.cure == "lower-rate":
            lower_rate(given["optimizer"], given["lr_scheduler"], RATE_FACTOR)
            rate = max(group["lr"] for group in given["optimizer"].param_groups)
            return f"chosen answers fall, so the learning rate is {RATE_FACTOR:g} of what it was: {float(rate):.3g} now"
        return f"chosen answers fall, so the anchor is raised: {self._raise_anchor(times)}"

    def _raise_anchor(self, times: int) -> str:
        """Train with the anchor raised so many times, and say what the loss is then."""
        watched = self._watched
        assert watched is not None
        assert watched.change is not None
        loss, options = with_anchor_times(watched.loss, watched.loss_options, ANCHOR_FACTOR**times)
        watched.change(loss, options)
        self._use(loss, options)
        return f"{loss} {options}"

    def _take_up_or_begin(
        self, model: nn.Module, args: TrainingArguments, state: TrainerState, kept: list[dict[str, Any]]
    ) -> None:
        """Go on behind a checkpoint with step 0 as the file has it, or write a new file with how things stand now."""
        assert self._watched is not None
        header = {
            "kind": "start",
            "step": state.global_step,
            "version": VERSION,
            "loss": self._watched.loss,
            "name": self.record.path.parent.name,
            "threshold": self._options["threshold"],
            "margins": [self._options["soft_margin"], self._options["hard_margin"]],
            "rows": {name: [row.id for row in rows] for name, rows in self._rows.items()},
            "bins": list(BINS),
            "prompts": [
                {"row_id": row.id, "text": self._decode(row.prompt_ids.tolist())} for row in self._prompts
            ],
            "max_new_tokens": self._max_new_tokens,
            "seed": args.seed,
            "stop_on": self.settings.stops,
            "on_unlearning": self.settings.on_unlearning,
            "cured": cured_in(kept),
            "steps": state.max_steps,
        }
        same = [line["kind"] for line in kept[:2]] == ["start", "probe"] and all(
            kept[0].get(key) == header[key] for key in ("version", "rows")
        )
        if same:
            self.record.begin([*kept, {"kind": "resume", "step": state.global_step}])
            return
        if state.global_step:
            self.record.tell(
                f"the figures of step 0 are not in {self.record.path}, or of other pairs: changes are counted from "
                f"step {state.global_step}"
            )
        self.record.begin([header])
        self._look(model, args, state)
        self._unlogged = {}

    def _whole(self, model: nn.Module) -> nn.Module:
        """What the main process measures: the model, with all of its weights where training has cut it into parts."""
        assert self._watched is not None
        return self._watched.whole() if self._watched.whole else model

    def _look(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Measure, write and judge."""
        record, step = self.record, state.global_step
        # After the last step there is nothing left to stop.
        stop_on = self.settings.stops if step < state.max_steps else []
        if args.device.type != "cpu":
            # What training has given the device to do is not the monitor's cost.
            torch.accelerator.synchronize(args.device)
        started = time.perf_counter()
        before = next(iter(record.of_kind("probe")), None)
        found = self._figures(model, before)
        line = {
            "kind": "probe",
            "step": step,
            "epoch": round(state.epoch or 0.0, 4),
            "since": before["step"] if before else step,
            "seconds": round(time.perf_counter() - started, 4),
            **found,
        }
        record.append(line)
        self.seconds += line["seconds"]
        if before is None and self._chosen is not None:
            record.append(
                {"kind": "tokens", "step": step, "set": self._shown, "chosen": first_tokens(self._chosen)}
            )
        self._unlogged |= flat(line)
        record.warn(step, judge_pairs(line, before or line, record.on), stop_on)
        if self._end is None or not self._prompts:
            return
        started = time.perf_counter()
        try:
            answers = greedy_answers(
                model, self._prompts, self._end, self._max_new_tokens, self._decode, self.valid
            )
        except InputError as error:
            # A model without a key-value cache trains all the same.
            record.tell(f"no answers are generated: {error}")
            self._prompts = []
            return
        seconds = round(time.perf_counter() - started, 4)
        self.seconds += seconds
        line = {"kind": "generation", "step": step, "seconds": seconds, **answers}
        record.append(line)
        self._unlogged |= flat(line)
        record.warn(step, [judge_answers(line, record.of_kind("generation")[0], record.on)], stop_on)

    def _keep_fallen(self, step: int) -> None:
        """Write down the chosen answers that fell most, where their tokens were scored at the start and now."""
        started, probes = self.record.of_kind("tokens"), self.record.of_kind("probe")
        if started and self._chosen is not None and step > started[0]["step"]:
            rows, means = self._rows[self._shown], probes[0][self._shown]["per_pair"]["chosen"]
            fallen = fell_most(rows, started[0]["chosen"], self._chosen, means, self._decode)
            self.record.append({"kind": "fallen", "step": step, "set": self._shown, "answers": fallen})

    def _figures(self, model: nn.Module, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """What is measured of both sets of pairs; `before` is the line of step 0, None if this is it."""
        assert self._watched is not None
        found: dict[str, Any] = {
            "train": None, "heldout": None, "gradient_share": None, "bound": None, "entanglement": None
        }  # fmt: skip
        # Both sets in one go: what a small model's forward pass costs is mostly overhead.
        rows = [row for of in self._rows.values() for row in of]
        chosen, rejected = score_sample(model, rows, self._watched.collator)
        first = 0
        for name, of in self._rows.items():
            part, first = slice(first, first + len(of)), first + len(of)
            if of:
                sides = chosen.part(part), rejected.part(part)
                start = before[name]["per_pair"] if before else None
                found[name] = figures(*sides, start, self._options)
                if name == self._shown:
                    self._chosen = sides[0]
                if name == "train" and self._slime is not None:
                    found["gradient_share"] = gradient_share(self._slime, *sides)
                    if bounded(self._options):
                        start_bound = before.get("bound") if before else None
                        found["bound"] = bound_figures(self._options, *sides, start_bound)
        pairs = [row for row in self._rows["train"] if all(len(row.response(i)) for i in PAIR)]
        if pairs := pairs[: self.settings.entanglement]:
            found["entanglement"] = {"ratio": entanglement(model, pairs)}
        return found
