"""The run folder: plain files that a reader, the report and a resumed run find by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.evaluation.settings import JUDGE_CALLS, LOCKS
from slimepo.files import is_main_process, read_json, write_json, write_text
from slimepo.pipeline.recipe import Recipe
from slimepo.settings import dump
from slimepo.versions import versions

if TYPE_CHECKING:
    from rich.console import Console

# Says that a folder is a run of slimepo; nothing is ever deleted from a folder without it.
MARKER = ".slimepo-run"
# What a run goes on from: stages that are done, checkpoints, samples for pairs.
_BEGUN = ("*/stage.json", "*/checkpoints/checkpoint-*", "*/samples-*.jsonl", "*/pairs.json")
# Inside the run folder; what `slimepo eval --out` would be given.
EVAL_FOLDER = "eval"


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


def check_folder(recipe: Recipe, out: Path, restart: bool) -> None:
    """Refuse a folder in which something else has been done; with `restart`, clear this run's stages away.

    Raises:
        InputError: the folder holds the run of another recipe, or something that is no run.
    """
    if not is_main_process() or not out.exists() or not any(out.iterdir()):
        return
    if not out.is_dir() or not (out / MARKER).exists():
        raise InputError(f"{out} is not empty and no run of slimepo; give another --out")
    if restart:
        patterns = ("*/stage.json", "*/checkpoints", "*/samples-*.jsonl", "*/pairs.json")
        for made in {path.parent for pattern in patterns for path in out.glob(pattern)}:
            shutil.rmtree(made)
        for path in (out / EVAL_FOLDER).glob("*"):
            if path.is_file():
                path.unlink()
            elif path.name not in (JUDGE_CALLS, LOCKS):
                # What judges replied stays: it is paid for, and still true.
                shutil.rmtree(path)
    elif begun(out):
        old, new = (out / "recipe.yaml").read_text(encoding="utf-8"), dump(recipe)
        if old != new:
            lines = zip(old.splitlines(), new.splitlines(), strict=False)
            told = (f"{was.strip()!r} there, {now.strip()!r} now" for was, now in lines if was != now)
            raise InputError(
                f"{out} holds a run of another recipe ({next(told, 'one has more keys than the other')}); "
                "give another --out, or --restart to throw that run away"
            )


def mark_folder(out: Path) -> None:
    """Say that a folder is a run of slimepo, before anything else is put into it."""
    write_text(out / MARKER, "A run of slimepo; see recipe.yaml.\n")


def claim_folder(recipe: Recipe, out: Path, facts: dict[str, Any], console: Console) -> None:
    """Write down what runs here: the resolved recipe, the libraries' versions, the data's facts.

    Raises:
        InputError: the run was begun on other data, so that going on would mix the two.
    """
    if not is_main_process():
        return
    going_on = begun(out)
    before = read_json(out / "data.json") if going_on else None
    for key, what in (("parts", recipe.data.path), ("tasks", "a file of tasks")):
        if before is not None and before.get(key) != facts.get(key):
            raise InputError(f"{what} has changed since {out} was begun; give another --out, or --restart")
    old: dict[str, str] = (read_json(out / "versions.json") if going_on else None) or {}
    new = versions()
    changed = [f"{name} {old[name]} then, {new[name]} now" for name in old if old[name] != new.get(name)]
    if changed:
        console.print(f"note: the run was begun with other versions: {', '.join(changed)}")
    mark_folder(out)
    write_text(out / "recipe.yaml", dump(recipe))
    write_json(out / "versions.json", old or new)
    write_json(out / "data.json", facts)


def begun(out: Path) -> bool:
    """Whether a run has something to go on from; one that failed before its first checkpoint has not."""
    return any(any(out.glob(pattern)) for pattern in _BEGUN)
