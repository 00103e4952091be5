"""Checkpoints that something happened to: never read by halves, never thrown away."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from slimepo.checkpoints.store import newest
from tests.reliability.harness import slimepo, told_in_step, weights


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that was stopped after four; checkpoints 3 and 4 are there."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    ended = slimepo("run", world / "full.yaml", "--out", out, before=told_in_step(4, signal.SIGTERM))
    assert ended.code == 75, ended.said
    return out


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


PARTS = [
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
    "config.json", "manifest.json",
]  # fmt: skip


@pytest.mark.case(
    5, "the newest checkpoint is truncated: the run says what was lost and continues from the one before"
)
@pytest.mark.parametrize("part", ["model.safetensors", "manifest.json"])
def test_the_newest_is_truncated(world: Path, undisturbed: Callable[..., Path], run: Path, part: str) -> None:
    cut(run / "only" / "checkpoints" / "checkpoint-4" / part)
    ended = slimepo("run", world / "full.yaml", "--out", run)
    assert ended.code == 0, ended.said
    said = " ".join(ended.said.split())
    assert "checkpoint-4 is not sound" in said
    assert part in said
    assert "its last 1 steps are taken again from checkpoint-3" in said
    assert (run / "only" / "checkpoints" / "checkpoint-4.damaged" / part).exists()
    assert weights(run) == weights(undisturbed("full"))


@pytest.mark.case(
    7, "a state file is missing, cut or has a flipped bit: found and named before anything is loaded"
)
@pytest.mark.parametrize("harm", [os.unlink, cut, flip], ids=["missing", "cut", "flipped"])
def test_every_part_is_looked_at(run: Path, harm: Callable[[Path], None]) -> None:
    from slimepo.checkpoints.store import fault_of

    checkpoint = run / "only" / "checkpoints" / "checkpoint-4"
    assert fault_of(checkpoint) is None
    for part in PARTS:
        content = (checkpoint / part).read_bytes()
        harm(checkpoint / part)
        # A manifest with a flipped bit may still be one: then it is another than that of the files.
        assert part in str(fault_of(checkpoint)) or (part == "manifest.json" and fault_of(checkpoint)), part
        (checkpoint / part).write_bytes(content)
    assert fault_of(checkpoint) is None


@pytest.mark.case(6, "all checkpoints are bad: exit code 3, nothing is deleted, and --restart is the way out")
def test_all_are_bad(world: Path, undisturbed: Callable[..., Path], run: Path) -> None:
    checkpoints = run / "only" / "checkpoints"
    flip(checkpoints / "checkpoint-4" / "optimizer.pt")
    (checkpoints / "checkpoint-3" / "rng_state.pth").unlink()
    before = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    for _ in range(2):
        ended = slimepo("run", world / "full.yaml", "--out", run)
        assert ended.code == 3, ended.said
        assert "checkpoint-4: optimizer.pt" in ended.said
        assert "checkpoint-3: rng_state.pth is missing" in ended.said
        assert "--restart" in ended.said
        assert before.keys() <= {path for path in run.rglob("*") if path.is_file()}
    ended = slimepo("run", world / "full.yaml", "--out", run, "--restart")
    assert ended.code == 0, ended.said
    assert weights(run) == weights(undisturbed("full"))


@pytest.mark.case(8, "names beside the checkpoints that the run did not write are neither read nor removed")
def test_strays(world: Path, undisturbed: Callable[..., Path], run: Path) -> None:
    checkpoints = run / "only" / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-best")
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-4-backup")
    (checkpoints / "checkpoint-9").write_text("a file")
    (checkpoints / "checkpoint-99").mkdir()
    (checkpoints / "notes.txt").write_text("mine")
    strays = {path for path in checkpoints.rglob("*") if "checkpoint-3" not in str(path)}
    strays = {path for path in strays if not path.is_relative_to(checkpoints / "checkpoint-4")}
    ended = slimepo("run", world / "full.yaml", "--out", run)
    assert ended.code == 0, ended.said
    assert all(path.exists() for path in strays)
    assert newest(checkpoints) == checkpoints / "checkpoint-6"
    assert weights(run) == weights(undisturbed("full"))
