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

# Says that a folder is a run of slimepo; nothing is ever deleted from a folder without it.
MARKER = ".slimepo-run"

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
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; a line cut off by a kill, also in the middle of a letter, is left out."""
    if not path.exists():
        return []
    lines = []
    # Split as bytes: str.splitlines takes characters that may stand in an answer for ends of lines.
    for line in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place in one step."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end."""
    steps = {path: step for path in folder.glob("checkpoint-*") if (step := _step(path)) is not None}
    return max(steps, key=lambda path: steps[path]) if steps else None


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Remove what a killed run left half-written; only the run itself may do that, before it goes on."""
    for path in folder.glob("checkpoint-*"):
        if _step(path) is None:
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int | None:
    """The step of a complete checkpoint: transformers writes trainer_state.json last."""
    try:
        step: int = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        return None
    return step


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


def cache_folder(kind: str) -> Path:
    """Where things worth keeping between runs are kept: a folder of SLIMEPO_CACHE, else of the user's cache."""
    base = os.environ.get("SLIMEPO_CACHE")
    if base:
        return Path(base) / kind
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slimepo" / kind
