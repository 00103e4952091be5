"""Preference pairs the way practitioners make them: from the model's own samples, judged by a checker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slimepo.errors import InputError
from slimepo.playground.families import Task
from slimepo.playground.tasks import check
from slimepo.playground.world import assistant_turn, user_turn
from slimepo.types import Preference


@dataclass(frozen=True)
class PairStats:
    """Where the pairs came from, as counts of tasks; the properties are shares of the pairs."""

    tasks: int
    pairs: int
    gold_chosen: int
    invalid_rejected: int
    dropped_all_right: int
    dropped_no_sample: int

    @property
    def gold_share(self) -> float:
        """Share of pairs whose chosen answer is the gold one because no sample was right."""
        return self.gold_chosen / max(1, self.pairs)

    @property
    def invalid_share(self) -> float:
        """Share of pairs whose rejected answer has a wrong form."""
        return self.invalid_rejected / max(1, self.pairs)


def pairs_from_samples(
    tasks: Sequence[Task], samples: Sequence[Sequence[str]]
) -> tuple[list[Preference], PairStats]:
    """One pair a task that has both a right answer and a wrong sample to set against it.

    samples: for each task the texts that the model gave, without the end token; leave out the unfinished ones.
    Chosen: the most frequent right sample, or the gold answer where none is right.
    Rejected: among the wrong samples those of valid form, or all where none is valid (a fluent mistake teaches
    more than a broken one); of these the most frequent. The earlier sample wins a tie, and empty samples are no
    answers. A task whose samples are all right, or that has none, gives no pair and is counted.
    """
    if len(tasks) != len(samples):
        raise InputError(f"{len(tasks)} tasks but samples of {len(samples)}: give one list of samples a task")
    pairs: list[Preference] = []
    gold_chosen = invalid_rejected = all_right = no_sample = 0
    for task, texts in zip(tasks, samples, strict=True):
        answers = [text for text in texts if text]
        verdicts = {text: check(task, text) for text in answers}
        right = [text for text in answers if verdicts[text].correct]
        wrong = [text for text in answers if not verdicts[text].correct]
        if not wrong:
            all_right, no_sample = all_right + bool(right), no_sample + (not right)
            continue
        rejected = _most_frequent([text for text in wrong if verdicts[text].valid] or wrong)
        chosen = _most_frequent(right) if right else task.gold
        gold_chosen += not right
        invalid_rejected += not verdicts[rejected].valid
        pairs.append(
            Preference(
                user_turn(task),
                assistant_turn(chosen),
                assistant_turn(rejected),
                source=pair_source(task),
            )
        )
    return pairs, PairStats(len(tasks), len(pairs), gold_chosen, invalid_rejected, all_right, no_sample)


def pair_source(task: Task) -> str:
    """What a task's pair is called; tasks that differ in wording alone share it."""
    return f"playground:{task.key}:pair"


def _most_frequent(texts: Sequence[str]) -> str:
    # Counter keeps the order of first appearance among equals.
    return Counter(texts).most_common(1)[0][0]
