"""Too little disk, places that cannot be written, odd names and locales, a Hub that is not there."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slimepo import hub
from slimepo.files import Kept
from slimepo.types import Preference
from tests.command import slimepo
from tests.reliability.test_input import TRAIN, no_model, refused


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


@pytest.mark.case(
    10,
    "the disk fills up while a checkpoint is saved: exit 5, noted in status.json; the same command continues",
)
def test_a_full_disk(here: Path) -> None:
    command = ["run", "recipe.yaml", "--out", "out", "adapter=none", "stages.slime.max_steps=2"]
    with files_of_at_most(20_000):
        done = slimepo(*command)
    refused(done, 5)
    assert status(Path("out"))["status"] == "failed"
    assert status(Path("out"))["code"] == 5
    again = slimepo(*command)
    assert again.returncode == 0, again.stderr
    assert status(Path("out")) == {"status": "done", "code": 0}


@pytest.mark.case(
    10, "no room on the disk for the checkpoints and the model: reported before the model loads, exit 5"
)
def test_too_little_room(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_000, 1_000))
    refused(slimepo(*TRAIN), 5, "GiB at the least", "another disk")


@pytest.mark.case(11, "an output that cannot be written: reported before anything is read or loaded, exit 5")
@pytest.mark.parametrize(
    "command",
    [TRAIN, ("generate", "hello", "--model", "model", "--out", "out/answers.jsonl"),
     ("report", "run", "--out", "out/x.html"),
     ("eval", "basics", "--model", "model", "--data", "pairs.jsonl", "--out", "out/x.json"),
     ("export", "run/slime", "out/model"), ("quickstart", "--out", "out/run")],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_a_read_only_output(here: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    no_model(monkeypatch)
    out, may = Path("out"), os.access
    out.mkdir()
    # What the system says of a read-only disk; root may write into a folder of any mode.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))
    refused(slimepo(*command), 5, "out", "read-only")


@pytest.mark.case(
    11, "a file in place of a folder, or the other way round: reported before anything is loaded, exit 2"
)
@pytest.mark.parametrize(
    "command",
    [TRAIN[:-3], ("quickstart", "--out", "out"), ("quickstart", "--seeds", "2", "--out", "out"),
     ("sweep", "sweep.yaml", "--out", "out"), ("export", "run/slime", "out"),
     ("eval", "ifeval", "--model", "model", "--out", "out"), ("generate", "hello", "--model", "model", "--out", "run"),
     ("report", "run", "--out", "model")],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_a_file_as_output(here: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    no_model(monkeypatch)
    Path("out").write_text("mine")
    refused(slimepo(*command), 2)
    assert Path("out").read_text() == "mine"


@pytest.mark.case(
    28, "names with spaces, brackets and letters of any script work; what a terminal cannot show is replaced"
)
def test_odd_names_and_an_ascii_terminal(here: Path) -> None:
    odd = here / "[/x] ü 日本 {y}"
    odd.mkdir(parents=True)
    for name in ("model", "pairs.jsonl", "recipe.yaml"):
        shutil.move(name, odd / name)
    train = ["run", odd / "recipe.yaml", f"model={odd / 'model'}", f"data.path={odd / 'pairs.jsonl'}"]
    for command in ([*train, "--out", odd / "out"], ["report", odd / "out"]):
        done = slimepo(*command, encoding="ascii")
        assert done.returncode == 0, done.stderr
        assert "[/x] ? ?? {y}" in done.stdout
    assert (odd / "out" / "report.html").exists()


@pytest.mark.case(28, "in an ASCII-only locale, names with other letters are still found and printed")
def test_a_locale_of_ascii() -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "slimepo.cli", "run", "é.yaml".encode()]
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, b"error: recipe ?.yaml: No such file or directory\n")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which the Hub's address takes calls and never answers."""
    from huggingface_hub import constants

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        hub._look.cache_clear()
        yield
        hub._look.cache_clear()


@pytest.mark.case(30, "the Hub does not answer: given up after a few seconds, and the error says so, exit 2")
def test_the_hub_does_not_answer(here: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.5)
    started = time.monotonic()
    done = slimepo("generate", "hello", "--model", "somebody/something")
    assert time.monotonic() - started < 10
    refused(done, 2, "somebody/something", "the Hub cannot be reached (")


def test_a_server_that_answers_with_an_error_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            call, _ = server.accept()
            with call:
                call.recv(1000)
                call.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert hub._asked(f"http://127.0.0.1:{server.getsockname()[1]}") == ""


@pytest.mark.case(30, "a model in the cache is used if the Hub cannot be reached")
def test_a_cached_model(here: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_SECONDS", 0.5)
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository, commit = cache / "models--somebody--tiny", "0" * 40
    shutil.copytree("model", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = slimepo("data", "check", "pairs.jsonl", "--model", "somebody/tiny")
    assert done.returncode == 0, done.stderr


@pytest.mark.case(
    29, "rows beyond the first 2,000 wait in a file: 100,000 take no more memory, and train the same weights"
)
def test_many_rows_in_little_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(number: int) -> Preference:
        said = (
            [{"role": "user", "content": f"add {number}"}],
            [{"role": "assistant", "content": "x" * 99}],
            [],
        )
        return Preference(*said, f"pairs.jsonl:{number}")  # type: ignore[arg-type]

    tracemalloc.start()
    rows = Kept(map(pair, range(100_000)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 * 2**20
    assert rows[99_999] == pair(99_999)
    train = ["run", "recipe.yaml", "adapter=none", "stages.slime.epochs=2", "stages.slime.max_steps=-1"]
    weights = []
    for in_memory in (5, 10_000):
        monkeypatch.setattr("slimepo.files.IN_MEMORY", in_memory)
        done = slimepo(*train, "--out", f"kept-{in_memory}")
        assert done.returncode == 0, done.stderr
        weights.append(Path(f"kept-{in_memory}/slime/model/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
