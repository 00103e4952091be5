"""What a model does in the built-in world, as numbers between 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence

from slimepo.errors import InputError
from slimepo.playground.families import Task
from slimepo.playground.tasks import FAMILIES, check

_LONGEST_BLOCK = 12
_LOOP_EXTRA = 3


def measure(tasks: Sequence[Task], texts: Sequence[str], finished: Sequence[bool]) -> dict[str, float]:
    """Score one answer a task; `texts` come without the end token, `finished` says whether it was reached.

    exact_match: right and finished. format_valid: in the asked form and finished. end_rate: finished.
    repetition: answers that loop (see `loops`). exact_match/FAMILY: exact match of one family, where it occurs.
    All are shares of the tasks.
    """
    if not len(tasks) == len(texts) == len(finished) or not tasks:
        raise InputError(
            f"measure: {len(tasks)} tasks, {len(texts)} answers, {len(finished)} flags: give one of each, and some"
        )
    verdicts = [check(task, text) for task, text in zip(tasks, texts, strict=True)]
    right = [verdict.correct and ended for verdict, ended in zip(verdicts, finished, strict=True)]
    valid = [verdict.valid and ended for verdict, ended in zip(verdicts, finished, strict=True)]
    looping = [loops(text, task.gold) for task, text in zip(tasks, texts, strict=True)]
    scores = {
        "exact_match": _share(right),
        "format_valid": _share(valid),
        "end_rate": _share([bool(ended) for ended in finished]),
        "repetition": _share(looping),
    }
    for family in FAMILIES:
        of_family = [hit for task, hit in zip(tasks, right, strict=True) if task.family == family]
        if of_family:
            scores[f"exact_match/{family}"] = _share(of_family)
    return scores


def loops(answer: str, gold: str) -> bool:
    """Whether a block of 1 to 12 characters stands in a row three times more often than the gold answer has one.

    Measured against gold, because a right answer may repeat ("ko-ko-ko", "1111").
    """
    return longest_run(answer) >= longest_run(gold) + _LOOP_EXTRA


def longest_run(text: str) -> int:
    """The most copies in a row of one block of 1 to 12 characters: "xababab" has 3, an empty text 0."""
    best = min(1, len(text))
    for size in range(1, min(_LONGEST_BLOCK, len(text) // 2) + 1):
        matching = 0
        for at in range(size, len(text)):
            # `matching` characters in a row equal those one block earlier: so many further copies.
            matching = matching + 1 if text[at] == text[at - size] else 0
            best = max(best, 1 + matching // size)
    return best


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
