"""What can be said of a model without a judge: how it ranks held-out pairs, and how its generations look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimepo.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

_REPEATED = 4


def measure_basics(
    model: str,
    data: str,
    console: Console,
    *,
    format: str = "auto",
    columns: Mapping[str, str | None] | None = None,
    split: str | None = None,
    limit: int = 200,
    samples: int = 64,
    max_new_tokens: int = 256,
    max_length: int = 2048,
    batch_rows: int = 32,
) -> dict[str, Any]:
    """Measures of a model on held-out pairs; shares are 0 to 1, log-probabilities in nats per token.

    accuracy: share of pairs whose chosen answer has the higher mean log-probability per token. chosen_perplexity:
    exp of minus the mean of log-probabilities over the chosen answers' tokens, every token alike. Then those of
    `generation_measures`, of greedy answers to the first `samples` prompts.

    Raises:
        InputError: the model or the pairs cannot be read, or no pair fits `max_length`.
    """
    from slimepo.data.read import left_out_in_words, read_rows, row_notes
    from slimepo.data.rows import CHOSEN
    from slimepo.data.tokenize import in_words, tokenize
    from slimepo.evaluation.answerers import prompt_ids, weights_hash
    from slimepo.model.chat import load_chat_model
    from slimepo.model.generate import generate
    from slimepo.model.score import score_pairs

    read = read_rows(data, format=format, columns=columns, split=split, limit=limit)
    pairs = read.preferences
    if not pairs:
        raise InputError(f"{data}: no preference pairs in it")
    loaded = load_chat_model(model)
    measures: dict[str, Any] = {"model": model, "weights": weights_hash(model), "data": data}
    tokens = tokenize(pairs, loaded.chat, max_length=max_length)
    rows = tokens.rows
    if not rows:
        raise InputError(f"{data}: no pair is left to score: {'; '.join(in_words(tokens))}")
    for note in (*left_out_in_words(read.left_out), *row_notes(read), *loaded.chat.notes, *in_words(tokens)):
        console.print(f"note: {note}", highlight=False, markup=False)
    with console.status("scoring pairs"):
        scores = score_pairs(loaded.model, rows)
    counts = np.array([len(row.response(CHOSEN)) for row in rows])
    measures |= {
        "pairs": len(rows),
        "pairs_dropped": len(pairs) - len(rows),
        "accuracy": float((scores.chosen > scores.rejected).mean()),
        "logps_chosen": float(scores.chosen.mean()),
        "logps_rejected": float(scores.rejected.mean()),
        "chosen_perplexity": float(np.exp(-(scores.chosen * counts).sum() / counts.sum())),
    }
    if not samples:
        return measures
    with console.status("answering prompts"):
        completions = generate(
            loaded.model,
            [prompt_ids(loaded.chat, pair.prompt) for pair in pairs[:samples]],
            end_token_ids=loaded.end_ids,
            max_new_tokens=max_new_tokens,
            batch_rows=batch_rows,
        )
    said = [completion for (completion,) in completions]
    ids = [completion.token_ids for completion in said]
    texts = [text.strip() for text in loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    ended = [completion.finished for completion in said]
    measures |= {"generations": len(said), "max_new_tokens": max_new_tokens}
    return measures | generation_measures(texts, ids, ended)


def generation_measures(
    texts: Sequence[str], tokens: Sequence[Sequence[int]], ended: Sequence[bool]
) -> dict[str, float]:
    """distinct_1..3, repetition, end_rate, and lengths, of generations as words (split at spaces) and tokens.

    distinct_n: different n-grams of words over all n-grams, of all texts together (Li et al. 2016). repetition: the
    mean over texts of the share of word 4-grams that stand in the text before (Welleck et al. 2020, seq-rep-4).
    end_rate: share that ended by themselves. Texts with no n-gram are left out of what needs one; NaN where all are.
    """
    words = [text.split() for text in texts]
    lengths = [len(ids) for ids in tokens]
    repeats = [1 - len(set(grams)) / len(grams) for text in words if (grams := _grams(text, _REPEATED))]
    every = {n: [gram for text in words for gram in _grams(text, n)] for n in (1, 2, 3)}
    return {
        **{f"distinct_{n}": len(set(g)) / len(g) if g else math.nan for n, g in every.items()},
        "repetition": float(np.mean(repeats)) if repeats else math.nan,
        "end_rate": sum(ended) / len(ended),
        "mean_tokens": float(np.mean(lengths)),
        "median_tokens": float(np.median(lengths)),
    }


def show_basics(measures: dict[str, Any], console: Console) -> None:
    """A table of the measures."""
    from rich.table import Table

    table = Table("measure", "value")
    for name, value in measures.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(str(measures["model"]))
    console.print(table)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
