"""The displacement monitor: where training moves a fixed sample of pairs, as it happens, and a word when that is bad.

It measures on the main process alone and touches neither weights, gradients nor random states, so that a run with it
ends in the same weights as one without. docs/monitor.md says how to read what it writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError
from slimepo.losses import hyperparameters, slime
from slimepo.monitor.displacement import (
    BINS,
    SideScores,
    flat_answers,
    flat_figures,
    of_scores,
)
from slimepo.monitor.probe import (
    end_token,
    entanglement,
    greedy_answers,
    prompts_for,
    score_sample,
)
from slimepo.monitor.record import FILE, VERSION, MonitorRecord
from slimepo.monitor.sample import draw_sample, reserve_means, sample_figures, second_look
from slimepo.monitor.settings import (
    CHOSEN_SHARE,
    GENERATION_SHARE,
    SCORING_SHARE,
    Kind,
    MonitorSettings,
    Pace,
    StepClock,
    answer_length,
)
from slimepo.monitor.verdicts import judge_answers, judge_pairs, looks_fallen

if TYPE_CHECKING:
    from slimepo.model.score import PairScores
    from slimepo.training.trainer import PreferenceTrainer

_TRIED_TOKENS = 4


class DisplacementMonitor(TrainerCallback):
    """Scores a fixed sample of training and held-out pairs now and then, writes figures and warns.

    `PreferenceTrainer` makes one by itself (`monitor` in its config); one that is given to it as a callback is used
    instead.

    Args:
        settings: what is measured and how often.
        folder: where `monitor.jsonl` goes; a resumed run finds the figures of step 0 there.
        heldout: rows that are not trained on; None takes the trainer's eval_dataset.
        valid: whether an answer has the form that its row asks for, `(row_id, text) -> bool`.
        say: what warnings are given to; the trainer's panel where it has one, else a logger.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        folder: str | Path,
        heldout: Sequence[TokenizedPair] | None = None,
        valid: Callable[[str, str], bool] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.settings, self.heldout, self.valid = settings, heldout, valid
        self.record = MonitorRecord(Path(folder) / FILE, say)
        self._trainer: PreferenceTrainer | None = None
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

    def conclude(self, before: PairScores, after: PairScores) -> None:
        """Judge the run once more by all held-out pairs, where they were scored before and after it anyway.

        What the sample was too small for is said here, and what it was wrong about is taken back.
        """
        if self._start is None:
            return
        now, start = (of_scores(scores, before, self._threshold) for scores in (after, before))
        # Without the mild thresholds of a warning that is on: what the sample said has no say here.
        verdicts = judge_pairs({"heldout": now}, {"heldout": start}, {}, ("unlearning", "floor"))
        self.record.conclude(self.record.of_kind("probe")[-1]["step"], verdicts, now["chosen_pairs"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        started = time.perf_counter()
        self.record.clear()
        self._clock = StepClock(state.global_step, started)
        self._prepare(state)
        budget, first, last = self.settings.budget, state.global_step, state.max_steps
        self._scoring = Pace(budget * SCORING_SHARE, 1, first, last, self.settings.every, last=first)
        self._generation = Pace(
            budget * GENERATION_SHARE, 0, first, last, self.settings.generate_every, last=first
        )
        kept = self.record.up_to(first) if first else []
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
            settings = self.settings
            asked = settings.every is not None or settings.generate_every is not None
            if per_step is not None or step >= state.max_steps or asked:
                self._measure(state, per_step or 0.0)
        stop = self.record.stopped is not None
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
            self._probe(state)
        if self._prompts and self._generation.last < state.global_step:
            self._generate(state)
        self._clock.own(time.perf_counter() - started)
        self.record.append(
            {
                "kind": "end",
                "step": state.global_step,
                "reason": "stopped" if self.record.stopped else "finished",
                "seconds": round(self._clock.spent, 3),
                "train_seconds": round(training, 3),
                "share": round(self._clock.spent / training, 4),
                "probes": len(self.record.of_kind("probe")),
                "generations": len(self.record.of_kind("generation")),
                "warnings": self.record.holding(),
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
        rows_read = state.max_steps * trainer.args.train_batch_size * trainer.accelerator.num_processes
        one_answer = trainer.objective.judged or len(trainer.sides) == 1
        pairs = rows_read * (CHOSEN_SHARE if one_answer else 1)
        heldout = self._heldout_rows()
        self._sample = draw_sample(trainer.train_dataset, heldout, settings, pairs, seed)
        self._trained_pairs, rows = pairs, self._sample.rows
        self._end = end_token(rows["train"])
        asked = heldout or trainer.train_dataset
        count = settings.prompts if self._end is not None else 0
        self._prompts = prompts_for(asked, count, seed) if count else []
        longest = max((len(a) for of in rows.values() for r in of for a in (r.chosen, r.rejected)), default=1)
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
            self.record.tell(
                f"the figures of step 0 are not in {self.record.path}, or of other pairs: changes are counted from "
                f"step {state.global_step}"
            )
        decode, asked = self._decode(), "heldout" if self._sample.rows["heldout"] else "train"
        self.record.begin(
            {
                "kind": "start",
                "step": state.global_step,
                "version": VERSION,
                "loss": trainer.args.loss,
                "name": self.record.path.parent.name,
                "threshold": self._threshold,
                "margins": self._margins,
                **self._sample.ids,
                "bins": list(BINS),
                "prompts": [
                    {
                        "row_id": row.row_id,
                        "set": asked,
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
        self._probe(state)
        self._fit_answers()
        if self._prompts:
            self._generate(state)
        self._unlogged = {}

    def _fit_answers(self) -> None:
        """Shorten the greedy answers to what the run pays for, from the time that a few tokens take."""
        started = _now(self._watched.args.device)
        if not self._prompts or self._answers(_TRIED_TOKENS) is None:
            return
        per_token = (_now(self._watched.args.device) - started) / _TRIED_TOKENS
        per_pair = self._scoring.spent / self._sample.cost
        self._max_new_tokens = answer_length(
            self.settings, self._max_new_tokens, self._trained_pairs, per_pair, per_token
        )
        self.record.lines[0]["max_new_tokens"] = self._max_new_tokens
        self.record.rewrite()

    def _goes_on(self, kept: list[dict[str, Any]]) -> bool:
        """Whether these lines are of this run's sample and begin with its figures of step 0."""
        kinds = [line["kind"] for line in kept]
        same = kinds[:2] == ["start", "probe"] and kept[0].get("version") == VERSION
        ids = self._sample.ids
        return same and {key: kept[0].get(key) for key in ids} == ids

    def _take_up(self, kept: list[dict[str, Any]], state: TrainerState) -> None:
        """Go on behind the checkpoint: the start is what the file says it was, not where the run is resumed."""
        self.record.take_up(kept)
        probes, answers = self.record.of_kind("probe"), self.record.of_kind("generation")
        self._since, self._start = probes[0]["since"], probes[0]
        self._start_answers = answers[0] if answers else None
        # Without answers at the start the model could give none.
        self._prompts = self._prompts if answers else []
        self._clock.carried = probes[-1]["train_seconds"]
        self._clock.spent = sum(line["seconds"] for line in (*probes, *answers))
        self._scoring.done, self._scoring.cost = max(len(probes) - 1, 0), probes[-1]["seconds"]
        self._generation.done = max(len(answers) - 1, 0)
        self._generation.cost = answers[-1]["seconds"] if answers else 0.0
        self._max_new_tokens = kept[0]["max_new_tokens"]
        self.record.append({"kind": "resume", "step": state.global_step})

    def _measure(self, state: TrainerState, per_step: float) -> None:
        started, before = time.perf_counter(), len(self.record.lines)
        if self._scoring.due(state.global_step, per_step):
            self._probe(state)
        if self._prompts and self._generation.due(state.global_step, per_step):
            self._generate(state)
        if len(self.record.lines) > before:
            self._clock.own(time.perf_counter() - started)

    def _probe(self, state: TrainerState) -> None:
        """Score the sample, write its figures and judge them."""
        trainer, sampled = self._watched, self._sample
        training = self._clock.training(time.perf_counter())
        started = _now(trainer.args.device)
        options = self._slime_options()
        line = sample_figures(sampled, self._score, self._start, self._threshold, self._margins, options)
        line["entanglement"] = self._entanglement()
        again = _now(trainer.args.device) - started
        if sampled.reserve and self._start is None:
            line["reserve"] = reserve_means(sampled, self._score).tolist()
        elif sampled.reserve and self._start is not None and self._looks_different(line):
            line["second_look"] = second_look(sampled, self._score, line, self._start)
        seconds = _now(trainer.args.device) - started
        self._scoring.note(state.global_step, seconds, again)
        line = {
            "kind": "probe",
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "seconds": round(seconds, 4),
            "train_seconds": round(training, 3),
            "since": self._since,
            **line,
        }
        self.record.append(line)
        if self._start is None:
            self._start = line
        self._unlogged |= flat_figures(line)
        now, start = ({name: probe[name] for name in sampled.rows} for probe in (line, self._start))
        if "second_look" in line:
            now[sampled.reserve_set] = now[sampled.reserve_set] | line["second_look"]
        self.record.warn(state.global_step, judge_pairs(now, start, self.record.on), self._stop_on(state))

    def _score(self, rows: Sequence[TokenizedPair]) -> tuple[SideScores, SideScores]:
        """Score rows with the policy as it is; at least as many at once as train at once fit without gradients."""
        trainer = self._watched
        batch_size = max(int(trainer.args.eval_batch_size), trainer.args.micro_batch_size or 1)
        return score_sample(trainer.model, rows, trainer.data_collator, batch_size)

    def _looks_different(self, line: Mapping[str, Any]) -> bool:
        """Whether the sample alone would have unlearning of the reserve's set come on, or go off again."""
        name = self._sample.reserve_set
        on = self.record.on.get(("unlearning", name), False)
        return looks_fallen(line[name], on) != on

    def _stop_on(self, state: TrainerState) -> list[Kind]:
        """The warnings that end the run; none after the last step, when there is nothing left to stop."""
        return self.settings.stop_on if state.global_step < state.max_steps else []

    def _entanglement(self) -> dict[str, Any] | None:
        pairs = [row for row in self._sample.rows["train"] if len(row.chosen) and len(row.rejected)]
        pairs = pairs[: self.settings.entanglement]
        return entanglement(self._watched.model, pairs) if pairs else None

    def _generate(self, state: TrainerState) -> None:
        """Answer the prompts greedily, write the answers and judge them."""
        trainer = self._watched
        started = _now(trainer.args.device)
        answers = self._answers(self._max_new_tokens)
        if answers is None:
            return
        seconds = _now(trainer.args.device) - started
        self._generation.note(state.global_step, seconds)
        line = {"kind": "generation", "step": state.global_step, "seconds": round(seconds, 4), **answers}
        self.record.append(line)
        if self._start_answers is None:
            self._start_answers = line
        self._unlogged |= flat_answers(line)
        verdict = judge_answers(line, self._start_answers, self.record.on)
        self.record.warn(state.global_step, [verdict], self._stop_on(state))

    def _answers(self, max_new_tokens: int) -> dict[str, Any] | None:
        """Greedy answers to the prompts; None from a model that cannot generate, which is then not asked again."""
        assert self._end is not None
        model, decode = self._watched.model, self._decode()
        try:
            return greedy_answers(model, self._prompts, self._end, max_new_tokens, decode, self.valid)
        except InputError as error:
            # A model without a key-value cache trains all the same.
            self.record.tell(f"no generation probe: {error}")
            self._prompts = []
            return None

    def _decode(self) -> Callable[[Sequence[int]], str] | None:
        tokenizer = self._watched.processing_class
        return None if tokenizer is None else lambda ids: str(tokenizer.decode(list(ids)))


def _now(device: torch.device) -> float:
    """The time once the device has done what it was given: training's kernels are not the monitor's cost."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
