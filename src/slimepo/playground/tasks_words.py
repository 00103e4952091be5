"""The families whose answers are made of letters: words, JSON, and counting in words."""

from __future__ import annotations

import json
from random import Random

from slimepo.playground.families import Family, Problem, Task, matches, one_lost, transposed, wordy
from slimepo.playground.lexicon import FIELDS, WORDS

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"
_is_word = matches(r"[a-z]+")
_is_upper = matches(r"[A-Z]+")
_is_count = matches(r"0|[1-9][0-9]*")
JSON_KEYS = tuple(FIELDS)
SEPARATORS = ("-", "/", "+", "*")
_BY_LENGTH = {
    length: [word for word in WORDS if len(word) == length]
    for length in sorted({len(word) for word in WORDS})
}


def made_up_word(rng: Random, length: int) -> str:
    """A pronounceable word: consonants and vowels in turn, with a doubled step now and then."""
    kinds = [_CONSONANTS, _VOWELS]
    turn = rng.randrange(2)
    letters = []
    for _ in range(length):
        letters.append(rng.choice(kinds[turn]))
        turn = turn if rng.random() < 0.1 else 1 - turn
    return "".join(letters)


def _malformed_word(task: Task, rng: Random) -> list[str]:
    return [*wordy(task.gold), task.gold.upper(), "-".join(task.gold), f'"{task.gold}"']


def _draw_reverse(rng: Random) -> Problem:
    word = made_up_word(rng, rng.randint(4, 6))
    return Problem({"word": word}, word[::-1], words=(word,))


def _slips_reverse(task: Task, rng: Random) -> list[str]:
    gold = task.gold
    # The last one is a wrong answer also for a word such as "aaaab", where the others may miss.
    turned = gold[1:] + gold[0] if gold[0] != gold[-1] else gold[:-1]
    return [transposed(gold, rng), one_lost(gold, rng), task.words[0], turned]


def _draw_upper(rng: Random) -> Problem:
    word = made_up_word(rng, rng.randint(4, 7))
    return Problem({"word": word}, word.upper(), words=(word,))


def _slips_upper(task: Task, rng: Random) -> list[str]:
    last_again = task.gold + task.gold[-1]
    return [transposed(task.gold, rng), one_lost(task.gold, rng), last_again]


def _malformed_upper(task: Task, rng: Random) -> list[str]:
    gold = task.gold
    return [*wordy(gold), gold.lower(), gold[0] + gold[1:].lower(), "-".join(gold)]


def _draw_count(rng: Random) -> Problem:
    letter = rng.choice(_VOWELS + "lrst")
    letters = list(made_up_word(rng, rng.randint(4, 8)))
    for at in rng.sample(range(len(letters)), rng.randint(0, 4)):
        letters[at] = letter
    word = "".join(letters)
    return Problem({"letter": letter, "word": word}, str(word.count(letter)), words=(letter, word))


def _slips_count(task: Task, rng: Random) -> list[str]:
    gold = int(task.gold)
    return [str(n) for n in (gold - 1, gold + 1) if n >= 0]


def _malformed_count(task: Task, rng: Random) -> list[str]:
    letter = task.words[0]
    return [*wordy(task.gold), f"{task.gold} times", f"{task.gold} {letter}"]


def _draw_longest(rng: Random) -> Problem:
    lengths = rng.sample(sorted(_BY_LENGTH), 3)
    words = tuple(rng.choice(_BY_LENGTH[length]) for length in lengths)
    return Problem({"words": " ".join(words)}, max(words, key=len), words=words)


def _slips_longest(task: Task, rng: Random) -> list[str]:
    others = sorted(task.words, key=len)[:-1]
    return [others[-1], rng.choice(others)]


def _draw_json(rng: Random) -> Problem:
    values = {key: rng.choice(FIELDS[key]) for key in rng.sample(JSON_KEYS, 2)}
    asked = rng.choice(list(values))
    record = ", ".join(f"{key} {value}" for key, value in values.items())
    facts = tuple(text for pair in values.items() for text in pair)
    return Problem(
        {"key": asked, "record": record}, json.dumps({asked: values[asked]}), words=(asked, *facts)
    )


def _is_json(task: Task, answer: str) -> bool:
    try:
        # Objects as tuples of pairs, so that a key given twice shows.
        record = json.loads(answer, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return False
    if not (isinstance(record, tuple) and len(record) == 1):
        return False
    key, value = record[0]
    return key == task.words[0] and isinstance(value, str)


def _right_json(task: Task, answer: str) -> bool:
    """By value: spaces and escapes do not count."""
    return bool(json.loads(answer) == json.loads(task.gold))


def _slips_json(task: Task, rng: Random) -> list[str]:
    asked = task.words[0]
    right = json.loads(task.gold)[asked]
    values = task.words[2::2]
    return [json.dumps({asked: value}) for value in (*values, one_lost(right, rng))]


def _malformed_json(task: Task, rng: Random) -> list[str]:
    gold = task.gold
    return [*wordy(gold), gold[:-1], gold[1:-1], gold.replace('"', ""), json.loads(gold)[task.words[0]]]


def _draw_repeat(rng: Random) -> Problem:
    word, times, separator = made_up_word(rng, rng.randint(2, 3)), rng.randint(2, 4), rng.choice(SEPARATORS)
    return Problem(
        {"word": word, "times": str(times), "separator": separator},
        separator.join([word] * times),
        numbers=(times,),
        words=(word, separator),
    )


def _is_repeat(task: Task, answer: str) -> bool:
    parts = answer.split(task.words[1])
    return len(parts) >= 2 and all(_is_word(task, part) for part in parts)


def _slips_repeat(task: Task, rng: Random) -> list[str]:
    (times,), (word, separator) = task.numbers, task.words
    misspelt = separator.join([word] * (times - 1) + [transposed(word, rng)])
    return [separator.join([word] * n) for n in (times - 1, times + 1)] + [misspelt]


def _malformed_repeat(task: Task, rng: Random) -> list[str]:
    (times,), (word, separator) = task.numbers, task.words
    other = rng.choice([mark for mark in (*SEPARATORS, " ") if mark != separator])
    return [*wordy(task.gold), other.join([word] * times), word * times, task.gold + separator]


# name, templates; draw, valid, slips, malformed, and right where a text is not compared
# fmt: off
WORD_FAMILIES: tuple[Family, ...] = (
    Family("reverse", ("Reverse {word}.", "Reverse the word {word}.", "Write {word} in reverse."),
           _draw_reverse, _is_word, _slips_reverse, _malformed_word),
    Family("upper", ("Write {word} in capitals.", "Give {word} in capitals."),
           _draw_upper, _is_upper, _slips_upper, _malformed_upper),
    Family("count", ("Count the letter {letter} in {word}.",
                     "Give the number of times {letter} is in {word}."),
           _draw_count, _is_count, _slips_count, _malformed_count),
    Family("longest", ("What is the longest of {words}?", "Give the longest word in {words}."),
           _draw_longest, _is_word, _slips_longest, _malformed_word),
    Family("json", ("Give the {key} in JSON: {record}.", "Write the {key} as JSON: {record}."),
           _draw_json, _is_json, _slips_json, _malformed_json, _right_json),
    Family("repeat", ("Repeat {word} {times} times with {separator}.",
                      "Write {word} {times} times with {separator} between."),
           _draw_repeat, _is_repeat, _slips_repeat, _malformed_repeat),
)
# fmt: on
