"""Grammars that an answer must follow, token by token, through xgrammar (an optional extra).

A grammar is a text in xgrammar's EBNF whose rule `root` the whole answer must match. It masks logits, so what is drawn
is the model's distribution cut to the tokens that can go on; log-probs of such answers are still those of the model
alone. Near the limit of tokens an answer is closed: its brackets, say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.words import first_line

# The most characters by which the closing of a whole answer is looked for, and by which one is changed behind a token.
_WHOLE, _DETOUR = 64, 6


def check_installed() -> None:
    """Raises InputError where xgrammar is missing."""
    if find_spec("xgrammar") is None:
        raise InputError("a grammar needs xgrammar: pip install 'slimepo[grammar]'")


def read_grammar(file: Path | str) -> str:
    """The text of a grammar's file; InputError where it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"grammar {file}: {getattr(error, 'strerror', None) or error}") from error


def grammars_for(model: Any, tokenizer: Any, end_token_ids: Collection[int]) -> Grammars:
    """What compiles grammars for a model's answers."""
    return Grammars(tokenizer, model.config.get_text_config().vocab_size, end_token_ids)


class Grammars:
    """Compiles grammars for one tokenizer, of a model whose logits have `vocabulary` columns."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_token_ids: Collection[int]) -> None:
        check_installed()
        import xgrammar

        ends = sorted(end_token_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=ends)
        self._compiler = xgrammar.GrammarCompiler(info)
        self._width, self._ends = vocabulary, np.array(ends)
        # A grammar can be closed in single characters, whatever its brackets.
        self._characters = np.array([i for i, piece in enumerate(info.decoded_vocab) if len(piece) == 1])

    def __call__(self, text: str) -> Callable[[], Constraint]:
        """What makes a new constraint for each answer that is to follow this grammar.

        Raises:
            InputError: the text is no grammar.
        """
        import xgrammar

        try:
            compiled = self._compiler.compile_grammar(text)
        except Exception as error:
            # xgrammar raises errors of several kinds, with a place in its own source in front.
            reason = first_line(error).rpartition(".cc:")[2].partition(": ")[2] or first_line(error)
            raise InputError(f"the grammar cannot be read: {reason}") from error

        def made(closing: list[int] | None) -> Constraint:
            matcher = xgrammar.GrammarMatcher(compiled)
            return Constraint(matcher, self._width, self._ends, self._characters, closing)

        # The way from the start is the same for all.
        whole = made(None).closing_by([], _WHOLE)
        return lambda: made(whole)


class Constraint:
    """What one answer may go on with; made by `Grammars`, used up by the answer."""

    def __init__(
        self,
        matcher: Any,
        vocabulary: int,
        ends: np.ndarray,
        characters: np.ndarray,
        closing: list[int] | None,
    ) -> None:
        import xgrammar

        self._matcher, self._ends, self._characters = matcher, ends, characters
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary)
        # Tokens that would close the answer where it stands, an end token last; None where none are known.
        self._closing = closing

    def allowed(self) -> Tensor:
        """The next tokens as xgrammar's bits, int32 `[1, ceil(vocabulary / 32)]`; the next call overwrites them.

        Raises:
            InputError: the tokenizer has no token for what must come next.
        """
        self._matcher.fill_next_token_bitmask(self._mask)
        if not self._mask.any():
            raise InputError("the grammar asks for a text that the model's tokenizer has no token for")
        return self._mask

    def take(self, token: int, left: int) -> int:
        """Go on with a drawn token and return it, or the one that stands in for it; `left` tokens may follow.

        A token that leaves more to close than `left` tokens can is replaced by the next one of the closing that was
        known before it.
        """
        before = self._closing
        self._matcher.accept_token(token)
        if token in self._ends or before is None:
            return token
        self._closing = self.closing_by(before, _DETOUR)
        if len(before) > left + 1 or len(self._closing or before) <= left:
            return token
        self._matcher.rollback(1)
        self._matcher.accept_token(before[0])
        self._closing = before[1:]
        return before[0]

    def closing_by(self, known: list[int], most: int) -> list[int] | None:
        """Up to `most` single characters from here, then the end, or what still fits of the `known` closing.

        Breadth first. Of continuations with the same tokens to choose from, now and before their last one, one is
        followed: of a text's many letters, say. None where nothing was found.
        """
        level: list[list[int]] = [[]]
        for _ in range(most + 1):
            following: dict[tuple[bytes, bytes], list[int]] = {}
            for path in level:
                for token in path:
                    self._matcher.accept_token(token)
                bits = self._bits()
                found = [[end] for end in self._ends[_held(bits, self._ends)].tolist()]
                found += [rest for at in range(len(known) - 1, -1, -1) if self._closes(rest := known[at:])]
                for token in [] if found else self._characters[_held(bits, self._characters)].tolist():
                    self._matcher.accept_token(token)
                    following.setdefault((bits.tobytes(), self._bits().tobytes()), [*path, token])
                    self._matcher.rollback(1)
                if path:
                    self._matcher.rollback(len(path))
                if found:
                    return [*path, *found[0]]
            level = list(following.values())
        return None

    def _closes(self, tokens: list[int]) -> bool:
        """Whether the answer could go on with all of these."""
        taken = 0
        for token in tokens:
            if not self._matcher.accept_token(token):
                break
            taken += 1
        if taken:
            self._matcher.rollback(taken)
        return taken == len(tokens)

    def _bits(self) -> np.ndarray:
        self._matcher.fill_next_token_bitmask(self._mask)
        bits: np.ndarray = self._mask[0].numpy().copy()
        return bits


def masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits `[rows, vocabulary]` in float32, -inf where `allowed` `[rows, ceil(vocabulary / 32)]` has no bit."""
    import xgrammar

    cut = logits.float()
    # A copy, unless the cast has made one.
    cut = cut.clone() if cut is logits else cut
    xgrammar.apply_token_bitmask_inplace(cut, allowed.to(logits.device))
    return cut


def everything(rows: int, vocabulary: int) -> Tensor:
    """Bits that allow every token in every row, int32 `[rows, ceil(vocabulary / 32)]`."""
    return torch.full((rows, -(-vocabulary // 32)), -1, dtype=torch.int32)


def _held(bits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """For each token whether its bit is set."""
    found: np.ndarray = (bits[tokens >> 5] >> (tokens & 31)) & 1 != 0
    return found
