"""Log-probs of a reference computed before training, and the folder in which they are kept for the next run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimepo.data.batch import StepCollator
from slimepo.data.rows import MISMATCHED, Row
from slimepo.errors import InputError, unwritable
from slimepo.files import cache_folder
from slimepo.model.adapters import OF_ADAPTERS, adapter_state
from slimepo.model.logps import causal_lm
from slimepo.model.score import add_rows, add_weights, score_rows
from slimepo.parallel.agree import of_all_ranks, on_main
from slimepo.terminal import Report
from slimepo.training.callbacks import TrainingProgress
from slimepo.training.dataset import RowDataset
from slimepo.training.reference import Reference, device_of
from slimepo.versions import versions

logger = logging.getLogger(__name__)
# Changes when what a cache file holds changes.
_CACHE_VERSION = 4

Known = tuple[np.ndarray, ...]


def add_reference(
    dataset: RowDataset,
    index: Sequence[int],
    reference: Reference,
    model: nn.Module,
    collator: StepCollator,
    precision: Callable[[], AbstractContextManager[Any]],
    accelerator: Any,
    progress: TrainingProgress | None,
) -> None:
    """Give the rows at `index` of a data set their `reference_values`, and say where these came from."""
    progress = progress if accelerator.is_main_process else None
    started = time.monotonic()
    with progress.counted("reference log-probs") if progress else nullcontext() as report:
        rows = [dataset[i] for i in index]
        known, cached = reference_values(rows, reference, model, collator, precision, accelerator, report)
    dataset.add("reference", index, known)
    how = "from the cache" if cached else f"computed in {time.monotonic() - started:,.0f} s"
    (progress.say if progress else logger.info)(f"reference log-probs of {len(known):,} rows {how}")


def reference_values(
    rows: Sequence[Row],
    reference: Reference,
    model: nn.Module,
    collator: StepCollator,
    precision: Callable[[], AbstractContextManager[Any]],
    accelerator: Any,
    report: Report | None = None,
) -> tuple[list[Known], bool]:
    """Reference log-probs of the rows, and whether they came from the cache.

    Every rank computes a share; the main process writes the file, and keeps the folder within
    SLIMEPO_REFERENCE_CACHE_GIB (10) by removing the files used longest ago. `model` names the weights in the file's
    key; `precision` is the autocast that they are computed under, which is to be the one that reads them; `report` is
    told how many of this rank's rows are done, and of how many.

    Raises:
        InputError: the folder cannot be written, its limit is no number, or a file in it is damaged.
    """
    if not rows:
        return [], False
    folder, limit = cache_folder("reference"), _limit()
    kind = device_of(model).type
    with precision():
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""

    def read() -> tuple[Path, list[Known] | None]:
        # The key reads every weight; only the process that has the file needs it.
        path = folder / f"{_key(model, reference, rows, collator.positions, autocast)}.npy"
        found = _read(path, rows)
        if found is None:
            _make_folder(folder)
        return path, found

    path, known = on_main(read, accelerator)
    cached = known is not None
    if known is None:
        mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
        with precision(), reference.forward() as forward:
            share, device = [rows[i] for i in mine], device_of(model)
            found = score_rows(forward, share, collator, device, report=report)
            # Answers to other prompts, where rows have them.
            beside = replace(collator, positions=(MISMATCHED,))
            others = score_rows(forward, share, beside, device)
        computed = {}
        for i, row, of_row, other in zip(mine, share, found, others, strict=True):
            by_position = dict(zip([*collator.positions, MISMATCHED], [*of_row, *other], strict=True))
            computed[i] = tuple(
                # A file holds every response; NaN for one that nothing reads.
                by_position[p][0] if p in by_position else np.full(len(response), np.nan, np.float32)
                for p, response in enumerate(row.responses)
            )
        everyone = {i: values for of_rank in of_all_ranks(computed) for i, values in of_rank.items()}
        computed_now = [everyone[i] for i in range(len(rows))]

        def keep() -> None:
            _write(path, computed_now)
            _make_room(path, limit)

        on_main(keep, accelerator)
        known = computed_now
    return known, cached


def _key(
    model: nn.Module, reference: Reference, rows: Sequence[Row], positions: Sequence[int], precision: str
) -> str:
    """What the log-probs are a function of: the reference's weights, configuration and state, the token ids, the
    precision and the libraries."""
    digest = hashlib.blake2b(digest_size=16)
    config = causal_lm(model).config.to_dict()
    # An adapter's weights say nothing of what they are scaled by, and whether they are on.
    state = [] if reference.without_adapters else adapter_state(model)
    libraries = versions()
    computing = [libraries[name] for name in ("slimepo", "torch", "transformers", "peft")]
    for name in (
        "_name_or_path",
        "transformers_version",
        "_attn_implementation",
        "attn_implementation",
        "dtype",
    ):
        config.pop(name, None)
    facts = [_CACHE_VERSION, computing, precision, config, list(positions), state]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    add_weights(digest, model, OF_ADAPTERS if reference.without_adapters else ())
    add_rows(digest, rows)
    return digest.hexdigest()


def _read(path: Path, rows: Sequence[Row]) -> list[Known] | None:
    try:
        flat = np.load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it") from error
    # A cache that may only be read keeps no order of use.
    with suppress(OSError):
        os.utime(path)
    sizes = [len(response) for row in rows for response in row.responses]
    if len(flat) != sum(sizes):
        raise InputError(f"{path} is damaged: it holds another number of log-probs; delete it")
    pieces = iter(np.split(flat, np.cumsum(sizes)[:-1]))
    return [tuple(next(pieces) for _ in row.responses) for row in rows]


def _make_folder(folder: Path) -> None:
    """Make sure that what is about to be computed can be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(
            f"the cache of reference log-probs, {folder},", error, "set SLIMEPO_CACHE to another folder"
        ) from error


def _write(path: Path, known: Sequence[Known]) -> None:
    flat = np.concatenate([values for of_row in known for values in of_row])
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        np.save(file, flat)
    os.replace(file.name, path)


def _make_room(newest: Path, limit: float) -> None:
    """Remove the files used longest ago until no more than `limit` bytes are left; `newest` stays in any case."""
    uses = []
    for path in newest.parent.glob("*.npy"):
        # Another run may make room at the same time.
        with suppress(FileNotFoundError):
            facts = path.stat()
            uses.append((facts.st_mtime_ns, facts.st_size, path))
    held = 0
    for _, size, path in sorted(uses, reverse=True):
        held += size
        if held > limit and path != newest:
            path.unlink(missing_ok=True)


def _limit() -> float:
    """Bytes that the cache may hold."""
    given = os.environ.get("SLIMEPO_REFERENCE_CACHE_GIB", "10")
    try:
        gib = float(given)
    except ValueError:
        gib = math.nan
    if not gib >= 0:
        raise InputError(f"SLIMEPO_REFERENCE_CACHE_GIB is {given!r}: give a number of GiB")
    return gib * 2**30
