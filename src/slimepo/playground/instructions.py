"""Requests with verifiable constraints, for training a small real model: each set of them a function of a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from slimepo.errors import InputError
from slimepo.files import write_json_lines
from slimepo.playground.constraints import KINDS, Kind, words
from slimepo.settings import Settings, read_mapping, validate

# Short requests, topics and wordings, all of them our own: the more a model is to learn from, the more go in here.
TEXTS = Path(__file__).with_name("instructions.yaml")
# The share of topics that only held-out prompts are about.
HELDOUT_TOPICS = 0.2
# Of the kinds that can be asked together with another one, the share of prompts that do.
TWO = 1 / 3
_MOST_REDRAWS = 1_000
_TOGETHER = [kind for kind in KINDS.values() if not kind.alone]

# What cannot both be done, beside two of one group.
_CLASHES = {
    frozenset(pair)
    for pair in (
        ("no_digits", "numbered_exactly"), ("no_digits", "parts"),
        ("quoted", "bullets_exactly"), ("quoted", "numbered_exactly"),
        ("bracketed", "bullets_exactly"), ("bracketed", "numbered_exactly"),
        *(("one_sentence", edge) for edge in ("closing", "last_line", "headline")),
        *(("sentences_exactly", edge) for edge in ("closing", "last_line", "headline")),
        ("one_sentence", "words_at_least"), ("hashtags", "closing"), ("hashtags", "question_last"),
    )
}  # fmt: skip


class Texts(Settings):
    """What instructions.yaml holds; `choices` are the requests that go with a list of what may be answered."""

    requests: list[str]
    choices: list[str]
    topics: list[str]
    wordings: dict[str, list[str]]


def write_instructions(folder: Path, *, train: int, heldout: int, seed: int) -> tuple[Path, Path]:
    """Write train.jsonl and heldout.jsonl, ordinary files of tasks; no topic is in both, and the seed alone decides.

    A prompt has one constraint, or two (`TWO`) unless it is of a kind that stands alone; the first constraint goes
    through all kinds in turn. A row has `id`, `family` (the group of its first constraint), `prompt`, `constraints`,
    and the `topic` that an answer has to be about, where it has to. `slimepo.playground.constraints` has the checker
    (`check`) and a graded reward (`share_held`).

    Raises:
        InputError: so many different prompts cannot be made.
    """
    texts = validate(Texts, read_mapping(TEXTS, "instructions"), TEXTS.name)
    topics = list(texts.topics)
    Random(f"topics/{seed}").shuffle(topics)
    cut = round(HELDOUT_TOPICS * len(topics))
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    for file, count, pool in zip(files, (train, heldout), (topics[cut:], topics[:cut]), strict=True):
        write_json_lines(file, make_instructions(count, f"{file.stem}/{seed}", texts, pool))
    return files


def make_instructions(count: int, seed: str, texts: Texts, topics: Sequence[str]) -> list[dict[str, Any]]:
    """`count` rows about these topics in random order, no prompt twice.

    Raises:
        InputError: there are no more prompts to be made.
    """
    rng, kinds = Random(f"instructions/{seed}"), list(KINDS.values())
    rows: dict[str, dict[str, Any]] = {}
    for index in range(count):
        drawn = (draw(kinds[index % len(kinds)], texts, topics, rng) for _ in range(_MOST_REDRAWS))
        row = next((row for row in drawn if row["prompt"] not in rows), None)
        if row is None:
            raise InputError(f"there are no {count} different instructions: ask for fewer")
        rows[row["prompt"]] = row
    made = list(rows.values())
    rng.shuffle(made)
    return [{"id": f"{seed}/{number}", **row} for number, row in enumerate(made)]


def draw(kind: Kind, texts: Texts, topics: Sequence[str], rng: Random) -> dict[str, Any]:
    """A row without its id: a request about one of the topics, a constraint of this kind, and perhaps another one."""
    topic = rng.choice(topics)
    request = rng.choice(texts.requests if kind.about else texts.choices).format(topic=topic)
    constraints = [{"kind": kind.name, **kind.draw(rng, request)}]
    if not kind.alone and rng.random() < TWO:
        others = iter(lambda: rng.choice(_TOGETHER), None)
        drawn = ({"kind": other.name, **other.draw(rng, request)} for other in others)
        constraints.append(next(other for other in drawn if not clash(constraints[0], other)))
    if any(each.get("letter", "\n") in topic for each in constraints):
        return draw(kind, texts, topics, rng)
    asked = [rng.choice(texts.wordings[each["kind"]]).format(**_shown(each)) for each in constraints]
    # What is asked of the answer may come first.
    first = not kind.alone and rng.random() < 0.25
    prompt = " ".join([*asked, request] if first else [request, *asked])
    row = {"family": kind.group, "prompt": prompt, "constraints": constraints}
    return row | ({"topic": topic} if kind.about else {})


def _shown(constraint: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they stand in a prompt: of a list the words, each between quotes."""
    return {
        name: ", ".join(f"'{each}'" for each in value) if isinstance(value, list) else value
        for name, value in constraint.items()
    }


def clash(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether no answer can hold both constraints, or hardly one."""
    kinds = KINDS[one["kind"]], KINDS[other["kind"]]
    if kinds[0].group == kinds[1].group or frozenset((one["kind"], other["kind"])) in _CLASHES:
        return True
    for this, that in ((one, other), (other, one)):
        text = " ".join(str(value) for name, value in that.items() if name != "kind").lower()
        if this.get("letter", "\n") in text:
            return True
        if this["kind"] == "without_words" and set(this["wanted"]) & set(words(text)):
            return True
    return False
