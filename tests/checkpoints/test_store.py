"""A checkpoint is there as a whole or not at all, and what is beside it is left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from slimepo.checkpoints.store import (
    MANIFEST,
    WRITING,
    begin,
    complete,
    fault_of,
    keep_newest,
    newest,
    newest_sound,
    put_aside,
    remove_unfinished,
    run_of,
)
from slimepo.errors import BadFilesError


def half(folder: Path, step: int) -> Path:
    """A checkpoint whose manifest is not written yet."""
    path = folder / f"checkpoint-{step}"
    begin(path)
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "optimizer.pt").write_bytes(b"moments")
    (path / "global_step" / "rank0.pt").write_bytes(b"part")
    return path


def whole(folder: Path, step: int) -> Path:
    path = half(folder, step)
    complete(path, {"seed": step})
    return path


def test_it_is_complete_once_its_manifest_is_there(tmp_path: Path) -> None:
    path = half(tmp_path, 5)
    assert newest(tmp_path) is None
    assert fault_of(path) == "it was cut short while it was written"
    complete(path, {"seed": 1})
    assert newest(tmp_path) == path
    assert fault_of(path) is None
    assert run_of(path) == {"seed": 1}
    assert not (tmp_path / WRITING).exists()


def test_what_a_kill_left_half_is_removed_before_the_run_goes_on(tmp_path: Path) -> None:
    good, cut = whole(tmp_path, 5), half(tmp_path, 10)
    remove_unfinished(tmp_path)
    assert not cut.exists()
    assert newest_sound(tmp_path) == (good, {})
    # Killed behind the manifest: it is whole.
    late = whole(tmp_path, 15)
    (tmp_path / WRITING).write_text(late.name)
    remove_unfinished(tmp_path)
    assert newest_sound(tmp_path).path == late


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda p: (p / "optimizer.pt").write_bytes(b"mom"), "optimizer.pt has 3 bytes, and 7 were written"),
        (lambda p: (p / "optimizer.pt").write_bytes(b"momentz"), "optimizer.pt has another content than was written"),
        (lambda p: (p / "global_step" / "rank0.pt").unlink(), "global_step/rank0.pt is missing"),
        (lambda p: (p / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda p: (p / MANIFEST).write_bytes(b'{"files": {"optim'), "manifest.json is damaged"),
        (lambda p: (p / MANIFEST).write_bytes(b'{"files": [1]}'), "manifest.json is damaged"),
    ],
)  # fmt: skip
def test_the_newest_sound_one_is_found_and_others_are_named(
    tmp_path: Path, harm: Callable[[Path], None], fault: str
) -> None:
    good, bad = whole(tmp_path, 5), whole(tmp_path, 10)
    harm(bad)
    assert newest_sound(tmp_path) == (good, {bad: fault})
    harm(good)
    with pytest.raises(BadFilesError, match=r"is sound .*nothing was deleted") as caught:
        newest_sound(tmp_path)
    assert f"checkpoint-5: {fault}" in str(caught.value)
    assert good.exists()
    assert bad.exists()


def test_one_that_is_not_sound_is_put_aside_and_not_lost(tmp_path: Path) -> None:
    first = put_aside(whole(tmp_path, 5))
    second = put_aside(whole(tmp_path, 5))
    assert (first.name, second.name) == ("checkpoint-5.damaged", "checkpoint-5.damaged-2")
    assert (second / "optimizer.pt").exists()
    # What is in the way of a new one is put aside too.
    whole(tmp_path, 5)
    begin(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5.damaged-3").exists()


def test_names_that_are_no_checkpoints_are_neither_read_nor_removed(tmp_path: Path) -> None:
    strays = [tmp_path / "checkpoint-best", tmp_path / "checkpoint-5-backup", tmp_path / "checkpoint-99"]
    for stray in strays:
        stray.mkdir()
        (stray / "notes.txt").write_text("mine")
    (strays[0] / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-7").write_text("a file")
    for step in (1, 2, 3):
        whole(tmp_path, step)
    remove_unfinished(tmp_path)
    keep_newest(tmp_path, 1)
    assert newest_sound(tmp_path) == (tmp_path / "checkpoint-3", {})
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-3",
        "checkpoint-7",
        *(s.name for s in strays),
    }


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    paths = [whole(tmp_path, step) for step in (1, 2, 10, 20)]
    keep_newest(tmp_path, None)
    assert all(path.exists() for path in paths)
    keep_newest(tmp_path, 2, also=[paths[0]])
    assert [path.name for path in paths if path.exists()] == ["checkpoint-1", "checkpoint-20"]
    keep_newest(tmp_path, 1, also=[paths[0]])
    assert paths[0].exists()
    assert paths[3].exists()
