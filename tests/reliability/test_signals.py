"""A run that is told to end writes one checkpoint, on all ranks the same, and says that it can go on."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slimepo.checkpoints.store import newest_sound
from tests.reliability.harness import slimepo, told_in_step, weights


@pytest.mark.case(
    2,
    "SIGTERM or SIGINT during a run: a checkpoint of that step and exit code 75; the same command continues",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end(
    world: Path, undisturbed: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    command = ("run", world / "full.yaml", "stages.only.save_every=100", "--out", tmp_path / "run")
    stopped = slimepo(*command, before=told_in_step(4, number))
    assert stopped.code == 75, stopped.said
    assert "goes on" in stopped.said
    assert "Traceback" not in stopped.said
    found = newest_sound(tmp_path / "run" / "only" / "checkpoints")
    assert found.path is not None
    assert (found.path.name, found.damaged) == ("checkpoint-4", {})
    assert not (tmp_path / "run" / "only" / "model").exists()
    assert slimepo(*command).code == 0
    assert weights(tmp_path / "run") == weights(undisturbed("full"))


@pytest.mark.case(2, "SIGTERM while nothing trains (loading, scoring, export): exit code 75 at once")
def test_told_to_end_before_training(world: Path, tmp_path: Path) -> None:
    def before(_: int) -> None:
        from slimepo.pipeline import stage

        stage.standing = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9)  # type: ignore

    ended = slimepo("run", world / "full.yaml", "--out", tmp_path / "run", before=before)
    assert ended.code == 75, ended.said
    assert "Traceback" not in ended.said


@pytest.mark.case(
    3, "SIGTERM to a single rank: all ranks stop at the same step, with one checkpoint and exit code 75"
)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_told(world: Path, tmp_path: Path, rank: int) -> None:
    command = ("run", world / "full.yaml", "stages.only.save_every=100", "--out", tmp_path / "run")
    stopped = slimepo(*command, ranks=2, before=told_in_step(2, signal.SIGTERM, of_rank=rank))
    assert stopped.codes == [75, 75], stopped.said
    found = newest_sound(tmp_path / "run" / "only" / "checkpoints")
    assert found.path is not None
    assert found.path.name == "checkpoint-2"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in found.path.iterdir()}


@pytest.mark.ranks
@pytest.mark.case(3, "the launcher's exit code is 75 too")
def test_the_launcher_says_so(world: Path, tmp_path: Path) -> None:
    # The ranks are processes of their own, which nothing but the signal reaches.
    def during(children: list[int]) -> None:
        deadline = time.monotonic() + 100
        while not [*(tmp_path / "run").glob("only/checkpoints/checkpoint-*/manifest.json")]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(children[0], signal.SIGTERM)

    command = (
        "run",
        world / "full.yaml",
        "stages.only.max_steps=2000",
        "--nproc",
        2,
        "--out",
        tmp_path / "run",
    )
    ended = slimepo(*command, during=during)
    assert ended.code == 75, ended.said
    assert newest_sound(tmp_path / "run" / "only" / "checkpoints").path is not None
