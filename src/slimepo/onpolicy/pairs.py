"""Rows of better and worse answers: which samples of a rollout are set against each other, or judged."""

from __future__ import annotations

import itertools

import numpy as np

from slimepo.data.rows import Row
from slimepo.losses import Objective
from slimepo.onpolicy.rollouts import Rollout, as_ids, counted_rewards
from slimepo.onpolicy.settings import Rollouts


def preference_rows(
    rollout: Rollout, settings: Rollouts, objective: Objective, least: float = 0.0
) -> list[Row]:
    """The rows of an objective on better and worse answers; of pairs those whose rewards differ by `least` or more."""
    # A difference of rewards is a rounded number: 0.6 - 0.2 is less than 0.4.
    least -= 1e-9
    if objective.judged:
        return judged_answers(rollout, settings, "divergence" in objective.asks)
    if rollout.against is not None:
        return opposed_rows(rollout, rollout.against, settings, least)
    return pair_rows(rollout, settings, least)


def pair_rows(rollout: Rollout, settings: Rollouts, least: float = 0.0) -> list[Row]:
    """Rows of chosen and rejected: of each prompt the best against the worst, or all that are best against all worst.

    A prompt whose rewards are all equal gives no pair, nor one where they differ by less than `least`, nor do identical
    answers or empty ones. Of answers with equal reward the earlier one is taken.
    """
    rows = []
    for place, rewards in enumerate(counted_rewards(rollout, settings, said=True)):
        prompt, completions, texts = rollout.prompts[place], rollout.completions[place], rollout.texts[place]
        counts = np.flatnonzero(~np.isnan(rewards)).tolist()
        if not counts or rewards[counts].min() == rewards[counts].max():
            continue
        if rewards[counts].max() - rewards[counts].min() < least:
            continue
        best, worst = (
            [i for i in counts if rewards[i] == bound]
            for bound in (rewards[counts].max(), rewards[counts].min())
        )
        if settings.pairs == "best-worst":
            best, worst = best[:1], worst[:1]
        for number, (chosen, rejected) in enumerate(itertools.product(best, worst)):
            responses = (as_ids(completions[chosen].token_ids), as_ids(completions[rejected].token_ids))
            name = prompt.id if settings.pairs == "best-worst" else f"{prompt.id} ({number + 1})"
            if texts[chosen] != texts[rejected]:
                rows.append(Row(as_ids(prompt.ids), responses, {}, name))
    return rows


def opposed_rows(rollout: Rollout, against: Rollout, settings: Rollouts, least: float = 0.0) -> list[Row]:
    """Rows of chosen and rejected: each sample and the opponent's answer of its number, by their rewards.

    Their value `opponent` `[2]` is 1 for the response that is the opponent's. Rewards that are equal, or differ by less
    than `least`, give no pair, nor do identical answers or empty ones.
    """
    own, other = counted_rewards(rollout, settings, said=True), counted_rewards(against, settings, said=True)
    rows = []
    # NaN is neither more nor less.
    for place, i in np.argwhere((own > other) | (own < other)).tolist():
        if abs(own[place, i] - other[place, i]) < least:
            continue
        if rollout.texts[place][i] == against.texts[place][i]:
            continue
        lost = bool(own[place, i] < other[place, i])
        answers = [as_ids(each.completions[place][i].token_ids) for each in (rollout, against)]
        rows.append(
            Row(
                as_ids(rollout.prompts[place].ids),
                (answers[lost], answers[not lost]),
                {"opponent": np.array([lost, not lost], dtype=np.float32)},
                f"{rollout.prompts[place].id} ({i + 1})",
            )
        )
    return rows


def judged_answers(rollout: Rollout, settings: Rollouts, with_divergence: bool) -> list[Row]:
    """A row a sample: desirable where its reward is above the mean of its group, undesirable where it is below.

    What is at the mean is left out, and so are empty answers. `with_divergence`: the answer also stands where one to
    another prompt would. Those stand in for samples of the policy, which these are: their mean log-ratio is itself an
    estimate of the KL to the reference.
    """
    rows = []
    for place, rewards in enumerate(counted_rewards(rollout, settings, said=True)):
        counted = rewards[~np.isnan(rewards)]
        if not len(counted):
            continue
        above = rewards - counted.mean()
        # A mean is a rounded number. NaN is not close to 0 either.
        for i in np.flatnonzero(~np.isnan(rewards) & ~np.isclose(above, 0)).tolist():
            answer = as_ids(rollout.completions[place][i].token_ids)
            sides = (answer, answer[:0]) if above[i] > 0 else (answer[:0], answer)
            prompt = rollout.prompts[place]
            rows.append(
                Row(as_ids(prompt.ids), (*sides, *[answer] * with_divergence), {}, f"{prompt.id} ({i + 1})")
            )
    return rows
