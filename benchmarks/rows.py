"""The pairs that a benchmark trains on: real ones where the shared data is there, else made up like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slimepo.data.chat import chat_format, load_tokenizer
from slimepo.data.read import read_rows
from slimepo.data.rows import CHOSEN, REJECTED, Row
from slimepo.data.tokenize import tokenize

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Lengths of the UltraFeedback rows below 768 tokens, at the 5th, 15th ... 95th percentile of each part.
QUANTILES = {
    "prompt": (17, 21, 26, 35, 53, 80, 112, 153, 244, 417),
    "chosen": (12, 29, 51, 95, 154, 211, 294, 382, 464, 589),
    "rejected": (15, 33, 58, 92, 131, 188, 257, 319, 414, 517),
}


class Lengths(NamedTuple):
    """Tokens of each part of a pair, the same for all pairs of a growth curve."""

    prompt: int
    chosen: int
    rejected: int


def benchmark_rows(count: int, max_length: int = 768, shared: Path = SHARED) -> tuple[list[Row], str]:
    """`count` pairs, and where they come from.

    Real UltraFeedback pairs in the Qwen3 tokenizer, taken evenly over their prompt lengths so that a few
    stand for all, in a shuffled order; where the data is not there, random ids with the same distribution of lengths.
    """
    source = shared / "preferences" / "ultrafeedback_train.jsonl.gz"
    if not source.is_file():
        return generated_rows(count), "generated, lengths of UltraFeedback"
    chat = chat_format(load_tokenizer(shared / "tokenizers" / "qwen3"))
    rows = tokenize(read_rows(source).preferences, chat, max_length=max_length).rows
    rows = sorted(rows, key=lambda row: len(row.prompt_ids))
    picked = [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(min(count, len(rows)))]
    order = np.random.default_rng(0).permutation(len(picked))
    return [picked[i] for i in order], "UltraFeedback, Qwen3 tokenizer"


def generated_rows(count: int, seed: int = 0) -> list[Row]:
    """Random ids; the lengths of each part follow `QUANTILES`, each part drawn by itself."""
    random = np.random.default_rng(seed)
    tables = [np.array(QUANTILES[part]) for part in ("prompt", "chosen", "rejected")]
    drawn = [Lengths(*(int(random.choice(table)) for table in tables)) for _ in range(count)]
    return [_row(random, lengths, index) for index, lengths in enumerate(drawn)]


def tiny_rows(count: int) -> tuple[list[Row], str]:
    """Short made-up pairs of different lengths, for a smoke run."""
    random = np.random.default_rng(0)
    return [_row(random, Lengths(4 + i, 3 + 2 * i, 9 - i), i) for i in range(count)], "made up"


def equal_rows(count: int, lengths: Lengths, seed: int = 0) -> list[Row]:
    """Random ids, every pair of the same lengths."""
    random = np.random.default_rng(seed)
    return [_row(random, lengths, index) for index in range(count)]


def cut_vocabulary(rows: Sequence[Row], vocabulary: int) -> list[Row]:
    """The same rows with their ids folded into `vocabulary`, 0 (padding) and 1 (end) left out."""

    def fold(ids: np.ndarray) -> np.ndarray:
        return (ids % (vocabulary - 2) + 2).astype(np.int32)

    return [
        replace(row, prompt_ids=fold(row.prompt_ids), responses=tuple(map(fold, row.responses)))
        for row in rows
    ]


def mean_lengths(rows: Sequence[Row]) -> Lengths:
    """Mean tokens of each part, rounded."""
    parts = [
        [len(row.prompt_ids) for row in rows],
        [len(row.response(CHOSEN)) for row in rows],
        [len(row.response(REJECTED)) for row in rows],
    ]
    return Lengths(*(round(float(np.mean(part))) for part in parts))


def _row(random: np.random.Generator, lengths: Lengths, index: int) -> Row:
    prompt, chosen, rejected = (random.integers(0, 150_000, length).astype(np.int32) for length in lengths)
    return Row(prompt, (chosen, rejected), id=f"generated {index}")
