"""The tasks of the built-in world: families with answers that code can verify."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

from slimepo.playground.families import Family, Task
from slimepo.playground.tasks_numbers import NUMBER_FAMILIES
from slimepo.playground.tasks_words import JSON_KEYS, WORD_FAMILIES
from slimepo.playground.tours import TOURS
from slimepo.types import Verdict

_WORDED = (*NUMBER_FAMILIES, *WORD_FAMILIES)
# Those of a world that does not say which it has.
USUAL = tuple(family.name for family in _WORDED)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_WORDED, TOURS)}

_SLOT = re.compile(r"\{[a-z]+\}")
_WORD = re.compile(r" ?[A-Za-z]+")


# The tours' one word is spelt in letters, so that the tokenizer is that of all earlier worlds.
_TEXTS = [template for family in _WORDED for template in family.templates]
_TEXTS += ["The answer is", *JSON_KEYS, *(f" {key}" for key in JSON_KEYS)]
# Every fixed word of the prompts and answers, with the space in front of it where it has one. A slot becomes a digit,
# so that the words on its two sides stay apart.
TEMPLATE_WORDS = tuple(sorted({word for text in _TEXTS for word in _WORD.findall(_SLOT.sub("0", text))}))
_RESERVED = frozenset(word.strip() for word in TEMPLATE_WORDS)


def make_task(family: str, rng: Random) -> Task:
    """Draw one task of a family: the problem first, then its wording.

    No word of the problem is ever a word of the templates: a made-up word is always spelt in letters.
    """
    kind = FAMILIES[family]
    problem = kind.draw(rng)
    while _RESERVED.intersection(problem.words) - set(JSON_KEYS):
        problem = kind.draw(rng)
    prompt = rng.choice(kind.templates).format(**problem.slots)
    return Task(family, prompt, problem.gold, problem.numbers, problem.words)


def check(task: Task, answer: str) -> Verdict:
    """Judge an answer: correct implies valid."""
    family = FAMILIES[task.family]
    valid = family.valid(task, answer)
    return Verdict(valid and family.right(task, answer), valid)


def judge(row: Mapping[str, Any], answer: str) -> Verdict:
    """`check` for a row of a recipe's `tasks` file, its `checker`."""
    numbers, words = tuple(row["numbers"]), tuple(row["words"])
    return check(Task(row["family"], row["prompt"], row["answer"], numbers, words), answer)


def slip(task: Task, rng: Random) -> str:
    """A well-formed wrong answer of the kind that this family invites (a forgotten carry, one out of place)."""
    answers = FAMILIES[task.family].slips(task, rng)
    return rng.choice([answer for answer in answers if check(task, answer) == Verdict(False, True)])


def malformed(task: Task, rng: Random) -> str:
    """The right answer in a wrong form (in a sentence, with another separator, without its last brace)."""
    answers = FAMILIES[task.family].malformed(task, rng)
    return rng.choice([answer for answer in answers if not check(task, answer).valid])
