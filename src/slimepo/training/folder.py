"""The run folder: plain files that a reader, the report and a resumed run find by name."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from slimepo.errors import InputError

_LIBRARIES = ("slimepo", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a killed run leaves either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where it is absent.

    Raises:
        InputError: the file is there and is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place in one step."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones (a killed run) are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        # transformers writes trainer_state.json last.
        state = path / "trainer_state.json"
        try:
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


def versions() -> dict[str, str]:
    """Python, the machine's kind and the libraries that the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "absent"
    return found


def is_main_process() -> bool:
    """Whether this process writes files and speaks (rank 0 under torchrun or accelerate)."""
    return int(os.environ.get("RANK", "0")) == 0
