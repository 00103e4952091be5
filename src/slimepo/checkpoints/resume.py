"""The checkpoint that a run goes on from: sound, and of this run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from slimepo.checkpoints import store
from slimepo.checkpoints.identity import differences, refuse_differences
from slimepo.errors import BadFilesError


def newest_of_run(
    folder: Path, identity: Mapping[str, Any], accept: Collection[str], say: Callable[[str], None]
) -> Path | None:
    """The newest checkpoint in `folder` that is whole and of the run `identity`; None where there is none yet.

    What a kill left half-written is removed. Newer ones that are damaged are told of, and put aside under another name.

    Raises:
        BadFilesError: there are checkpoints, and all are damaged; they stay as they are.
        InputError: it is of another run, in a way that is not in `accept`.
    """
    store.remove_unfinished(folder)
    sound = store.newest_sound(folder)
    if sound.path is None:
        return None
    for path, fault in sound.damaged.items():
        lost, aside = store.step_of(path) - store.step_of(sound.path), store.put_aside(path)
        say(
            f"{path} is not sound ({fault}); it is now {aside.name}, and its last {lost} steps are taken again from "
            f"{sound.path.name}"
        )
    _refuse_other_run(sound.path, identity, accept)
    return sound.path


def refuse_other(checkpoint: Path, identity: Mapping[str, Any], accept: Collection[str]) -> None:
    """Nothing, where a checkpoint is sound and of the run `identity`, but for what is accepted.

    Raises:
        BadFilesError: a file of it is damaged or missing.
        InputError: the differences, by name.
    """
    if fault := store.fault_of(checkpoint):
        raise BadFilesError(f"{checkpoint} is no sound checkpoint: {fault}; go on from another one")
    _refuse_other_run(checkpoint, identity, accept)


def _refuse_other_run(checkpoint: Path, identity: Mapping[str, Any], accept: Collection[str]) -> None:
    found = differences(store.run_of(checkpoint), identity)
    refuse_differences(
        found, accept, f"{checkpoint} is of another run", "give another folder, or put back what it was"
    )
