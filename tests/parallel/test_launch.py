"""`--nproc N`: what is refused, and whose error and exit code the command ends with."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from slimepo.errors import InputError
from slimepo.parallel import launch
from tests.command import slimepo

RECIPE = """
model: {init: random, architecture: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer: nowhere
data: {path: pairs.jsonl}
stages: [{loss: slime}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def failure(folder: Path, rank: int, exitcode: int, *left: object) -> ProcessFailure:
    """As torchrun has it; `left`: what the rank said and when."""
    file = folder / f"{rank}.json"
    if left:
        file.write_text(json.dumps({"message": {"message": left[0], "extraInfo": {"timestamp": left[1]}}}))
    return ProcessFailure(rank, 100 + rank, exitcode, str(file))


class TestWhoFailedFirst:
    def test_the_first_to_fail_is_heard_and_its_exit_code_is_that_of_all(self, tmp_path: Path) -> None:
        failures = {
            0: failure(tmp_path, 0, 1, "Connection closed by peer", 100.4),
            1: failure(tmp_path, 1, 2, "error: give a folder", 100.2),
            2: failure(tmp_path, 2, -signal.SIGTERM),
        }
        assert launch.first_failure(failures) == (2, "error: give a folder")

    def test_a_rank_that_was_killed_is_named(self, tmp_path: Path) -> None:
        killed = failure(tmp_path, 1, -signal.SIGKILL)
        others = failure(tmp_path, 0, 1, "Connection closed by peer", killed.timestamp + 0.5)
        code, words = launch.first_failure({0: others, 1: killed})
        assert code == 5
        assert words == "error: rank 1 was ended by SIGKILL; is the machine short of memory?"

    def test_words_are_left_where_there_is_somebody_to_read_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        assert not launch.leave_words("error: under torchrun rank 0 speaks for itself")
        monkeypatch.setenv("SLIMEPO_NPROC", "2")
        assert launch.leave_words("error: no such file")
        assert launch.first_failure({0: ProcessFailure(0, 1, 2, str(file))}) == (2, "error: no such file")


class TestRefused:
    def test_under_another_launcher(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        result = slimepo("run", recipe, "--nproc", 2)
        assert result.returncode == 2
        assert "has started this process as one of 4 ranks already; leave --nproc out" in result.stderr

    def test_more_ranks_than_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        with pytest.raises(
            InputError, match="this machine has 2 cuda devices; give --nproc 2; CUDA_VISIBLE_"
        ):
            launch.launch(4, ["run"])

    def test_a_wrong_recipe_before_any_rank_starts(self, recipe: Path) -> None:
        result = slimepo("run", recipe, "--nproc", 2, "stages.slime.learning_rat=1")
        assert result.returncode == 2
        assert "learning_rat" in result.stderr


def test_an_error_of_the_ranks_is_one_line_and_exit_code_2(recipe: Path) -> None:
    command = [sys.executable, "-m", "slimepo.cli", "run", str(recipe), "--out", str(recipe.parent / "run")]
    command += ["--nproc", "2", "stages.slime.batch_size=7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2
    assert result.stderr == "error: stage 'slime': batch_size 7 cannot be shared out over 2 devices\n"
