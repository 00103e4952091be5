"""Names of files; two processes on one folder: one waits, nothing is lost, and a killed one blocks nobody."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from rich.console import Console

from slimepo.errors import InputError
from slimepo.evaluation.job import Job, file_label, locked
from slimepo.evaluation.rows import read_rows
from slimepo.evaluation.run import run_benchmark
from tests.evaluation.conftest import one_file, printed
from tests.evaluation.mock_judge import MockJudge


def test_judges_names_in_file_names() -> None:
    assert file_label("gpt-4") == "gpt-4"
    assert file_label("org/m@http://127.0.0.1:8000/v1") == "org-m@127.0.0.1-8000-v1"
    assert file_label("hf:my model") == "hf-my-model"


@pytest.mark.parametrize("name", ["..", ".", "a/b", " a", "a\nb"])
def test_names_that_leave_the_folder_are_refused(name: str, job: Callable[..., Job]) -> None:
    with pytest.raises(InputError, match="cannot be a file name"):
        job("alpaca-eval", name)


HOLD = """
import sys, time
from pathlib import Path
from slimepo.evaluation.job import locked
from slimepo.terminal import make_console
with locked(Path(sys.argv[1]), "x", make_console()):
    print("held", flush=True)
    time.sleep(60)
"""


def waits(console: Console) -> bool:
    """Whether a waiting line is printed within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end and "waiting for another process" not in printed(console):
        time.sleep(0.01)
    return "waiting for another process" in printed(console)


def test_a_process_that_was_killed_blocks_nobody(tmp_path: Path, console: Console) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    threading.Thread(target=lambda: waits(console) and holder.kill()).start()
    with locked(tmp_path, "x", console):
        assert holder.wait(timeout=10) == -9
    assert f"at work on x in {tmp_path}" in printed(console)
    with locked(tmp_path, "x", console), locked(tmp_path, "y", console):
        assert printed(console).count("waiting") == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, console: Console) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"--out .*file cannot be written: Not a directory"),
        locked(tmp_path / "file", "x", console),
    ):
        pass


def test_a_file_system_without_locks_is_one_line(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(InputError, match="cannot be written: no flock here"), locked(tmp_path, "x", console):
        pass


@pytest.mark.parametrize("step", ["answer", "judge"])
def test_a_step_waits_for_the_process_that_writes_the_same_files(
    job: Callable[..., Job], mock: MockJudge, loads: list[str], console: Console, step: str
) -> None:
    this = job("mt-bench")
    if step == "judge":
        run_benchmark(this, console, ["answer"])
    loads.clear()
    label = "mt_bench--tiny-llama" if step == "answer" else file_label(mock.judge)
    with locked(this.out, label, console):
        thread = threading.Thread(target=run_benchmark, args=(this, console))
        thread.start()
        assert waits(console)
        assert (loads, mock.calls) == ([], [])
    thread.join()
    assert len(mock.calls) == 6
    assert one_file(this.out / "scores", "*.json").exists()


WITH_MADE_FILES = """
import sys
from pathlib import Path
from slimepo.cli import main
from slimepo.evaluation.benchmarks.sources import SOURCES
from tests.evaluation.made import pins
SOURCES.update(pins(Path(sys.argv.pop(1))))
main()
"""


def test_two_models_judged_at_once_keep_all_rows_and_share_the_replies(
    mock: MockJudge, tmp_path: Path, data_dir: Path
) -> None:
    folder = tmp_path / "mt_bench" / "model_answer"
    folder.mkdir(parents=True)
    said = [{"question_id": i, "choices": [{"index": 0, "turns": ["Yes.", "No."]}]} for i in (81, 82)]
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    mock.delay = 1.0
    command = [
        sys.executable,
        "-c",
        WITH_MADE_FILES,
        str(data_dir),
        "eval",
        "mt-bench",
        "--judge",
        mock.judge,
    ]
    command += ["--limit", "2", "--data-dir", str(data_dir), "--out", str(tmp_path), "--model"]
    root = Path(__file__).parents[2]
    runs = [
        subprocess.Popen([*command, name], stdout=subprocess.DEVNULL, cwd=root) for name in ("one", "two")
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    # Both say the same, so that the second asks nothing.
    assert len(mock.calls) == 4
    rows = read_rows(one_file(tmp_path / "mt_bench" / "model_judgment", "*.jsonl"))
    assert sorted(row["model"] for row in rows) == ["one"] * 4 + ["two"] * 4
    assert len(list((tmp_path / "scores").glob("*.json"))) == 2
