"""Splitting rows by what they are: the same prompt is always in the same part, whatever the row order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

from slimepo.errors import InputError
from slimepo.files import Kept
from slimepo.types import Message, Preference, Unpaired

Record = Preference | Unpaired
R = TypeVar("R", Preference, Unpaired)

# Section 5.1 of the SLIME paper trains on 33 % and 66 %; what is over is held out for evaluation.
PAPER_SPLIT: Mapping[str, float] = MappingProxyType({"sft": 0.33, "preference": 0.66, "heldout": 0.01})

_TOLERANCE = 1e-9


def split(
    rows: Iterable[R], fractions: Mapping[str, float] = PAPER_SPLIT, seed: int = 0
) -> dict[str, Kept[R]]:
    """Share out `rows` over the named parts, in expectation by `fractions` of the prompts.

    A row's part depends on its prompt and the seed alone: neither the order nor other rows matter, and equal
    prompts stay together, also those that differ in white space alone. Fractions must be 0 or more and sum to at
    most 1 (InputError); what they leave over is in no part. Each part keeps the order of the rows.
    """
    check_fractions(fractions)
    parts: dict[str, Kept[R]] = {name: Kept() for name in fractions}
    for row in rows:
        name = part_of(row.prompt, fractions, seed)
        if name is not None:
            parts[name].append(row)
    return parts


def check_fractions(fractions: Mapping[str, float]) -> None:
    """InputError unless every fraction is 0 or more and all sum to at most 1."""
    for name, fraction in fractions.items():
        if not 0 <= fraction <= 1 + _TOLERANCE:  # NaN fails this too.
            raise InputError(f"the split's fraction for '{name}' is {fraction}; it must be between 0 and 1")
    total = sum(fractions.values())
    if total > 1 + _TOLERANCE:
        raise InputError(f"the split's fractions sum to {total:g}; they must sum to at most 1")


def part_of(prompt: list[Message], fractions: Mapping[str, float], seed: int) -> str | None:
    """The part that a prompt belongs to, or None where the fractions leave it over."""
    point = _point(prompt, seed)
    edge = 0.0
    for name, fraction in fractions.items():
        edge += fraction
        # A sum such as 0.33 + 0.66 + 0.01 may end a rounding error below 1.
        if point < (1.0 if edge >= 1 - _TOLERANCE else edge):
            return name
    return None


def message_hash(messages: list[Message]) -> str:
    """A stable name for a prompt or an answer, 32 hexadecimal digits."""
    return _digest(_canonical(messages))


def row_hash(row: Record) -> str:
    """A stable name for a row's contents, its source aside; 32 hexadecimal digits."""
    content = (
        [row.prompt, row.chosen, row.rejected]
        if isinstance(row, Preference)
        else [row.prompt, row.response, row.label]
    )
    more = [row.weight] if row.weight != 1 else []
    options = [dict(row.template_options)] if row.template_options else []
    return _digest(_canonical([*content, *more, *options]))


def fingerprint(rows: Iterable[Record]) -> str:
    """A stable name for a collection of rows, whatever their order; 32 hexadecimal digits."""
    return _digest("\n".join(sorted(row_hash(row) for row in rows)).encode())


def order(rows: Iterable[Record]) -> str:
    """A name for the order that a collection of rows stands in; 32 hexadecimal digits."""
    return _digest("\n".join(map(row_hash, rows)).encode())


def _point(prompt: list[Message], seed: int) -> float:
    """A number in [0, 1), uniform over prompts."""
    said = [{"role": turn["role"], "content": " ".join(turn["content"].split())} for turn in prompt]
    digest = hashlib.blake2b(_canonical([seed, said]), digest_size=8).digest()
    # 53 bits are what a float holds exactly, so that the number stays below 1.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
