"""The chosen answers whose likelihood fell most, token by token: what is kept of them for whoever reads the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slimepo.data.rows import CHOSEN, Row
from slimepo.monitor.displacement import SideScores

# So many answers are kept at the end, and of each so many tokens from its first on.
ANSWERS, TOKENS = 4, 256

Decode = Callable[[list[int]], str | None]


def first_tokens(chosen: SideScores) -> list[list[float]]:
    """Log-probs of the first tokens of every answer, in nats to 3 digits."""
    return [[round(float(logp), 3) for logp in tokens[:TOKENS]] for tokens in chosen.logps]


def fell_most(
    rows: Sequence[Row], start: Sequence[Sequence[float]], now: SideScores, before: Sequence[float | None],
    decode: Decode,
) -> list[dict[str, Any]]:  # fmt: skip
    """Of the answers that became less likely the worst, each with its prompt, its tokens as text and their log-probs.

    Args:
        rows: the sample, in the order of what else is given.
        start: what `first_tokens` gave before training.
        now: the scores after it.
        before: log-prob per token of whole answers before training, None where a row has no chosen one.
        decode: text of token ids; None where there is no tokenizer, and then nothing is kept.
    """
    was = np.array(before, np.float64)
    change = now.means() - was
    order = [int(at) for at in np.argsort(change, kind="stable") if change[at] < 0][:ANSWERS]
    found = []
    for at in order:
        ids = rows[at].response(CHOSEN).tolist()
        prompt, tokens = decode(rows[at].prompt_ids.tolist()), pieces(ids[:TOKENS], decode)
        if prompt is None:
            return []
        found.append(
            {
                "row_id": rows[at].id,
                "prompt": prompt,
                "length": len(ids),
                "mean": [float(was[at]), float(now.means()[at])],
                "tokens": tokens,
                "before": list(start[at]),
                "after": first_tokens(now.part(slice(at, at + 1)))[0],
            }
        )
    return found


def pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token where it stands; a letter of several tokens belongs to the last of them."""
    found, told = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[:end])) or ""
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        # A tokenizer that changes what stood there before is asked for the token alone.
        found.append(text[len(told) :] if text.startswith(told) else decode([ids[end - 1]]) or "")
        told = text
    return found
