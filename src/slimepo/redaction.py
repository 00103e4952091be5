"""Secrets are cut out where text leaves: in files that people read, on the console, in errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"

# Names of settings and of environment variables that hold a secret; tokens of a vocabulary are none.
_NAMES = re.compile(
    r"(?<!eos)(?<!bos)(?<!pad)(?<!unk)(?<!sep)(?<!cls)(?<!end)(?<!mask)(?<!stop)(?<!image)"
    r"(?:^|[_.-])(?:token|api[_-]?key|access[_-]?key|key|password|passwd|secret|authorization|cookie|credentials?)$",
    re.IGNORECASE,
)
_SHORTEST = 8  # A shorter value of the environment is a word that may stand anywhere.
# Secrets that came by another way: a key in a variable whose name does not say so.
_KEPT: set[str] = set()
# What looks like a secret wherever it stands, and what is left of it.
_FORMS = tuple(
    (re.compile(form, re.IGNORECASE), left)
    for form, left in (
        (r"(://)[^\s/@]+@", rf"\1{REDACTED}@"),
        (r"([?&][\w.-]*(?:token|key|secret|password|signature|sig)=)[^&\s\"'<]+", rf"\1{REDACTED}"),
        (r"\b(Bearer|Basic(?=\s+\S*[\d=]))\s+[\w.~+/=-]{6,}", rf"\1 {REDACTED}"),
        (
            r"\b((?:hub_token|auth_token|access_token|api_?key|password|passwd|secret|authorization)[\"']?\s*[=:]\s*[\"']?)"
            r"(?!\[redacted)[^\s\"',;}&]+",
            rf"\1{REDACTED}",
        ),
        # In their own case: HF_HUB_OFFLINE is no token.
        (r"\b(?-i:hf_|sk-|ghp_|gho_|github_pat_|xox[abp]-|AKIA|AIza)[\w-]{8,}", REDACTED),
    )
)


def keep_secret(value: str) -> str:
    """The value, which is a secret from now on wherever it stands."""
    if len(value) >= _SHORTEST:
        _KEPT.add(value)
    return value


def without_known(text: str) -> str:
    """The text without the secrets of this process: data may hold what only has the form of one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name):
            text = text.replace(value, REDACTED)
    for value in _KEPT:
        text = text.replace(value, REDACTED)
    return text


def redact(text: str) -> str:
    """The text without secrets: those of this process, and whatever has the form of one."""
    text = without_known(text)
    for form, left in _FORMS:
        text = form.sub(left, text)
    return text


def redacted(value: Any) -> Any:
    """Plain data without secrets: whatever stands under the name of one, and in any text."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if item and isinstance(item, str) and _NAMES.search(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
