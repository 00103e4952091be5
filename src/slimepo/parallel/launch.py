"""`--nproc N`: the same command again on N ranks of this machine, which torchrun starts and watches."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimepo.errors import PREEMPTED, RESOURCES, UNFORESEEN, InputError
from slimepo.files import is_main_process

# In the environment of ranks that `launch` has started.
_LAUNCHED = "SLIMEPO_NPROC"
# Seconds that ranks have to write a checkpoint once the command has been told to end.
_TO_SAVE = "300"


def launched() -> bool:
    """Whether this process is a rank that `launch` has started."""
    return _LAUNCHED in os.environ


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `slimepo ARGUMENTS` on `ranks` ranks of this machine: a GPU each, or a share of the CPU where there is none.

    SIGTERM and SIGINT go on to the ranks. Returns the exit code: that of the rank that failed first, whose error is
    printed last, or one of `slimepo.errors` where a signal ended it.

    Raises:
        InputError: another launcher has started this process, or there are fewer GPUs.
    """
    _refuse(ranks)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[_LAUNCHED] = str(ranks)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _TO_SAVE)
    # What torchrun says of a rank that failed, the rank has said better.
    logging.disable(logging.ERROR)
    launcher: Any = torchrun
    try:
        with tempfile.TemporaryDirectory(prefix="slimepo-ranks-") as folder:
            options = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={folder}"]
            asked = launcher.parse_args([*options, "-m", "slimepo.cli"])
            # Not through its parser, which would take `--nproc` for its own.
            asked.training_script_args = [*arguments]
            launcher.run(asked)
    except ChildFailedError as error:
        code, words = first_failure(error.failures)
        print(words, file=sys.stderr, flush=True)
        return code
    except SignalException as stopped:
        signal_name = signal.Signals(stopped.sigval).name
        print(
            f"error: ended by {signal_name}; the same command goes on where it can",
            file=sys.stderr,
            flush=True,
        )
        return PREEMPTED
    finally:
        logging.disable(logging.NOTSET)
    return 0


def leave_words(text: str) -> bool:
    """Leave a failing rank's last words to `launch`, which prints one rank's; False where it is to print them itself.

    Under torchrun alone that is rank 0; torchrun's own report has the words of the rank that failed first.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or not (launched() or not is_main_process()):
        return False
    # In the form that torchrun reads.
    Path(file).write_text(
        json.dumps({"message": {"message": text, "extraInfo": {"timestamp": time.time()}}}), encoding="utf-8"
    )
    return True


def first_failure(failures: Mapping[int, Any]) -> tuple[int, str]:
    """The exit code and the last words of the rank that failed first, of torchrun's failures by rank."""

    def when(rank: int) -> tuple[bool, float]:
        failure = failures[rank]
        # The others are told to end by SIGTERM; a rank that died without a word is seen up to a second later.
        left = _left(failure)
        died = left["extraInfo"]["timestamp"] if left else failure.timestamp - 1
        return failure.exitcode == -signal.SIGTERM, died

    rank = min(failures, key=when)
    failure = failures[rank]
    if left := _left(failure):
        return failure.exitcode, left["message"]
    if failure.exitcode >= 0:
        return failure.exitcode, f"error: rank {rank} ended with exit code {failure.exitcode}"
    words = f"error: rank {rank} was ended by {failure.signal_name()}"
    if failure.exitcode == -signal.SIGKILL:
        return RESOURCES, f"{words}; is the machine short of memory?"
    return PREEMPTED if failure.exitcode == -signal.SIGTERM else UNFORESEEN, words


def _left(failure: Any) -> Any:
    """What a rank has left of its error; None where it had no time to."""
    message = failure.error_file_data["message"]
    return message if isinstance(message, dict) else None


def _refuse(ranks: int) -> None:
    if "WORLD_SIZE" in os.environ:
        raise InputError(
            f"--nproc {ranks}: torchrun or accelerate has started this process as one of {os.environ['WORLD_SIZE']} "
            "ranks already; leave --nproc out"
        )
    import torch

    there = torch.accelerator.device_count() if torch.accelerator.is_available() else ranks
    if ranks > there:
        kind = torch.accelerator.current_accelerator()
        hide = "; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU" if kind and kind.type == "cuda" else ""
        raise InputError(
            f"--nproc {ranks}: this machine has {there} {kind} device{'s' * (there != 1)}; give --nproc {there}{hide}"
        )
