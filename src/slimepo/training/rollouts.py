"""The rows of on-policy steps: which prompts are answered when, by what model, and what is kept of it."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from slimepo.data.batch import StepCollator
from slimepo.data.chat import chat_format
from slimepo.data.render import ChatFormat
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.files import append_json_lines, json_lines, write_json_lines
from slimepo.losses import Objective
from slimepo.model.chat import end_tokens
from slimepo.model.generate import Completion, Mixture, completion_text, generate
from slimepo.model.modes import compute_dtype, scoring
from slimepo.model.score import score_rows
from slimepo.onpolicy.correction import corrected
from slimepo.onpolicy.costs import costs_of, mean_cost, penalised
from slimepo.onpolicy.critic import Critic
from slimepo.onpolicy.pairs import preference_rows
from slimepo.onpolicy.prompts import PromptDataset
from slimepo.onpolicy.rewards import Prompt, Rewarder, named_rewards
from slimepo.onpolicy.rollouts import (
    Rollout,
    figures,
    first_samples,
    records,
    roll_out,
    sample_rows,
    sample_seed,
    whitened_rows,
)
from slimepo.onpolicy.settings import BY_TOKEN, Rollouts
from slimepo.onpolicy.thresholds import Tried, all_tried, next_threshold
from slimepo.onpolicy.vllm import VLLM, VLLMServer, check_server, open_engine
from slimepo.parallel.agree import of_all_ranks, together
from slimepo.training.reference import Reference
from slimepo.training.steps import StepSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimepo.training.config import PreferenceConfig

FILE = "rollouts.jsonl"


def sampling_inputs(
    settings: Rollouts | None,
    reward: Any,
    cost: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    args: PreferenceConfig,
) -> tuple[list[Rewarder], ChatFormat | None]:
    """What rewards answers, then what gives them their costs, if it does; and the chat format of prompts.

    Raises:
        InputError: there is a reward or a cost that nothing asks for, or none that something does; no tokenizer or no
            server where answers are sampled.
    """
    if cost is not None and (settings is None or settings.cost is None):
        raise InputError(
            "a cost has a limit: give rollouts = {'cost': {'limit': ..., 'weight': ...}} in the config"
        )
    if settings is None:
        if reward is not None:
            raise InputError("a reward is of use where answers are sampled: give rollouts in the config")
        return [], None
    if tokenizer is None:
        raise InputError("give processing_class, the tokenizer: prompts are rendered by its chat template")
    if settings.engine.startswith("http"):
        check_server(settings)
    rewarders = [
        Rewarder(named_rewards(given, what), settings.on_error, settings.timeout, what=what)
        for what, given in {"reward": reward, **({"cost": cost} if settings.cost else {})}.items()
    ]
    return rewarders, chat_format(tokenizer, args.template_options)


def rollout_source(
    settings: Rollouts,
    rewarders: Sequence[Rewarder],
    chat: ChatFormat,
    args: PreferenceConfig,
    model: Any,
    prompts: PromptDataset,
    **run: Any,
) -> RolloutSource:
    """What samples a run's rows: its engine opened, and its value model made where advantages are made of values.

    `run`: the fields of `RolloutSource` that are the trainer's own.

    Raises:
        InputError: the engine cannot sample here, or the model's architecture has no value model.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    file = Path(args.output_dir or ".") / FILE
    engine = open_engine(
        settings,
        context=max(prompts.lengths) + settings.max_new_tokens,
        dtype=compute_dtype(args) or model.dtype,
        seed=seed,
        folder=file.with_name("weights-for-vllm"),
        ranks=run["accelerator"].num_processes,
    )
    if engine and run["accelerator"].is_main_process:
        run["say"](engine.words)
    critic = None
    if settings.advantages == "gae":
        critic = Critic(model, settings.value, args.micro_batch_size or 1, run["accelerator"].device)
    return RolloutSource(
        settings=settings,
        rewarders=rewarders,
        chat=chat,
        end_ids=end_tokens(model, chat),
        seed=seed,
        file=file,
        model=model,
        prompts=prompts,
        engine=engine,
        critic=critic,
        **run,
    )


@dataclass
class RolloutSource:
    """Samples the rows of each step from the policy as it is then.

    With `steps_per_rollout` k the prompts of k mini-batches are answered before the first step on them. `waiting` holds
    the rows of each, `ahead` the figures of steps to come, and `tokens` counts all that was sampled, over all ranks.
    `history` is of the rollouts before this one, where a `threshold` of rewards is found among several, and `costs` is
    of the window of rollouts up to this one, where answers have such.
    `engine`: what writes the answers in place of the model that trains. `whole` gives that model with all of its
    weights, which samples and scores.
    """

    settings: Rollouts
    rewarders: Sequence[Rewarder]
    chat: ChatFormat
    end_ids: frozenset[int]
    seed: int
    file: Path
    objective: Objective
    model: Any
    prompts: PromptDataset
    sampler: StepSampler
    collator: StepCollator
    reference: Reference | None
    accelerator: Any
    say: Callable[[str], None]
    whole: Callable[[], nn.Module]
    engine: VLLM | VLLMServer | None = None
    critic: Critic | None = None
    waiting: dict[int, list[Row]] = field(default_factory=dict)
    facts: list[dict[str, float]] = field(default_factory=list)
    ahead: dict[int, dict[str, float]] = field(default_factory=dict)
    tokens: int = 0
    history: list[Tried] = field(default_factory=list)
    threshold: float = 0.0
    costs: list[list[float]] = field(default_factory=list)

    def rows(self, step: int, last_step: int) -> list[Row]:
        """This rank's rows of step `step`, of which the first is 0. Every rank must call this.

        Raises:
            InputError: a reward failed, and is to stop the run.
        """
        batches, batch = mini_batches(step, last_step, self.settings)
        if batch not in self.waiting or step == batches.start * self.settings.passes:
            trained, reference = self.model, self.reference
            self.model = self.whole()
            self.reference = reference and reference.seen_by(self.model)
            try:
                self._roll_out(batches)
            finally:
                self.model, self.reference = trained, reference
        self.facts.append(self.ahead.pop(step))
        return self.waiting[batch]

    def learn_values(self, rows: Sequence[Row]) -> None:
        """A step of the value model, where there is one, on rows that this has made."""
        if self.critic is not None:
            self.facts.append(self.critic.learn(rows, self.accelerator))

    def spare(self) -> Row:
        """A row for a rank that has none: it takes part with weight 0."""
        responses = (np.array([self.chat.end_id], dtype=np.int32),) * (len(self.objective.positions or (0,)))
        ids = np.array(self.prompts[0].ids, dtype=np.int32)
        values = {"advantages": np.zeros(1, dtype=np.float32), "opponent": np.zeros(2, dtype=np.float32)}
        return Row(ids, responses, values, "spare")

    def _roll_out(self, batches: range) -> None:
        started, first = time.perf_counter(), batches.start * self.settings.passes
        main, begins = self.accelerator.is_main_process, not self.waiting
        with together():
            # What a resumed run samples again is written again. Steps are counted from 1 there, as in the log.
            kept = [line for line in json_lines(self.file) if line["step"] <= first] if begins else []
        with together():
            if begins and main:
                write_json_lines(self.file, kept)
            if self.engine and main:
                self.engine.load(self.model)
        admit, cost, lines = self.settings.admit, self.settings.cost, []
        if begins:
            self.costs = costs_of(kept, self.settings.steps) if cost else []
            self.tokens = sum(map(_tokens_of, kept))
            self.history = all_tried(kept, admit, self.settings.steps) if admit else []
        if admit:
            self.threshold = next_threshold(self.history, admit)
        self.waiting.clear()
        items = [prompts_of(self.sampler, batch) for batch in batches]
        places = [0, *itertools.accumulate(map(len, items))]
        asked = [(batch, item) for batch, of_batch in zip(batches, items, strict=True) for item in of_batch]
        # What one step alone learns from has just been sampled by the policy of that step.
        several = len(batches) > 1 or self.settings.passes > 1
        with together(), self.accelerator.autocast():
            rollout = roll_out(
                [self.prompts[item] for _, item in asked],
                [sample_seed(self.seed, batch, item) for batch, item in asked],
                self._answers,
                functools.partial(completion_text, self.chat.tokenizer),
                self.rewarders[0],
                (
                    functools.partial(
                        sampled, self.model, self.end_ids, self.settings, mixture=self.opponent
                    ),
                    [sample_seed(self.seed, batch, item, "opponent") for batch, item in asked],
                )
                if self.opponent
                else None,
                *self.rewarders[1:],
            )
        if cost and rollout.costs is not None:
            here = rollout.costs[~np.isnan(rollout.costs)].tolist()
            self.costs = [*self.costs, [*itertools.chain(*of_all_ranks(here))]][-cost.window :]
            rollout = penalised(rollout, mean_cost(self.costs), cost)
        with together(), self.accelerator.autocast():
            parts = [rollout.part(start, stop) for start, stop in itertools.pairwise(places)]
            made = [self._rows_of(part, several) for part in parts]
        for number, (part, (rows, facts)) in enumerate(zip(parts, made, strict=True)):
            if self.settings.advantages in BY_TOKEN:
                rows = whitened_rows(rows, functools.partial(_over_ranks, self.accelerator))
            if self.settings.corrected and not self.objective.positions:
                with together():
                    rows, apart = corrected(rows, self.settings)
                    facts |= apart
            self.waiting[batches[number]], self.ahead[first + number] = rows, facts
            lines += self._keep(part, first + number, len(rows))
        if admit:
            self.history += all_tried(lines, admit, self.settings.steps)
        seconds = rollout.seconds | {"score": time.perf_counter() - started - sum(rollout.seconds.values())}
        steps = range(first, first + len(batches) * self.settings.passes)
        for step in steps:
            of_step = {f"time/{what}": each / len(steps) for what, each in seconds.items()}
            self.ahead[step] = self.ahead.get(step, {}) | of_step

    def _rows_of(self, part: Rollout, several: bool) -> tuple[list[Row], dict[str, float]]:
        """The rows of a mini-batch, which `several` steps learn from or one alone, and what is worth watching of it."""
        policy = functools.partial(scoring, self.model, own_precision=False)
        score = functools.partial(_score, collator=self.collator, device=self.accelerator.device)
        if self.objective.positions:
            rows = preference_rows(part, self.settings, self.objective, self.threshold)
        else:
            scored = several or self.settings.kl > 0 or self.settings.corrected
            rows = sample_rows(
                part,
                self.settings,
                functools.partial(score, policy) if scored else None,
                functools.partial(score, self.reference.forward) if self.reference else None,
                self.critic.values if self.critic else None,
            )
        facts = figures(part, rows, bool(self.objective.positions) and not self.objective.judged)
        if self.settings.admit:
            facts["sampled/threshold"] = self.threshold
        if self.settings.cost and self.settings.cost.gate == "batch":
            facts["sampled/cost/window"] = mean_cost(self.costs)
        if self.reference is not None:
            drawn, alone = first_samples(part), replace(self.collator, positions=(0,))
            now, then = (
                _score(opened, drawn, collator=alone, device=self.accelerator.device)
                for opened in (policy, self.reference.forward)
            )
            facts["sampled/kl"] = _token_mean(now) - _token_mean(then)
        return rows, facts

    @property
    def opponent(self) -> Mixture | None:
        """Who writes what samples are compared with, where that is not the policy."""
        if self.reference is None or not self.settings.opposed:
            return None
        share = 1.0 if self.settings.against == "reference" else self.settings.mixture
        return Mixture(self.reference.model, self.reference.forward, share)

    def _answers(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[list[Completion]]:
        if self.engine is None:
            return sampled(self.model, self.end_ids, self.settings, prompts, seeds)
        return self.engine.sample(self.end_ids, prompts, seeds)

    def _keep(self, part: Rollout, step: int, rows: int) -> list[dict[str, Any]]:
        """Write what was sampled on all ranks, a line a prompt; every rank must call this, and has the lines."""
        lines = [line for of_rank in of_all_ranks(records(part, step + 1)) for line in of_rank]
        made = sum(of_all_ranks(rows))
        self.tokens += sum(map(_tokens_of, lines))
        if self.settings.admit:
            lines = [line | {"threshold": self.threshold, "pairs": made} for line in lines]
        with together():
            if self.accelerator.is_main_process:
                append_json_lines(self.file, lines)
        if self.accelerator.is_main_process and not made:
            of_pairs = "an answer above or below the mean" if self.objective.judged else "a pair"
            what = of_pairs if self.objective.positions else "an advantage"
            self.say(f"step {step + 1}: none of its {len(lines)} prompts gave {what}; it trains on nothing")
        return lines

    def close(self) -> None:
        """Let go of the engine in this process, where there is one."""
        if self.engine is not None:
            self.engine.close()

    def figures(self) -> dict[str, float]:
        """Means of the figures since this was last called, over steps and ranks; every rank must call this.

        Of what ends in `/max`, the largest; and all tokens that were sampled since the run began.
        """
        given = [facts for of_rank in of_all_ranks(self.facts) for facts in of_rank]
        self.facts = []
        means = {}
        for name in dict.fromkeys(key for facts in given for key in facts):
            values = np.array([facts[name] for facts in given if name in facts])
            if not np.isnan(values).all():
                means[name] = float(np.nanmax(values) if name.endswith("/max") else np.nanmean(values))
        return means | {"sampled/total": float(self.tokens)}


def sampled(
    model: Any,
    end_ids: frozenset[int],
    settings: Rollouts,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    mixture: Mixture | None = None,
) -> list[list[Completion]]:
    """Samples of the model that is training, or of a mixture with another, by the project's own generation."""
    if not prompts:
        return []
    return generate(
        model,
        [prompt.ids for prompt in prompts],
        end_token_ids=end_ids,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        samples=settings.samples,
        seed=seeds,
        batch_rows=settings.batch_rows,
        entropy=mixture is None,
        mixture=mixture,
    )


def mini_batches(step: int, last_step: int, settings: Rollouts) -> tuple[range, int]:
    """The mini-batches of the rollout that a step learns from, counted over the run from 0, and which one it takes.

    Of the last rollout only as many are sampled as the steps that are left take in all their epochs.

    Example:
        >>> from slimepo.onpolicy.settings import Rollouts
        >>> from slimepo.training.rollouts import mini_batches
        >>> twice = Rollouts(steps_per_rollout=2, epochs=2)
        >>> [mini_batches(step, 6, twice) for step in (0, 1, 2, 3)]
        [(range(0, 2), 0), (range(0, 2), 1), (range(0, 2), 0), (range(0, 2), 1)]
        >>> [mini_batches(step, 6, twice) for step in (4, 5)]
        [(range(2, 3), 2), (range(2, 3), 2)]
    """
    size, passes = settings.steps_per_rollout, settings.passes
    rollout, place = divmod(step, size * passes)
    steps_left = last_step - rollout * size * passes
    start = rollout * size
    batches = range(start, start + min(size, math.ceil(steps_left / passes)))
    return batches, batches[place % len(batches)]


def prompts_of(sampler: StepSampler, batch: int) -> list[int]:
    """This rank's items of a mini-batch, counted over epochs from 0."""
    once = replace(sampler, repeats=1)
    epoch, place = divmod(batch, len(once))
    return next(itertools.islice(replace(once, epoch=epoch), place, None))


def _score(
    opened: Callable[[], Any], rows: Sequence[Row], *, collator: StepCollator, device: torch.device
) -> list[list[np.ndarray]]:
    with opened() as forward:
        return [[numbers[0] for numbers in of_row] for of_row in score_rows(forward, rows, collator, device)]


def _tokens_of(line: Mapping[str, Any]) -> int:
    """All tokens that were sampled for a line of the file, an opponent's too."""
    return sum([*line["tokens"], *line.get("against", {}).get("tokens", [])])


def _token_mean(logps: Sequence[Sequence[np.ndarray]]) -> float:
    tokens = np.concatenate([np.zeros(0), *itertools.chain(*logps)])
    return float(tokens.mean()) if len(tokens) else math.nan


def _over_ranks(accelerator: Any, sums: np.ndarray) -> np.ndarray:
    total: np.ndarray = accelerator.reduce(torch.from_numpy(sums).to(accelerator.device), "sum").cpu().numpy()
    return total
