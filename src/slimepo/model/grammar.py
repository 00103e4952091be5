"""Grammars that an answer must follow, token by token, through xgrammar (an optional extra).

A grammar is a text in xgrammar's EBNF whose rule `root` the whole answer must match. It masks logits, so what is drawn
is the model's distribution cut to the tokens that can go on; log-probs of such answers are still those of the model
alone. Near the limit of tokens an answer is closed (its brackets, say). Special tokens other than the end are no text,
and never part of such an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.words import first_line

# The most characters by which a closing is looked for from nothing, and by which one is changed behind a token.
_WHOLE, _DETOUR = 64, 6
# Where none is known, it is looked for again with so many tokens left.
_AGAIN = frozenset((64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1))
# Tokens with which a tokenizer is tried out, and compiled grammars that are kept.
_TRIED, _KEPT = 8, 256


def check_installed() -> None:
    """Raises InputError where xgrammar is missing."""
    if find_spec("xgrammar") is None:
        raise InputError("a grammar needs xgrammar: pip install 'slimepo[grammar]'")


def read_grammar(file: Path | str) -> str:
    """The text of a grammar's file; InputError where it cannot be read, or is no grammar."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"grammar {file}: {getattr(error, 'strerror', None) or error}") from error
    try:
        check_grammar(text)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return text


def check_grammar(text: str) -> None:
    """Raises InputError for a text that is no grammar; it needs no tokenizer, and takes no time."""
    check_installed()
    import xgrammar

    try:
        xgrammar.Grammar.from_ebnf(text)
    except Exception as error:
        # xgrammar raises errors of several kinds, with a place in its own source in front.
        reason = first_line(error).rpartition(".cc:")[2].partition(": ")[2] or first_line(error)
        raise InputError(f"the grammar cannot be read: {reason}") from error


def grammars_for(model: Any, tokenizer: Any, end_token_ids: Collection[int]) -> Grammars:
    """What makes constraints for a model's answers; the same one again for the same tokenizer."""
    vocabulary = model.config.get_text_config().vocab_size
    return _grammars(tokenizer, vocabulary, frozenset(end_token_ids))


class Grammars:
    """Makes constraints for one tokenizer, of a model whose logits have `vocabulary` columns.

    Raises:
        InputError: xgrammar is missing, or would read the tokenizer's pieces otherwise than it decodes them.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_token_ids: Collection[int]) -> None:
        check_installed()
        import xgrammar

        ends = sorted(end_token_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=ends)
        words = (
            (i, piece) for i, piece in enumerate(info.decoded_vocab) if piece.isalpha() and piece.isascii()
        )
        for token, piece in [pair for pair, _ in zip(words, range(_TRIED), strict=False)]:
            if (told := tokenizer.decode([token, token])) != 2 * piece.decode():
                raise InputError(
                    f"a grammar cannot be used with this tokenizer: two tokens {piece.decode()!r} decode as {told!r}"
                )
        self._compiler = xgrammar.GrammarCompiler(info)
        self._width, self._ends = vocabulary, np.array(ends)
        # A grammar can be closed in single characters, whatever its brackets.
        self._characters = np.array([i for i, piece in enumerate(info.decoded_vocab) if len(piece) == 1], int)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def __call__(self, text: str, name: str = "a grammar") -> Constraint:
        """A new constraint, for one answer; `name` stands in its errors.

        Raises:
            InputError: the text is no grammar.
        """
        made, closing = self._compiled(text)
        return made(name, closing)

    def _compile(self, text: str) -> tuple[Callable[..., Constraint], list[int] | None]:
        import xgrammar

        check_grammar(text)
        compiled = self._compiler.compile_grammar(text)

        def made(name: str, closing: list[int] | None) -> Constraint:
            matcher = xgrammar.GrammarMatcher(compiled)
            return Constraint(name, matcher, self._width, self._ends, self._characters, closing)

        # The way from the start is the same for all answers.
        return made, made("", None).closing_by([], _WHOLE)


_grammars = functools.lru_cache(8)(Grammars)


class Constraint:
    """What one answer may go on with; made by `Grammars`, used up by the answer."""

    def __init__(
        self,
        name: str,
        matcher: Any,
        vocabulary: int,
        ends: np.ndarray,
        characters: np.ndarray,
        closing: list[int] | None,
    ) -> None:
        import xgrammar

        self._name, self._matcher, self._ends, self._characters = name, matcher, ends, characters
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
            raise InputError(f"{self._name} asks for a text that the model's tokenizer has no token for")
        return self._mask

    def take(self, token: int, left: int) -> int:
        """Go on with a drawn token and return it, or the one that stands in for it; `left` tokens may follow.

        A token that leaves more to close than `left` tokens can is replaced by the next one of the closing that was
        known before it.

        Raises:
            InputError: the token was not among those allowed.
        """
        before = self._closing
        if not self._matcher.accept_token(token):
            raise InputError(
                f"{self._name}: token {token} was drawn, which it does not allow: are logits NaN?"
            )
        if token in self._ends:
            return token
        self._closing = None if before is None else self.closing_by(before, _DETOUR)
        if self._closing is None and (left in _AGAIN if before is None else left <= _WHOLE):
            self._closing = self.closing_by([], min(left, _WHOLE))
        # Where none is found far from the limit, one may come in time.
        closes = left > _WHOLE if self._closing is None else len(self._closing) <= left
        # An answer that could not be closed before this token either is not saved by another one.
        if closes or before is None or len(before) > left + 1:
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


def cut(logits: Tensor, going: Mapping[int, Constraint]) -> Tensor:
    """Logits `[rows, vocabulary]`, -inf (in float32) where the constraint of a row that goes on allows no token."""
    if not going:
        return logits
    import xgrammar

    rows, width = logits.shape
    bits = torch.full((rows, -(-width // 32)), -1, dtype=torch.int32)
    for at, constraint in going.items():
        bits[at] = constraint.allowed()
    # A copy, also where they are in float32.
    masked = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
    xgrammar.apply_token_bitmask_inplace(masked, bits.to(logits.device))
    return masked


def taken(chosen: Tensor, going: Mapping[int, Constraint], left: int) -> Tensor:
    """The tokens `[rows]` that answers go on with, of which so many were `chosen`; `left` may follow."""
    if not going:
        return chosen
    tokens = chosen.tolist()
    for at, constraint in going.items():
        tokens[at] = constraint.take(tokens[at], left)
    return torch.tensor(tokens, dtype=chosen.dtype, device=chosen.device)


def _held(bits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """For each token whether its bit is set."""
    found: np.ndarray = (bits[tokens >> 5] >> (tokens & 31)) & 1 != 0
    return found
