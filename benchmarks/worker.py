"""A process of its own for each contender: built once, then run whenever the parent says so.

Workers wait on a pipe while another one runs, so contenders can take turns although each has its own process.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from slimepo.data.rows import Row

# A fork server imports the libraries once for all workers, before any thread of theirs is started.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


@dataclass(frozen=True)
class Job:
    """One contender on some rows: `model` is a transformers config as a dict, with `model_type`."""

    contender: str
    rows: Sequence[Row]
    micro_batch: int
    model: dict[str, Any]
    threads: int = 1


@dataclass(frozen=True)
class Run:
    """One step: seconds of process CPU time and of wall clock, bytes over the idle process, the loss."""

    cpu: float
    wall: float
    extra_bytes: int
    loss: float


@dataclass(frozen=True)
class Absent:
    """The contender cannot take part here."""

    reason: str


class WorkerFailedError(Exception):
    """A contender broke; the message carries its traceback."""


def worker_context(threads: int, start: str = _START) -> Any:
    """How workers are started: with so many threads each, and from a fork server their libraries imported once for
    all of them."""
    # Threads are read from the environment before a library starts them.
    os.environ |= {"OMP_NUM_THREADS": str(threads), **_ENVIRONMENT}
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload([f"{__package__}.preload"])
    return context


class Worker:
    """The parent's end of one contender's process; `ready()` waits until it is built and warm."""

    def __init__(self, job: Job) -> None:
        self.job = job
        context = worker_context(job.threads)
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, job), daemon=True)
        self._process.start()
        child.close()

    def ready(self) -> str | None:
        """None, or why the contender cannot take part."""
        answer = self._receive()
        return answer.reason if isinstance(answer, Absent) else None

    def run(self) -> Run:
        """One measured step."""
        self._pipe.send("run")
        run: Run = self._receive()
        return run

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send("stop")
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise WorkerFailedError(f"{self.job.contender}: its process ended, perhaps for memory") from error
        if isinstance(answer, str):
            raise WorkerFailedError(f"{self.job.contender}:\n{answer}")
        return answer


def _serve(pipe: Connection, job: Job) -> None:
    from benchmarks.peers import PeerAbsentError

    try:
        with tempfile.TemporaryDirectory() as folder:
            measured = _Measured(job, Path(folder))
            pipe.send(None)
            while pipe.recv() == "run":
                pipe.send(measured.run())
    except PeerAbsentError as absent:
        pipe.send(Absent(str(absent)))
    except EOFError:
        return
    except Exception:
        pipe.send(traceback.format_exc())


class _Measured:
    """A contender with one step behind it, so that nothing is compiled, allocated or paged in for the first time."""

    def __init__(self, job: Job, folder: Path) -> None:
        import torch

        from benchmarks.contenders import CONTENDERS, HEADS
        from benchmarks.memory import settle
        from benchmarks.peers import Setup

        be_quiet()
        torch.set_num_threads(job.threads)
        self.model = random_model(job.model)
        batches = [job.rows[i : i + job.micro_batch] for i in range(0, len(job.rows), job.micro_batch)]
        contender = (CONTENDERS | HEADS)[job.contender]
        self.step = contender.build(self.model, Setup(batches, folder))
        self.step()
        self.model.zero_grad(set_to_none=True)
        self.idle = settle()

    def run(self) -> Run:
        from benchmarks.memory import forget_peak, peak, settle

        settle()
        forget_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        loss = self.step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        extra = peak() - self.idle
        self.model.zero_grad(set_to_none=True)
        return Run(cpu, wall, extra, loss)


def be_quiet() -> None:
    """No warnings and progress bars of the libraries: the parent prints the table."""
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def random_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A float32 causal language model of that shape with random weights, the same for every contender."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
