"""One run at a time in a folder, whatever the second one asks for."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.reliability.harness import Ended, slimepo


@pytest.mark.case(
    27, "a second run in a folder is refused at once, with --restart too; a killed one blocks nobody"
)
def test_two_runs_into_one_folder(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("run", world / "full.yaml", "--out", out)
    others: dict[str, Ended] = {}

    def during(children: list[int]) -> None:
        deadline = time.monotonic() + 60
        while not (out / "only" / "checkpoints" / "checkpoint-1" / "manifest.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(children[0], signal.SIGSTOP)
        others["again"] = slimepo(*command)
        others["restart"] = slimepo(*command, "--restart")
        others["two ranks"] = slimepo(*command, ranks=2)
        os.kill(children[0], signal.SIGKILL)

    assert slimepo(*command, during=during).code == -signal.SIGKILL
    for ended in others.values():
        assert set(ended.codes) == {2}, ended.said
        assert "another process is at work in this run folder" in ended.said
    assert (out / "only" / "checkpoints" / "checkpoint-1").exists()
    assert slimepo(*command).code == 0
