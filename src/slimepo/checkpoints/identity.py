"""What makes a run the run that a checkpoint is of: plain data by name, and how two of them differ."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import slimepo
from slimepo.data.rows import Row
from slimepo.errors import InputError

_TOLD = 8
# What is said of a difference that is not told by the two values themselves.
_IN_WORDS = {
    "rows": "the rows are others (the data, or the template or tokenizer that makes tokens of them)",
    "row_order": "the rows stand in another order",
    "source": "the source of the objective is another",
    "model": "the model that the run starts from is another",
}


def rows_digest(rows: Iterable[bytes]) -> dict[str, str]:
    """Names for rows, each given by its own (`row_digest`, say): whatever their order, and in it."""
    each = [*rows]
    return {"rows": digest_of(*sorted(each)), "row_order": digest_of(*each)}


def weights_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A name for weights, from a few numbers of each tensor: those of another model differ in nearly all."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)].contiguous().view(torch.uint8).cpu().numpy()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def source_digest(function: Any) -> str | None:
    """A name for the file that a user's own function stands in; None for what slimepo or Python brings along."""
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").resolve()
        if file.is_relative_to(Path(slimepo.__file__).parent):
            return None
        return digest_of(file.read_bytes())
    except (TypeError, OSError):
        return None


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """How a run differs from the one that a checkpoint is of: each difference by its name, in words."""
    return {
        name: _IN_WORDS.get(name, f"{name} was {was.get(name)!r}, is now {now.get(name)!r}")
        for name in sorted(was.keys() | now.keys())
        if _plain(was.get(name)) != _plain(now.get(name))
    }


def refuse_differences(found: Mapping[str, str], accepted: Collection[str], what: str, way_out: str) -> None:
    """Nothing, where every difference is accepted by its name.

    Raises:
        InputError: all that are not, and how they would be.
    """
    left = {name: words for name, words in found.items() if name not in accepted}
    if left:
        told = [*left.values()][:_TOLD]
        more = f"; and {len(left) - _TOLD} more" if len(left) > _TOLD else ""
        options = " ".join(f"--accept {name}" for name in left)
        raise InputError(f"{what} ({'; '.join(told)}{more}); {way_out}; or go on all the same with {options}")


def row_digest(row: Row) -> bytes:
    """A name for what a row is made of: tokens and values, not its id."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (row.prompt_ids, *row.responses):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i8").data)
    # What is computed of the rows before training is no part of them.
    for name in sorted(row.values.keys() - {"reference"}):
        given: Any = row.values[name]
        for value in given if isinstance(given, tuple) else (given,):
            digest.update(name.encode() + np.asarray(value, dtype="<f8").tobytes())
    return digest.digest()


def digest_of(*parts: bytes) -> str:
    """A name for bytes; 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value, default=str))
