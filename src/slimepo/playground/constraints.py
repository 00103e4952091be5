"""Constraints on an answer that plain code verifies: a table of kinds, each with one pure function.

They are for training. How they are asked for, and about what, is in `instructions`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from slimepo.types import Message, Verdict

Options = dict[str, Any]

# An answer that says less, or says it over and over, is none, whatever constraints it meets.
FEWEST_WORDS = 5
MOST_REPEATED = 1 / 3

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_BULLET = re.compile(r"[-*•] +\S")
_NUMBERED = re.compile(r"(\d+)[.)] +\S")
# What an answer has to use, and must not, whatever it is about.
_ADDED = ("quiet", "morning", "slowly", "together", "careful", "simple", "warm", "often", "friend", "small")
_BANNED = ("very", "good", "great", "many", "important", "also", "people", "because", "really", "beautiful")
_OPENINGS = ("Listen", "Imagine this", "In short", "Here we go", "First of all", "Good news")
_CLOSINGS = (
    "That was it.",
    "Try it today!",
    "See you soon.",
    "What do you think?",
    "The end.",
    "Now it is your turn.",
)
_LABELS = ("Tip", "Remember", "Warning", "Fun fact", "Summary")
_OPTIONS = [each.split() for each in ("red green blue", "spring autumn", "early late", "tea milk water")]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def lines(text: str) -> list[str]:
    """The lines that are not blank, without white space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def sentences(text: str) -> int:
    """How many stretches of words end in a full stop, a question or an exclamation mark, or at the end of the text.

    A dot counts where white space, a quotation mark or a bracket follows; an abbreviation ends a sentence too.
    """
    return sum(bool(words(part)) for part in re.split(r"[.!?]+(?=[\s\"'”’)\]]|$)", text))


def paragraphs(text: str) -> int:
    """How many blocks of text there are between blank lines."""
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))


def numbered(answer: str, count: int) -> bool:
    """Whether the numbered lines are 1 to `count`, in order."""
    found = [int(match[1]) for line in lines(answer) if (match := _NUMBERED.match(line))]
    return found == list(range(1, count + 1))


def has_words(answer: str, wanted: Sequence[str]) -> bool:
    """Whether every word, or phrase, stands in the answer."""
    text = f" {' '.join(words(answer))} "
    return all(f" {' '.join(words(each))} " in text for each in wanted)


def has_keys(answer: str, keys: Sequence[str]) -> bool:
    """Whether the answer is a JSON object with these keys and no others, bare or in a code block."""
    bare = re.sub(r"^```\w*\n(.*?)\n?```$", r"\1", answer.strip(), flags=re.DOTALL)
    try:
        value = json.loads(bare)
    except ValueError:
        return False
    return isinstance(value, dict) and set(value) == set(keys)


def has_parts(answer: str, label: str, count: int) -> bool:
    """Whether lines that begin with "LABEL 1", "LABEL 2" and so on open so many parts, in order."""
    found = re.findall(rf"^\W*{re.escape(label)} (\d+)\b", answer, re.MULTILINE | re.IGNORECASE)
    return [int(number) for number in found] == list(range(1, count + 1))


def two_versions(answer: str) -> bool:
    """Whether there are two different texts with a line of dashes between them."""
    parts = [_phrase(part) for part in re.split(r"(?m)^\s*-{3,}\s*$", answer) if part.strip()]
    return len(parts) == 2 and parts[0] != parts[1]


def enclosed(answer: str, left: str, right: str) -> bool:
    """Whether the answer stands between two marks."""
    text = answer.strip()
    return len(text) > 1 and text.startswith(left) and text.endswith(right)


def last_line(answer: str, label: str) -> bool:
    """Whether the last of several lines begins with the label and a colon."""
    found = lines(answer)
    return len(found) > 1 and found[-1].lower().startswith(f"{label.lower()}:")


def _phrase(text: str) -> str:
    return " ".join(text.split()).lower()


@dataclass(frozen=True)
class Kind:
    """One kind of constraint: its options, drawn for a request, and whether an answer holds it, given these.

    Two of one `group` are never asked together; `alone` is asked with no other. `about`: the answer has to be on the
    topic of its prompt.
    """

    name: str
    group: str
    draw: Callable[[Random, str], Options]
    holds: Callable[..., bool]
    alone: bool = False
    about: bool = True


def _nothing(rng: Random, request: str) -> Options:
    return {}


def _count(low: int, high: int, step: int = 1) -> Callable[[Random, str], Options]:
    return lambda rng, _: {"count": rng.randrange(low, high + 1, step)}


def _some(pool: Sequence[str], least: int, most: int) -> Callable[[Random, str], Options]:
    return lambda rng, _: {"wanted": rng.sample(list(pool), rng.randint(least, most))}


def _one(name: str, pool: Sequence[Any]) -> Callable[[Random, str], Options]:
    return lambda rng, _: {name: rng.choice(list(pool))}


def _range(rng: Random, request: str) -> Options:
    low = rng.randrange(15, 50, 5)
    return {"low": low, "high": low + rng.choice((15, 20, 25))}


def _keys(rng: Random, request: str) -> Options:
    return {"keys": rng.sample(["topic", "reason", "place", "season", "cost", "advice"], rng.randint(2, 3))}


_KINDS = (
    Kind("words_at_most", "length", _count(20, 70, 5), lambda answer, count: len(words(answer)) <= count),
    Kind("words_at_least", "length", _count(30, 70, 5), lambda answer, count: len(words(answer)) >= count),
    Kind("words_between", "length", _range, lambda answer, low, high: low <= len(words(answer)) <= high),
    Kind("sentences_exactly", "shape", _count(2, 4), lambda answer, count: sentences(answer) == count),
    Kind("one_sentence", "shape", _nothing, lambda answer: sentences(answer) == 1),
    Kind("sentences_at_most", "shape", _count(2, 4), lambda answer, count: sentences(answer) <= count),
    Kind("paragraphs_exactly", "shape", _count(2, 3), lambda answer, count: paragraphs(answer) == count),
    Kind(
        "bullets_exactly",
        "shape",
        _count(2, 5),
        lambda answer, count: sum(bool(_BULLET.match(line)) for line in lines(answer)) == count,
    ),
    Kind("numbered_exactly", "shape", _count(2, 5), numbered),
    Kind("lines_exactly", "shape", _count(2, 5), lambda answer, count: len(lines(answer)) == count),
    Kind(
        "parts",
        "shape",
        lambda rng, _: {"label": rng.choice(["Step", "Scene", "Day", "Round"]), "count": rng.randint(2, 3)},
        has_parts,
    ),
    Kind("lower_case", "case", _nothing, lambda answer: answer == answer.lower()),
    Kind("upper_case", "case", _nothing, lambda answer: answer == answer.upper()),
    Kind(
        "shouted_words",
        "case",
        _count(2, 3),
        lambda answer, count: sum(len(w) > 1 and w.isupper() for w in _WORD.findall(answer)) >= count,
    ),
    Kind("no_commas", "marks", _nothing, lambda answer: "," not in answer),
    Kind("exclamations", "marks", _count(2, 4), lambda answer, count: answer.count("!") >= count),
    Kind("no_digits", "marks", _nothing, lambda answer: not re.search(r"\d", answer)),
    Kind(
        "some_digits",
        "marks",
        _count(2, 3),
        lambda answer, count: len(re.findall(r"\d+(?:[.,]\d+)*", answer)) >= count,
    ),
    Kind(
        "no_letter",
        "marks",
        _one("letter", "bfgjkpqvwxyz"),
        lambda answer, letter: letter not in answer.lower(),
    ),
    Kind(
        "bold_words",
        "marks",
        _count(2, 3),
        lambda answer, count: len(re.findall(r"\*\*[^*\n]+\*\*", answer)) >= count,
    ),
    Kind(
        "hashtags",
        "marks",
        _count(2, 4),
        lambda answer, count: len(re.findall(r"#[A-Za-z]\w*", answer)) >= count,
    ),
    Kind(
        "blanks",
        "marks",
        _count(2, 3),
        lambda answer, count: len(re.findall(r"\{[^{}\n]+\}", answer)) >= count,
    ),
    Kind("with_words", "words", _some(_ADDED, 1, 2), has_words),
    Kind(
        "without_words",
        "words",
        _some(_BANNED, 1, 3),
        lambda answer, wanted: not any(has_words(answer, [each]) for each in wanted),
    ),
    Kind(
        "word_times",
        "words",
        lambda rng, _: {"word": rng.choice(_ADDED), "count": rng.randint(2, 3)},
        lambda answer, word, count: words(answer).count(word) >= count,
    ),
    Kind(
        "opening",
        "edges",
        _one("phrase", _OPENINGS),
        lambda answer, phrase: _phrase(answer).startswith(_phrase(phrase)),
    ),
    Kind(
        "closing",
        "edges",
        _one("phrase", _CLOSINGS),
        lambda answer, phrase: _phrase(answer).endswith(_phrase(phrase)),
    ),
    Kind("quoted", "edges", _nothing, lambda answer: enclosed(answer, '"', '"')),
    Kind("bracketed", "edges", _nothing, lambda answer: enclosed(answer, "[", "]")),
    Kind("question_last", "edges", _nothing, lambda answer: answer.strip().endswith("?")),
    Kind("headline", "edges", _nothing, lambda answer: bool(re.match(r"\s*# +\S", answer))),
    Kind("last_line", "edges", _one("label", _LABELS), last_line),
    Kind("two_versions", "form", _nothing, two_versions, alone=True),
    Kind("json_object", "form", _keys, has_keys, alone=True),
    Kind(
        "one_option",
        "form",
        _one("options", _OPTIONS),
        lambda answer, options: words(answer) in [[each] for each in options],
        alone=True,
        about=False,
    ),
    Kind(
        "request_first",
        "form",
        lambda _, request: {"request": request},
        lambda answer, request: _phrase(answer).startswith(_phrase(request)) and len(lines(answer)) > 1,
        alone=True,
    ),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
GROUPS = tuple(dict.fromkeys(kind.group for kind in _KINDS))


def holds(constraint: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer holds a constraint, which is the name of its `kind` with that kind's options."""
    options = {name: value for name, value in constraint.items() if name != "kind"}
    return KINDS[constraint["kind"]].holds(answer, **options)


def speaks(row: Mapping[str, Any], answer: str) -> bool:
    """Whether it is an answer at all: about the row's `topic` where it has one, of a few words, and no loop."""
    said, topic = words(answer), row.get("topic")
    if not topic:
        return bool(said)
    grams = Counter(zip(said, said[1:], said[2:], strict=False))
    repeated = 1 - len(grams) / max(1, grams.total())
    named = any(each.removesuffix("s") in answer.lower() for each in words(topic))
    return named and len(said) >= FEWEST_WORDS and repeated <= MOST_REPEATED


def check(row: Mapping[str, Any], answer: str) -> Verdict:
    """The checker of a recipe's `tasks`: valid is an answer that `speaks`, correct if it holds all constraints too."""
    spoken = speaks(row, answer)
    return Verdict(spoken and all(holds(each, answer) for each in row["constraints"]), spoken)


def share_held(prompt: list[Message], completions: Sequence[str], row: Mapping[str, Any]) -> list[float]:
    """A graded reward: the share of a row's constraints that each answer holds, 0 where it does not speak."""
    asked = row["constraints"]
    return [
        sum(holds(each, text) for each in asked) / len(asked) if speaks(row, text) else 0.0
        for text in completions
    ]
