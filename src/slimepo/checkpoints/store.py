"""Checkpoints on the disk: complete once their manifest is there, verified before they are read.

A folder `checkpoint-N` holds all files of step N, and as the last of them `manifest.json`: each file's size and hash,
and what run wrote them (`identity`). Until then the file `.writing` beside the folder says that it is not whole.
Whatever else lies there is somebody else's, and is neither read nor removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from slimepo.errors import BadFilesError

MANIFEST = "manifest.json"
# Beside the checkpoints: the name of the one that is being written.
WRITING = ".writing"
# What one is called while it is removed, and where one is put that is not sound and stands in the way.
_REMOVED, _DAMAGED = ".removed-", ".damaged"
_NAME = re.compile(r"checkpoint-(\d+)")
# A folder of a checkpoint's name has one of these, or it is somebody else's.
_SIGNS = (MANIFEST, "trainer_state.json", "optimizer.pt", "model.safetensors", "adapter_model.safetensors")


class Sound(NamedTuple):
    """The newest sound checkpoint of a folder, None where there is none yet, and newer ones with what is wrong."""

    path: Path | None
    damaged: dict[Path, str]


def step_of(checkpoint: Path) -> int:
    """The step of a folder named `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def begin(checkpoint: Path) -> None:
    """Make room for a checkpoint that is about to be written; what a kill left half-written is removed.

    A folder of this name that is no half-written one (it was passed over as damaged, say) is put aside, not removed.
    """
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(checkpoint.parent)
    if checkpoint.exists():
        put_aside(checkpoint)
    _write_down(checkpoint.parent / WRITING, checkpoint.name)


def complete(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole, once every rank has written its part: all of it is on the disk, the manifest last."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = [*pool.map(_flushed_hash, files)]
    for folder in {path.parent for path in files}:
        _flush_folder(folder)
    listed = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    _write_down(checkpoint / MANIFEST, json.dumps({"run": run, "files": listed}, indent=2))
    (checkpoint.parent / WRITING).unlink(missing_ok=True)
    _flush_folder(checkpoint.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill left half-written or half-removed; only the run itself may do that, before it goes on."""
    if (folder / WRITING).exists():
        half = folder / (folder / WRITING).read_text(encoding="utf-8")
        if _NAME.fullmatch(half.name) and not (half / MANIFEST).exists():
            shutil.rmtree(half, ignore_errors=True)
        (folder / WRITING).unlink()
    for path in folder.glob(f"{_REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)


def keep_newest(folder: Path, count: int | None, also: Collection[Path] = ()) -> None:
    """Remove the oldest whole checkpoints until no more than `count` are left, the newest and `also` in any case."""
    whole = [path for path in _numbered(folder) if (path / MANIFEST).exists()]
    kept = {*whole[:1], *also}
    for path in reversed(whole if count else []):
        if len(whole) <= max(count or 0, len(kept)):
            break
        if path not in kept:
            # In one step it is no checkpoint any more, however far a killed run comes in removing it.
            gone = path.with_name(_REMOVED + path.name)
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            whole.remove(path)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, not verified; for whoever only looks."""
    return next((path for path in _numbered(folder) if (path / MANIFEST).exists()), None)


def newest_sound(folder: Path) -> Sound:
    """The newest checkpoint whose every file is what was written; nothing is changed.

    Raises:
        BadFilesError: there are checkpoints, and none is sound.
    """
    damaged: dict[Path, str] = {}
    for path in _numbered(folder):
        fault = fault_of(path)
        if fault is None:
            return Sound(path, damaged)
        damaged[path] = fault
    if damaged:
        told = "; ".join(f"{path.name}: {fault}" for path, fault in damaged.items())
        raise BadFilesError(
            f"no checkpoint in {folder} is sound ({told}); nothing was deleted: put the files back, or start again "
            "with --restart or another --out"
        )
    return Sound(None, {})


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by the file's name; None where every file is as it was written."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        sizes = {checkpoint / name: int(facts["size"]) for name, facts in listed.items()}
        hashes = {checkpoint / name: str(facts["sha256"]) for name, facts in listed.items()}
    except FileNotFoundError:
        half = _read(checkpoint.parent / WRITING) == checkpoint.name
        return "it was cut short while it was written" if half else f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for path, size in sizes.items():
        name = path.relative_to(checkpoint)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, and {size:,} were written"
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(hashes, pool.map(_hash, hashes), strict=True):
            if digest != hashes[path]:
                return f"{path.relative_to(checkpoint)} has another content than was written"
    return None


def run_of(checkpoint: Path) -> dict[str, Any]:
    """What a sound checkpoint says of the run that wrote it."""
    run: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())["run"]
    return run


def put_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that is not sound, so that it is one no longer and nothing of it is lost."""
    number, aside = 1, checkpoint.with_name(checkpoint.name + _DAMAGED)
    while aside.exists():
        number, aside = number + 1, checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}-{number + 1}")
    checkpoint.rename(aside)
    return aside


def _numbered(folder: Path) -> Sequence[Path]:
    """Folders of a checkpoint's name and content, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    ours = [path for path in found if any((path / sign).exists() for sign in _SIGNS)]
    return sorted(ours, key=step_of, reverse=True)


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flushed_hash(file: Path) -> str:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_down(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, also after the power has failed."""
    temporary = file.with_name(file.name + ".part")
    with temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)
    _flush_folder(file.parent)


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        # Not every file system can.
        pass
    finally:
        os.close(descriptor)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
