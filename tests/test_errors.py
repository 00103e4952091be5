"""What becomes of an error: its exit code, and one line."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from slimepo.errors import (
    BadFilesError,
    CertificateError,
    InputError,
    NonFiniteLossError,
    Preempted,
    ResourceError,
    RunsFailed,
    UnscoredError,
    failure,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no such key"), 2),
        (BadFilesError("a tensor is missing"), 3),
        (CertificateError("a gradient differs"), 4),
        (NonFiniteLossError("at step 3"), 4),
        (ResourceError("too little memory"), 5),
        (UnscoredError("6 of 10"), 6),
        (Preempted("told to end"), 75),
        (KeyboardInterrupt(), 75),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "absent.jsonl"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 5),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (torch.OutOfMemoryError("CUDA out of memory"), 5),
        (ModuleNotFoundError("No module named 'optuna'", name="optuna"), 2),
        (ZeroDivisionError("division by zero"), 1),
        (SystemExit(0), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_kind_of_error_has_its_code(error: BaseException, code: int) -> None:
    found = failure(error)
    assert found.code == code
    assert found.words


def test_a_pipe_that_is_closed_is_no_fault_of_ours() -> None:
    """rich ends the program by SystemExit(1) while it handles it."""
    ended = SystemExit(1)
    ended.__context__ = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert failure(ended) == (5, "nobody reads the output any more: the pipe that it goes to is closed")


def raised(action: Any) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (lambda: torch.empty(2**60), 5),
        (lambda: np.empty(2**55), 5),
        (lambda: torch.save({"x": torch.zeros(10_000)}, "/dev/full"), 5),
        (lambda: Path("/dev/full").write_text("x" * 10_000), 5),
        (lambda: Tokenizer.from_file("/absent/tokenizer.json"), 2),
        (lambda: safe_open("/absent.safetensors", "pt"), 2),
    ],
    ids=["torch-memory", "numpy-memory", "torch-disk", "disk", "tokenizers-path", "safetensors-path"],
)
def test_what_libraries_say_of_memory_disk_and_paths_is_known(action: Any, code: int) -> None:
    found = failure(raised(action))
    assert found.code == code, found
    assert "\n" not in found.words


def test_the_way_out_of_a_full_disk_is_said() -> None:
    found = failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"))
    assert found.words.startswith("runs/a: No space left on device; free some space")


def test_words_are_one_line_of_bounded_length_and_steer_no_terminal() -> None:
    found = failure(InputError("a\nb\r\n\x1b[31mred\x1b[0m " + "x" * 10_000))
    assert found.words.startswith("a b [31mred [0m xxx")
    assert len(found.words) < 2100


def test_what_nobody_foresaw_names_its_type_and_the_place_it_came_through() -> None:
    import slimepo.words

    found = failure(raised(lambda: slimepo.words.short_number("text")))  # type: ignore[arg-type]
    assert found.code == 1
    assert found.words.startswith("ValueError: Unknown format code")
    assert "(in slimepo/words.py:" in found.words
    assert "--debug shows the traceback" in found.words


def test_runs_that_can_all_go_on_end_as_one_that_can() -> None:
    assert failure(RunsFailed("2 of 3 runs failed", [75, 4, 5])) == (4, "2 of 3 runs failed")
    assert failure(RunsFailed("2 of 3 runs failed", [75, 75])).code == 75
