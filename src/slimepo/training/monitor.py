"""The displacement monitor: where training moves a fixed sample of pairs, as it happens, and a word when that is bad.

It measures on the main process alone and touches neither weights, gradients nor random states, so that a run with it
ends in the same weights as one without. docs/monitor.md says how to read what it writes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError
from slimepo.losses import hyperparameters, slime
from slimepo.training.displacement import BINS, figures, flat_answers, flat_figures, shares_of_norms
from slimepo.training.folder import json_lines, write_text
from slimepo.training.pace import (
    GENERATION_SHARE,
    SCORING_SHARE,
    Kind,
    MonitorSettings,
    Pace,
    StepClock,
    answer_length,
    sample_size,
)
from slimepo.training.probe import (
    end_token,
    entanglement,
    gradient_norms,
    greedy_answers,
    prompts_for,
    sample,
    score_sample,
)
from slimepo.training.verdicts import Verdict, judge_answers, judge_pairs, three_facts

if TYPE_CHECKING:
    from slimepo.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

VERSION = 1
FILE = "monitor.jsonl"
_TRIED_TOKENS = 8


class DisplacementMonitor(TrainerCallback):
    """Scores a fixed sample of training and held-out pairs now and then, writes figures and warns.

    `PreferenceTrainer` makes one by itself (`monitor` in its config); one that is given to it as a callback is used
    instead.

    Args:
        settings: what is measured and how often.
        folder: where `monitor.jsonl` goes; a resumed run finds the figures of step 0 there.
        heldout: rows that are not trained on; None takes the trainer's eval_dataset.
        valid: whether an answer has the form that its row asks for, `(row_id, text) -> bool`.
        say: what warnings are given to; the module's logger by default.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        folder: str | Path,
        heldout: Sequence[TokenizedPair] | None = None,
        valid: Callable[[str, str], bool] | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.settings, self.path = settings, Path(folder) / FILE
        self.heldout, self.valid, self.say = heldout, valid, say
        self.stopped: dict[str, Any] | None = None
        self.lines: list[dict[str, Any]] = []
        self._trainer: PreferenceTrainer | None = None
        self._on: dict[Kind, bool] = {}
        self._start: dict[str, Any] | None = None
        self._start_answers: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}

    def attach(self, trainer: PreferenceTrainer) -> None:
        """Say whose training is watched; `PreferenceTrainer` does."""
        self._trainer = trainer

    def figures_to_log(self) -> dict[str, float]:
        """The figures measured since this was last called, under flat names; for the trainer's next log line."""
        unlogged, self._unlogged = self._unlogged, {}
        return unlogged

    def summary(self, heldout: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What is worth keeping in the stage's record: warnings, why it stopped, the cost, three facts.

        heldout: that record's own figures of all held-out pairs, which the facts are then of; else of the sample.
        """
        if not self.lines:
            return None
        raised = [x for x in self.lines if x["kind"] == "warning" and x["state"] == "on"]
        ends = [x for x in self.lines if x["kind"] == "end"]
        return {
            "warnings": [{k: x[k] for k in ("step", "warning", "set", "message")} for x in raised],
            "stopped": self.stopped,
            "share": ends[-1]["share"] if ends else None,
            "facts": three_facts(self.lines, heldout),
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        started = time.perf_counter()
        self.stopped, self._on = None, {}
        self._clock = StepClock(state.global_step, started)
        self._prepare(state)
        budget, first, last = self.settings.budget, state.global_step, state.max_steps
        self._scoring = Pace(budget * SCORING_SHARE, 1, first, last, self.settings.every, last=first)
        self._generation = Pace(
            budget * GENERATION_SHARE, 1, first, last, self.settings.generate_every, last=first
        )
        # A run that goes on has not ended, whatever was written when it was stopped.
        lines = json_lines(self.path) if first else []
        kept = [line for line in lines if line["step"] <= first and line["kind"] != "end"]
        self.lines = []
        if self._goes_on(kept):
            self._take_up(kept, state)
        else:
            self._begin(state)
        self._clock.own(time.perf_counter() - started)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.is_world_process_zero:
            now, step = time.perf_counter(), state.global_step
            per_step = self._clock.per_step(step, now)
            if per_step is not None or step >= state.max_steps or self.settings.every is not None:
                self._measure(state, per_step or 0.0)
        stop = self.stopped is not None
        if self.settings.stop_on and self._watched.accelerator.num_processes > 1:
            # The other ranks have measured nothing, and must leave the loop at the same step.
            flag = torch.tensor(float(stop), device=args.device)
            stop = bool(self._watched.accelerator.reduce(flag, "sum") > 0)
        control.should_training_stop |= stop
        control.should_log |= stop
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        started = time.perf_counter()
        training = max(self._clock.training(started), 1e-9)
        # A run that ends early, by whatever callback, has its last figures too.
        if self._scoring.last < state.global_step:
            self._probe(state, self._scoring)
        if self._prompts and self._generation.last < state.global_step:
            self._generate(state, self._generation)
        self._clock.own(time.perf_counter() - started)
        counted = [x["kind"] for x in self.lines]
        self._write(
            {
                "kind": "end",
                "step": state.global_step,
                "reason": "stopped" if self.stopped else "finished",
                "seconds": round(self._clock.spent, 3),
                "train_seconds": round(training, 3),
                "share": round(self._clock.spent / training, 4),
                "probes": counted.count("probe"),
                "generations": counted.count("generation"),
                "warnings": [kind for kind, on in self._on.items() if on],
            }
        )

    @property
    def _watched(self) -> PreferenceTrainer:
        if self._trainer is None:
            raise InputError("DisplacementMonitor watches a PreferenceTrainer: give it to one as a callback")
        return self._trainer

    def _prepare(self, state: TrainerState) -> None:
        """Draw the sample and the prompts, both functions of the rows and the seed alone."""
        trainer, settings, seed = self._watched, self.settings, self._watched.args.seed
        pairs = state.max_steps * trainer.args.train_batch_size * trainer.accelerator.num_processes
        self._trained_pairs, size = pairs, sample_size(settings, pairs)
        rows = {"train": trainer.train_dataset, "heldout": self._heldout_rows()}
        self._rows = {name: sample(of, size, seed) for name, of in rows.items()}
        self._end = end_token(self._rows["train"])
        asked = rows["heldout"] or rows["train"]
        count = settings.prompts if self._end is not None else 0
        self._prompts = prompts_for(asked, count, seed) if count else []
        longest = max(
            (len(a) for of in self._rows.values() for r in of for a in (r.chosen, r.rejected)), default=1
        )
        self._max_new_tokens = min(settings.max_new_tokens, 2 * longest)
        options = hyperparameters(slime) | (self._slime_options() or {})
        self._threshold: float = options["threshold"]
        self._margins = [0.0, options["soft_margin"], options["hard_margin"]]

    def _slime_options(self) -> dict[str, Any] | None:
        """The options that SLIME is trained with; None for another objective."""
        objective = self._watched.objective
        return (
            {**objective.preset, **self._watched.args.loss_options} if objective.function is slime else None
        )

    def _heldout_rows(self) -> list[TokenizedPair]:
        if self.heldout is not None:
            return list(self.heldout)
        rows = self._watched.eval_dataset or []
        return [row for part in rows.values() for row in part] if isinstance(rows, Mapping) else list(rows)

    def _begin(self, state: TrainerState) -> None:
        """A new file, and where everything stands before the first step (or where a lost record begins again)."""
        trainer, prompts = self._watched, self._prompts
        if state.global_step:
            self.say(
                f"the figures of step 0 are not in {self.path}, or of other pairs: changes are counted from step "
                f"{state.global_step}"
            )
        write_text(self.path, "")
        decode = self._decode()
        self._write(
            {
                "kind": "start",
                "step": state.global_step,
                "version": VERSION,
                "loss": trainer.args.loss,
                "name": self.path.parent.name,
                "threshold": self._threshold,
                "margins": self._margins,
                "rows": {name: [row.row_id for row in rows] for name, rows in self._rows.items()},
                "bins": list(BINS),
                "prompts": [
                    {
                        "row_id": row.row_id,
                        "set": "heldout" if self._heldout_rows() else "train",
                        "text": decode(row.prompt.tolist()) if decode else None,
                    }
                    for row in prompts
                ],
                "max_new_tokens": self._max_new_tokens,
                "budget": self.settings.budget,
                "seed": trainer.args.seed,
                "stop_on": list(self.settings.stop_on),
                "steps": state.max_steps,
            }
        )
        self._since, self._start, self._start_answers = state.global_step, None, None
        self._probe(state, self._scoring)
        self._fit_answers()
        if self._prompts:
            self._generate(state, self._generation)
        self._unlogged = {}

    def _fit_answers(self) -> None:
        """Shorten the greedy answers to what the run pays for, from the time that a few tokens take."""
        started = _now(self._watched.args.device)
        if not self._prompts or self._answers(_TRIED_TOKENS) is None:
            return
        per_token = (_now(self._watched.args.device) - started) / _TRIED_TOKENS
        per_pair = self._scoring.spent / sum(map(len, self._rows.values()))
        self._max_new_tokens = answer_length(
            self.settings, self._max_new_tokens, self._trained_pairs, per_pair, per_token
        )
        self.lines[0]["max_new_tokens"] = self._max_new_tokens
        self._rewrite()

    def _goes_on(self, kept: list[dict[str, Any]]) -> bool:
        """Whether these lines are of this run's sample and begin with its figures of step 0."""
        rows = {name: [row.row_id for row in rows] for name, rows in self._rows.items()}
        kinds = [line["kind"] for line in kept]
        same = kinds[:2] == ["start", "probe"] and kept[0].get("version") == VERSION
        return same and kept[0]["rows"] == rows

    def _take_up(self, kept: list[dict[str, Any]], state: TrainerState) -> None:
        """Go on behind the checkpoint: the start is what the file says it was, not where the run is resumed."""
        self.lines = kept
        probes = [line for line in kept if line["kind"] == "probe"]
        answers = [line for line in kept if line["kind"] == "generation"]
        self._since, self._start = probes[0]["since"], probes[0]
        self._start_answers = answers[0] if answers else None
        # Without answers at the start the model could give none.
        self._prompts = self._prompts if answers else []
        self._scoring.done = max(len(probes) - 1, 0)
        self._generation.done = max(len(answers) - 1, 0)
        self._on = {line["warning"]: line["state"] == "on" for line in kept if line["kind"] == "warning"}
        self.stopped = next((_stop(line) for line in kept if line.get("stops")), None)
        self._max_new_tokens = kept[0]["max_new_tokens"]
        self._rewrite()
        self._write({"kind": "resume", "step": state.global_step})

    def _measure(self, state: TrainerState, per_step: float) -> None:
        started, before = time.perf_counter(), len(self.lines)
        if self._scoring.due(state.global_step, per_step):
            self._probe(state, self._scoring)
        if self._prompts and self._generation.due(state.global_step, per_step):
            self._generate(state, self._generation)
        if len(self.lines) > before:
            self._clock.own(time.perf_counter() - started)

    def _probe(self, state: TrainerState, pace: Pace) -> None:
        """Score the sample, write its figures and judge them."""
        trainer = self._watched
        training = self._clock.training(time.perf_counter())
        started = _now(trainer.args.device)
        line: dict[str, Any] = {"train": None, "heldout": None, "gradient_share": None, "gradient_norm": None}
        # Both sets in one go: what a small model's forward pass costs is mostly overhead.
        every = [row for rows in self._rows.values() for row in rows]
        chosen, rejected = score_sample(trainer.model, every, trainer.data_collator, self._batch_size())
        first = 0
        for name, rows in self._rows.items():
            if not rows:
                continue
            part, first = slice(first, first + len(rows)), first + len(rows)
            scores = (chosen.part(part), rejected.part(part))
            before = self._start[name]["per_pair"] if self._start else None
            line[name] = figures(*scores, before, self._threshold, self._margins)
            options = self._slime_options()
            if name == "train" and options is not None:
                norms = gradient_norms(slime, options, *scores)
                line["gradient_norm"] = {term: round(norm, 9) for term, norm in norms.items()}
                line["gradient_share"] = shares_of_norms(norms)
        line["entanglement"] = self._entanglement()
        seconds = _now(trainer.args.device) - started
        pace.note(state.global_step, seconds)
        line = {
            "kind": "probe",
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "seconds": round(seconds, 4),
            "train_seconds": round(training, 3),
            "since": self._since,
            **line,
        }
        self._write(line)
        if self._start is None:
            self._start = line
        self._unlogged |= flat_figures(line)
        sets = ("train", "heldout")
        verdicts = judge_pairs({s: line[s] for s in sets}, {s: self._start[s] for s in sets}, self._on)
        self._warn(state, verdicts)

    def _batch_size(self) -> int:
        """Pairs of one forward pass: without gradients at least as many fit as train at once."""
        args = self._watched.args
        return max(int(args.eval_batch_size), args.micro_batch_size or 1)

    def _entanglement(self) -> dict[str, Any] | None:
        pairs = [row for row in self._rows["train"] if len(row.chosen) and len(row.rejected)]
        pairs = pairs[: self.settings.entanglement]
        return entanglement(self._watched.model, pairs) if pairs else None

    def _generate(self, state: TrainerState, pace: Pace) -> None:
        """Answer the prompts greedily, write the answers and judge them."""
        trainer = self._watched
        started = _now(trainer.args.device)
        answers = self._answers(self._max_new_tokens)
        if answers is None:
            return
        seconds = _now(trainer.args.device) - started
        pace.note(state.global_step, seconds)
        line = {"kind": "generation", "step": state.global_step, "seconds": round(seconds, 4), **answers}
        self._write(line)
        if self._start_answers is None:
            self._start_answers = line
        self._unlogged |= flat_answers(line)
        self._warn(state, [judge_answers(line, self._start_answers, self._on)])

    def _answers(self, max_new_tokens: int) -> dict[str, Any] | None:
        """Greedy answers to the prompts; None from a model that cannot generate, which is then not asked again."""
        assert self._end is not None
        model, decode = self._watched.model, self._decode()
        try:
            return greedy_answers(model, self._prompts, self._end, max_new_tokens, decode, self.valid)
        except InputError as error:
            # A model without a key-value cache trains all the same.
            self.say(f"no generation probe: {error}")
            self._prompts = []
            return None

    def _decode(self) -> Callable[[Sequence[int]], str] | None:
        tokenizer = self._watched.processing_class
        return None if tokenizer is None else lambda ids: str(tokenizer.decode(list(ids)))

    def _warn(self, state: TrainerState, verdicts: Sequence[Verdict]) -> None:
        """Report what has come on or gone off, and stop the run where that was asked for."""
        for verdict in verdicts:
            if verdict.holds == self._on.get(verdict.kind, False):
                continue
            self._on[verdict.kind] = verdict.holds
            # After the last step there is nothing left to stop.
            ended = state.global_step >= state.max_steps
            stops = verdict.holds and verdict.kind in self.settings.stop_on and not ended
            message = verdict.message if verdict.holds else f"{verdict.kind}: no longer so"
            self._write(
                {
                    "kind": "warning",
                    "step": state.global_step,
                    "warning": verdict.kind,
                    "state": "on" if verdict.holds else "off",
                    "set": verdict.rows,
                    "message": message,
                    "stops": stops,
                }
            )
            self.say(f"step {state.global_step}: {message}{'; the run stops here' if stops else ''}")
            if stops and self.stopped is None:
                self.stopped = _stop(self.lines[-1])

    def _rewrite(self) -> None:
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines))

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _stop(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the warning that ends a run."""
    return {key: line[key] for key in ("step", "warning", "message")}


def _now(device: torch.device) -> float:
    """The time once the device has done what it was given: training's kernels are not the monitor's cost."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
