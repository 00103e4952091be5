"""What two sets of prompts have in common: whole conversations, texts, and runs of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slimepo.types import Message

Prompt = Sequence[Message]

# What may end a prompt or not.
_LAST = " .?!:;,…。？！：；，\"'”’»"

SIZES = (5, 8, 13)


@dataclass(frozen=True)
class Overlap:
    """`same`: prompts that stand in the other set too, word for word. `shared`: by the length n of a run of words, how
    many prompts hold a run that stands in the other set, and how many different such runs there are. `longest`: the
    longest one.
    """

    prompts: int
    same: int
    shared: dict[int, tuple[int, int]]
    longest: str


def overlap(ours: Sequence[str], theirs: Sequence[str], sizes: Sequence[int] = SIZES) -> Overlap:
    """Compare two sets of prompts by their words: letter case, punctuation and line breaks do not count."""
    mine, others = [_words(text) for text in ours], [_words(text) for text in theirs]
    known = set(map(tuple, others))
    shared = {}
    for size in sizes:
        there = {run for each in others for run in _runs(each, size)}
        found = [_runs(each, size) & there for each in mine]
        shared[size] = (sum(map(bool, found)), len(set().union(*found)))
    longest: tuple[str, ...] = ()
    while runs := {run for each in mine for run in _runs(each, len(longest) + 1)} & {
        run for each in others for run in _runs(each, len(longest) + 1)
    }:
        longest = min(runs)
    return Overlap(len(mine), sum(tuple(each) in known for each in mine), shared, " ".join(longest))


def found_in(ours: Iterable[Prompt], theirs: Iterable[Prompt]) -> list[int]:
    """The places in `ours` of prompts that `theirs` has too.

    System messages, letter case, blanks and the punctuation at the end of a turn do not count.
    """
    mine = [_said(prompt) for prompt in ours]
    both = set(mine).intersection(map(_said, theirs))
    return [at for at, said in enumerate(mine) if said in both]


def _said(prompt: Prompt) -> tuple[str, ...]:
    said = []
    for turn in prompt:
        if turn["role"] != "system":
            text = " ".join(turn["content"].casefold().split())
            # What is nothing but punctuation stays.
            said.append(f"{turn['role']}: {text.rstrip(_LAST) or text} {turn.get('tool_calls', '')}")
    return tuple(said)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _runs(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}
