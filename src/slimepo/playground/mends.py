"""How an answer that breaks a constraint can be mended by code alone: one pure function for each kind where that works.

A mended answer says what the model said, in the form that was asked for. What would need new content (a longer answer,
a word that was to be used) has no mend. `repair` is for a recipe's pairs, as `pairs.NAME.repair`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slimepo.playground.constraints import KINDS, check, lines, words

# A sentence ends as `constraints.sentences` counts it.
_END = re.compile(r"[.!?]+(?=[\s\"'”’)\]]|$)")
_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+", re.MULTILINE)
_LONG_WORD = re.compile(r"(?<![\w*{#])[A-Za-z]{4,}(?![\w*}])")


def sentence_list(text: str) -> list[str]:
    """The sentences of a text, without the marks of its lists."""
    text = _MARK.sub("", text)
    found, start = [], 0
    for at in [*(match.end() for match in _END.finditer(text)), len(text)]:
        said = text[start:at]
        if words(said):
            found.append(" ".join(said.split()))
        start = at
    return found


def repair(row: Mapping[str, Any], answer: str) -> str:
    """The answer with the row's constraints mended, one after the other; as it was if that does not hold them all."""
    if check(row, answer).correct:
        return answer
    for order in itertools.permutations(row["constraints"]):
        text = answer
        for constraint in order:
            options = {name: value for name, value in constraint.items() if name != "kind"}
            mend = MENDS.get(constraint["kind"])
            if mend is not None and not KINDS[constraint["kind"]].holds(text, **options):
                text = mend(text, str(row.get("topic") or ""), **options)
        if check(row, text).correct:
            return text
    return answer


def _cut(text: str, count: int) -> str:
    """The first sentences that have `count` words at most, or so many words and a full stop."""
    kept: list[str] = []
    for sentence in sentence_list(text):
        if len(words(" ".join([*kept, sentence]))) > count:
            break
        kept.append(sentence)
    return " ".join(kept) if kept else f"{' '.join(text.split()[:count]).rstrip('.,;:!?')}."


def _in_groups(text: str, count: int) -> list[str]:
    """The sentences in `count` groups, as even as they divide; fewer where there are fewer."""
    found = sentence_list(text)
    size, rest = divmod(len(found), count)
    ends = [place * size + min(place, rest) for place in range(count + 1)]
    groups = (" ".join(found[start:end]) for start, end in itertools.pairwise(ends))
    return [group for group in groups if group]


def _first(text: str, count: int) -> list[str]:
    return sentence_list(text)[:count]


def _change_long_words(text: str, count: int, change: Callable[[str], str]) -> str:
    return _LONG_WORD.sub(lambda match: change(match[0]), text, count=count)


def _louder(text: str, count: int) -> str:
    missing = count - text.count("!")
    louder = re.sub(r"\.(?=\s|$)", "!", text, count=missing)
    return louder + "!" * (count - louder.count("!"))


def _without(text: str, wanted: Sequence[str]) -> str:
    banned = "|".join(map(re.escape, wanted))
    return re.sub(rf"\b(?:{banned})\b[ ]?", "", text, flags=re.IGNORECASE)


def _tagged(text: str, count: int) -> str:
    longest = sorted(dict.fromkeys(_LONG_WORD.findall(text)), key=len, reverse=True)
    return f"{text} {' '.join(f'#{word}' for word in longest[:count])}"


def _json(text: str, keys: Sequence[str]) -> str:
    return json.dumps(dict(zip(keys, sentence_list(text), strict=False)), ensure_ascii=False)


def _named(text: str, options: Sequence[str]) -> str:
    """The option that the answer names first."""
    places = {
        each: found.start() for each in options if (found := re.search(rf"\b{each}\b", text, re.IGNORECASE))
    }
    return min(places, key=lambda each: places[each]) if places else text


# (answer, topic, options of the kind) -> the answer that holds it, if one can be made of this one.
# fmt: off
MENDS: dict[str, Callable[..., str]] = {
    "words_at_most": lambda text, topic, count: _cut(text, count),
    "words_between": lambda text, topic, low, high: _cut(text, high),
    "sentences_exactly": lambda text, topic, count: " ".join(_first(text, count)),
    "one_sentence": lambda text, topic: " ".join(_first(text, 1)),
    "sentences_at_most": lambda text, topic, count: " ".join(_first(text, count)),
    "paragraphs_exactly": lambda text, topic, count: "\n\n".join(_in_groups(text, count)),
    "bullets_exactly": lambda text, topic, count: "\n".join(f"- {each}" for each in _first(text, count)),
    "numbered_exactly": lambda text, topic, count: "\n".join(
        f"{at}. {each}" for at, each in enumerate(_first(text, count), 1)),
    "lines_exactly": lambda text, topic, count: "\n".join(_in_groups(text, count)),
    "parts": lambda text, topic, label, count: "\n".join(
        f"{label} {at}: {each}" for at, each in enumerate(_in_groups(text, count), 1)),
    "lower_case": lambda text, topic: text.lower(),
    "upper_case": lambda text, topic: text.upper(),
    "shouted_words": lambda text, topic, count: _change_long_words(text, count, str.upper),
    "no_commas": lambda text, topic: text.replace(",", ""),
    "exclamations": lambda text, topic, count: _louder(text, count),
    "no_digits": lambda text, topic: re.sub(r"\d+[.)]?[ ]?", "", text),
    "bold_words": lambda text, topic, count: _change_long_words(text, count, lambda word: f"**{word}**"),
    "hashtags": lambda text, topic, count: _tagged(text, count),
    "blanks": lambda text, topic, count: _change_long_words(text, count, lambda word: f"{{{word.lower()}}}"),
    "without_words": lambda text, topic, wanted: _without(text, wanted),
    "opening": lambda text, topic, phrase: f"{phrase}: {text}",
    "closing": lambda text, topic, phrase: f"{text.rstrip()}\n\n{phrase}",
    "quoted": lambda text, topic: '"' + text.strip().replace('"', "'") + '"',
    "bracketed": lambda text, topic: f"[{text.strip()}]",
    "question_last": lambda text, topic: f"{text.rstrip()} What do you think?",
    "headline": lambda text, topic: f"# {topic.capitalize()}\n\n{text.lstrip()}",
    "last_line": lambda text, topic, label: "\n".join(
        [*lines(text), *(f"{label}: {each}" for each in _first(text, 1))]),
    "json_object": lambda text, topic, keys: _json(text, keys),
    "one_option": lambda text, topic, options: _named(text, options),
    "request_first": lambda text, topic, request: f"{request}\n\n{text}",
}
# fmt: on
