"""From prompts to the rows of a step: sampled, rewarded, and made into pairs or given advantages."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slimepo.data.rows import Row
from slimepo.model.generate import Completion
from slimepo.onpolicy.advantages import (
    Array,
    gae,
    group_advantages,
    preferences,
    returns,
    token_rewards,
    whitened,
)
from slimepo.onpolicy.rewards import Prompt, Rewarder
from slimepo.onpolicy.settings import BY_TOKEN, Rollouts

# Prompts with a seed each -> for each prompt its samples.
Sampler = Callable[[Sequence[Prompt], Sequence[int]], list[list[Completion]]]
# Rows -> for each row the log-probs `[tokens]` of each response.
Scorer = Callable[[Sequence[Row]], list[list[np.ndarray]]]


@dataclass(frozen=True)
class Rollout:
    """What was sampled for some prompts: one entry of each list a prompt.

    `rewards` `[prompts, samples]`, NaN for what was not rewarded; `parts` the same of each reward; `skipped` why a
    prompt has none. `seconds`: of sampling, and of the rewards, for all of the prompts. `against`: the same of an
    opponent's answers, where the samples are compared with such. `costs`: as `rewards`, where answers have such.
    """

    prompts: list[Prompt]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards: Array
    parts: dict[str, Array]
    skipped: list[str]
    seconds: dict[str, float]
    against: Rollout | None = None
    costs: Array | None = None

    def answers(self, start: int, stop: int) -> Rollout:
        """That of some of the answers to each prompt."""
        return replace(
            self,
            completions=[of_prompt[start:stop] for of_prompt in self.completions],
            texts=[of_prompt[start:stop] for of_prompt in self.texts],
            rewards=self.rewards[:, start:stop],
            parts={name: part[:, start:stop] for name, part in self.parts.items()},
            costs=None if self.costs is None else self.costs[:, start:stop],
        )

    def part(self, start: int, stop: int) -> Rollout:
        """That of some of the prompts."""
        cut = slice(start, stop)
        return replace(
            self,
            prompts=self.prompts[cut],
            completions=self.completions[cut],
            texts=self.texts[cut],
            rewards=self.rewards[cut],
            parts={name: part[cut] for name, part in self.parts.items()},
            skipped=self.skipped[cut],
            against=self.against and self.against.part(start, stop),
            costs=None if self.costs is None else self.costs[cut],
        )


def sample_seed(seed: int, step: int, item: int, of: str = "rollout") -> int:
    """The seed of the samples of an item of a step; each is a function of this, of its prompt and of its number."""
    digest = hashlib.blake2b(f"{of}:{seed}:{step}:{item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def roll_out(
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampler: Sampler,
    decode: Callable[[Completion], str],
    rewarder: Rewarder,
    opponent: tuple[Sampler, Sequence[int]] | None = None,
    coster: Rewarder | None = None,
) -> Rollout:
    """Sample answers to the prompts, and those of an opponent with seeds of its own; reward all answers to a prompt.

    coster: what gives each answer its cost, which leaves its reward as it is.

    Raises:
        InputError: a reward or a cost failed, and is to stop the run.
    """
    started = time.perf_counter()
    of_policy = sampler(prompts, seeds)
    others = [[] for _ in prompts] if opponent is None else opponent[0](prompts, opponent[1])
    completions = [[*own, *other] for own, other in zip(of_policy, others, strict=True)]
    texts = [[decode(completion) for completion in of_prompt] for of_prompt in completions]
    sampled = time.perf_counter()
    found = rewarder.of_all(prompts, texts)
    costs = coster.of_all(prompts, texts) if coster else None
    rewarded = time.perf_counter()
    shape = (len(found), max((len(answers) for answers in texts), default=0))
    both = Rollout(
        prompts=list(prompts),
        completions=completions,
        texts=texts,
        rewards=np.array([total for total, _, _ in found], dtype=np.float64).reshape(shape),
        parts={
            name: np.array([parts[name] for _, parts, _ in found]).reshape(shape)
            for name in rewarder.functions
        },
        skipped=[
            why or why_no_cost for (_, _, why), (_, _, why_no_cost) in zip(found, costs or found, strict=True)
        ],
        seconds={"sample": sampled - started, "reward": rewarded - sampled},
        costs=None if costs is None else np.array([total for total, _, _ in costs]).reshape(shape),
    )
    own = max(map(len, of_policy), default=0)
    return both if opponent is None else replace(both.answers(0, own), against=both.answers(own, shape[1]))


def as_ids(ids: Sequence[int]) -> Any:
    return np.array(ids, dtype=np.int32)


def counted_rewards(rollout: Rollout, settings: Rollouts, said: bool = False) -> Array:
    """The rewards, NaN for answers that do not count: empty ones (of no words, where `said`), and what was cut off."""
    rewards = np.array(rollout.rewards)
    for place, of_prompt in enumerate(rollout.completions):
        for i, completion in enumerate(of_prompt):
            empty = not (rollout.texts[place][i] if said else completion.token_ids)
            if empty or (settings.skip_unfinished and not completion.finished):
                rewards[place, i] = math.nan
    return rewards


def sample_rows(
    rollout: Rollout,
    settings: Rollouts,
    score_policy: Scorer | None = None,
    score_reference: Scorer | None = None,
    score_values: Scorer | None = None,
) -> list[Row]:
    """A row a prompt with all its samples and their advantages; an answer that does not count is left empty.

    Advantages by token are as they come, float64: `whitened_rows` makes them what a loss reads.

    score_policy: log-probs when it sampled, kept as `behaviour`, for rows that more than one step learns from, for
    answers of another engine that are to be `corrected` (what that says of them is kept as `sampler`), and where
    `settings.kl` > 0, with score_reference, for the penalty: -kl (log pi - log pi_ref) a token, summed for estimators
    that give one advantage a response. score_values: the values `[tokens]` that generalised advantage estimates are
    made of; these and the returns are kept as `values` and `returns`.
    """
    rewards = counted_rewards(rollout, settings)
    kept = [place for place, own in enumerate(rewards) if _has_something_to_learn(own, settings.skip_equal)]
    rows = [
        Row(
            as_ids(rollout.prompts[place].ids),
            tuple(
                as_ids([] if math.isnan(reward) else completion.token_ids)
                for completion, reward in zip(
                    rollout.completions[place], rewards[place].tolist(), strict=True
                )
            ),
            {},
            rollout.prompts[place].id,
        )
        for place in kept
    ]
    behaviour = score_policy(rows) if score_policy is not None else None
    penalties: list[list[Array]] = [[np.zeros(len(response)) for response in row.responses] for row in rows]
    if settings.kl and behaviour is not None and score_reference is not None:
        reference = score_reference(rows)
        penalties = [
            [settings.kl * (b.astype(np.float64) - r) for b, r in zip(of_row, of_reference, strict=True)]
            for of_row, of_reference in zip(behaviour, reference, strict=True)
        ]
    named: dict[str, list[Any]] = {}
    opponents = None if rollout.against is None else counted_rewards(rollout.against, settings)[kept]
    if score_values is None:
        named["advantages"] = _advantages(rewards[kept], opponents, penalties, settings)
    else:
        expected = score_values(rows)
        estimates = _estimates(rewards[kept], penalties, expected, settings)
        named["advantages"] = [tuple(of_row) for of_row in estimates]
        named["values"] = _by_row(list(itertools.chain(*expected)), expected)
        named["returns"] = [
            tuple((estimate + value).astype(np.float32) for estimate, value in zip(*of_row, strict=True))
            for of_row in zip(estimates, expected, strict=True)
        ]
    if behaviour is not None:
        named["behaviour"] = _by_row(list(itertools.chain(*behaviour)), behaviour)
    if settings.corrected:
        named["sampler"] = [
            tuple(
                np.array((completion.logps or []) if len(response) else [], dtype=np.float32)
                for completion, response in zip(rollout.completions[place], row.responses, strict=True)
            )
            for place, row in zip(kept, rows, strict=True)
        ]
    return [
        replace(row, values={name: values[i] for name, values in named.items()}) for i, row in enumerate(rows)
    ]


def whitened_rows(rows: Sequence[Row], add_up: Callable[[Array], Array] = lambda sums: sums) -> list[Row]:
    """The rows of a step with their advantages `[tokens]` whitened over all of its tokens (see `whitened`)."""
    given: list[Any] = [row.values["advantages"] for row in rows]
    found = _by_row(whitened(list(itertools.chain(*given)), add_up), given)
    return [
        replace(row, values={**row.values, "advantages": advantages})
        for row, advantages in zip(rows, found, strict=True)
    ]


def _has_something_to_learn(rewards: Array, skip_equal: bool) -> bool:
    counted = rewards[~np.isnan(rewards)]
    return len(counted) > 0 and not (skip_equal and counted.min() == counted.max())


def _advantages(
    rewards: Array, opponents: Array | None, penalties: list[list[Array]], settings: Rollouts
) -> list[Any]:
    """For each row its advantages: float32 `[samples]`, or a tuple of float64 `[tokens]` a sample."""
    estimator = settings.advantages or "group"
    if estimator not in BY_TOKEN:
        summed = np.array([[each.sum() for each in of_row] for of_row in penalties]).reshape(rewards.shape)
        found = (
            preferences(rewards, opponents) - summed
            if estimator == "preference"
            else group_advantages(rewards - summed, estimator)
        )
        return [np.nan_to_num(of_row).astype(np.float32) for of_row in found]
    of_samples = np.nan_to_num(group_advantages(rewards, estimator))
    flat = returns(of_samples.reshape(-1).tolist(), [-each for of_row in penalties for each in of_row])
    each = iter(flat)
    return [tuple(next(each) for _ in of_row) for of_row in penalties]


def _estimates(
    rewards: Array, penalties: list[list[Array]], expected: list[list[np.ndarray]], settings: Rollouts
) -> list[list[Array]]:
    """Generalised advantage estimates `[tokens]` of each response of each row."""
    return [
        [
            gae(
                of_tokens,
                value.astype(np.float64),
                discount=settings.value.discount,
                decay=settings.value.decay,
            )
            for of_tokens, value in zip(
                token_rewards(np.nan_to_num(of_row).tolist(), [-each for each in costs]), values, strict=True
            )
        ]
        for of_row, costs, values in zip(rewards, penalties, expected, strict=True)
    ]


def _by_row(flat: Sequence[Array], rows: Sequence[Sequence[Array]]) -> list[Any]:
    """Arrays of all responses, row by row, as a tuple of float32 a row."""
    each = iter(flat)
    return [tuple(next(each).astype(np.float32) for _ in of_row) for of_row in rows]


def first_samples(rollout: Rollout) -> list[Row]:
    """A row a prompt with the first of its samples: drawn as all of them are, and read at a fraction of their cost."""
    return [
        Row(as_ids(prompt.ids), (as_ids(completions[0].token_ids),), {}, prompt.id)
        for prompt, completions in zip(rollout.prompts, rollout.completions, strict=True)
    ]


def figures(rollout: Rollout, rows: Sequence[Row], pairs: bool) -> dict[str, float]:
    """What is worth watching of a rollout, of all its samples; NaN where there is nothing to measure."""
    rewards = rollout.rewards
    counted = rewards[~np.isnan(rewards)]
    completions = [completion for of_prompt in rollout.completions for completion in of_prompt]
    lengths = [len(completion.token_ids) for completion in completions]
    entropies = [math.nan if each.entropy is None else each.entropy for each in completions]
    groups = [of_prompt[~np.isnan(of_prompt)] for of_prompt in rewards]
    groups = [group for group in groups if len(group)]
    several = [texts for texts in rollout.texts if len(texts) > 1]
    found = {
        "reward": _mean(counted),
        "reward/std": _mean([group.std() for group in groups]),
        "reward/equal": _mean([group.min() == group.max() for group in groups]),
        "reward/skipped": _mean([bool(why) for why in rollout.skipped]),
        "sampled/tokens": _mean(lengths),
        "sampled/tokens/max": max(lengths, default=math.nan),
        "sampled/finished": _mean([completion.finished for completion in completions]),
        "sampled/entropy": float(np.dot(entropies, lengths)) / sum(lengths) if sum(lengths) else math.nan,
        "sampled/distinct": _mean([len(set(texts)) / len(texts) for texts in several]),
        "sampled/identical": _mean([len(set(texts)) == 1 for texts in several]),
    }
    if rollout.costs is not None:
        found["sampled/cost"] = _mean(rollout.costs[~np.isnan(rollout.costs)])
    if len(rollout.parts) > 1 or rollout.costs is not None:
        found |= {f"reward/{name}": _mean(part[~np.isnan(part)]) for name, part in rollout.parts.items()}
    if rollout.against is not None:
        won = preferences(rewards, rollout.against.rewards) + 0.5
        found |= {
            "reward/against": _mean(rollout.against.rewards[~np.isnan(rollout.against.rewards)]),
            "preferred": _mean(won[~np.isnan(won)]),
        }
    return found | ({"sampled/pairs": len(rows) / max(len(rollout.prompts), 1)} if pairs else {})


def by_rollout(lines: Sequence[Mapping[str, Any]], steps: int) -> list[list[Mapping[str, Any]]]:
    """Lines of `rollouts.jsonl` by their rollout, in their order; each rollout is learnt from in so many steps."""
    grouped = itertools.groupby(lines, lambda line: (line["step"] - 1) // steps)
    return [list(of_rollout) for _, of_rollout in grouped]


def records(rollout: Rollout, step: int) -> list[dict[str, Any]]:
    """A line a prompt for the run folder: its samples, whether they ended, their tokens, every reward (null: none).

    Where answers have `costs`, `rewards` are those less the penalty, and `parts` those before it. What an opponent
    answered stands under `against`.
    """

    def plain(values: Array) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values.tolist()]

    def answers(of: Rollout, place: int) -> dict[str, Any]:
        said = {
            "samples": of.texts[place],
            "finished": [completion.finished for completion in of.completions[place]],
            "tokens": [len(completion.token_ids) for completion in of.completions[place]],
            "rewards": plain(of.rewards[place]),
        }
        parts = {name: plain(part[place]) for name, part in of.parts.items()}
        costs = {} if of.costs is None else {"costs": plain(of.costs[place])}
        return said | costs | ({"parts": parts} if costs or len(parts) > 1 else {})

    lines = []
    for place, prompt in enumerate(rollout.prompts):
        line = {"step": step, "prompt": prompt.id, "messages": prompt.messages, **answers(rollout, place)}
        if rollout.against is not None:
            line["against"] = answers(rollout.against, place)
        lines.append(line | ({"skipped": rollout.skipped[place]} if rollout.skipped[place] else {}))
    return lines


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan
