"""A run that is killed at any file operation goes on to the weights that it would have had.

Every one of them, of all kinds of runs on one and two ranks, is killed in `make soak`; here a few that have gone wrong.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from slimepo.training.trainer import PreferenceTrainer
from tests.reliability.harness import slimepo, weights
from tests.reliability.kills import killed_once, operations_file, phase_of


@pytest.mark.case(
    4,
    "SIGKILL at any file operation of a claim, a save or an export: the same command ends with the same bits",
)
@pytest.mark.parametrize(
    ("kind", "phase", "operation"),
    [
        ("full", "claim", "os.rename .slimepo-run.part"),
        ("full", "claim", "open recipe.yaml.part"),
        ("full", "save", "os.remove only/checkpoints/.writing"),
        ("lora", "save", "os.rename only/checkpoints/checkpoint-6/manifest.json.part"),
        # With a reference that is computed beforehand, for the rows of the run's six steps of an epoch of ten.
        ("dpo", "export", "os.rename only/model.part"),
    ],
)
def test_killed(
    world: Path, undisturbed: Callable[..., Path], tmp_path: Path, kind: str, phase: str, operation: str
) -> None:
    whole = undisturbed(kind)
    done = operations_file(whole).read_text().splitlines()
    number = next(number for number in phase_of(done, phase) if done[number - 1] == operation)
    out = tmp_path / "run"
    killed, again = killed_once(("run", world / f"{kind}.yaml", "--out", out), out, number)
    assert killed.code == -9, killed.said
    assert again.code == 0, again.said
    assert weights(out) == weights(whole)


@pytest.mark.case(
    4,
    "SIGKILL to one of two ranks as it writes its part of a checkpoint: that one does not count; the run continues",
)
def test_one_rank_is_killed_while_it_saves(
    world: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    def before(rank: int) -> None:
        save = PreferenceTrainer._save_rng_state

        def killed(self: PreferenceTrainer, folder: str) -> None:
            if rank == 1 and self.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, folder)

        PreferenceTrainer._save_rng_state = killed  # type: ignore[method-assign]

    command = ("run", world / "full.yaml", "--out", tmp_path / "run")
    ended = slimepo(*command, ranks=2, before=before)
    assert ended.codes[1] == -signal.SIGKILL
    assert ended.codes[0] not in (0, -signal.SIGKILL), ended.said
    again = slimepo(*command, ranks=2)
    assert again.codes == [0, 0], again.said
    assert weights(tmp_path / "run") == weights(undisturbed("full", 2))
