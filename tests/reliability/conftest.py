"""What tests break: sound files of every kind, a small world, and one undisturbed run of each kind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.fuzz import sound_files
from tests.reliability.harness import make_world, slimepo
from tests.reliability.kills import operations


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run of this kind, on so many ranks, that nothing happened to; made once."""
    made: dict[tuple[str, int, tuple[str, ...]], Path] = {}

    def run(kind: str = "full", ranks: int = 1, *overrides: str) -> Path:
        key = (kind, ranks, overrides)
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            command = ("run", world / f"{kind}.yaml", *overrides, "--out", out)
            if ranks == 1:
                # Its file operations are of use too, and are beside it.
                operations(out, command)
            else:
                ended = slimepo(*command, ranks=ranks)
                assert ended.codes == [0] * ranks, ended.said
            made[key] = out
        return made[key]

    return run


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, a recipe, a finished run (see `fuzz.sound_files`); not to be changed."""
    folder = tmp_path_factory.mktemp("fuzz") / "sound"
    folder.mkdir()
    sound_files(folder)
    return folder


@pytest.fixture
def here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sound files, which the command is given in."""
    shutil.copytree(sound, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
