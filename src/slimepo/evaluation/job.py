"""One model on one benchmark: where its files lie, and one process at a time on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError, unwritable
from slimepo.evaluation.answerers import model_name
from slimepo.evaluation.benchmarks.base import Benchmark
from slimepo.evaluation.judge.client import Retries
from slimepo.evaluation.judge.many import Calls, Judge, Prices
from slimepo.evaluation.settings import JUDGE_CALLS, LOCKS, Evaluation

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Job:
    """One model on one benchmark; everything is filed under `name` in `out`."""

    settings: Evaluation
    model: str
    name: str
    out: Path

    @property
    def retries(self) -> Retries:
        return Retries(attempts=self.settings.attempts, timeout_s=self.settings.timeout)


def make_job(settings: Evaluation, model: str, out: Path, name: str | None = None) -> Job:
    """A job under the model's own name unless another is given."""
    name = name or model_name(model)
    if not re.fullmatch(r"[^/\\\s][^/\\\r\n]*", name) or name in (".", ".."):
        raise InputError(f"--name {name!r} cannot be a file name")
    return Job(settings, model, name, out)


def file_label(name: str) -> str:
    """A judge's name as part of a file name."""
    return re.sub(r"[^\w.@+-]+", "-", re.sub(r"https?://", "", name)).strip("-")


def answers_path(job: Job, benchmark: Benchmark) -> Path:
    return job.out / benchmark.folder / benchmark.answers_file.format(model=job.name)


def judgments_path(job: Job, benchmark: Benchmark, judge: Judge) -> Path:
    assert benchmark.judging is not None
    label = file_label(judge.name) + _variant(job, benchmark)
    return job.out / benchmark.folder / benchmark.judging.file.format(model=job.name, judge=label)


def canary_path(job: Job, benchmark: Benchmark, judge: Judge) -> Path:
    # Apart from the official files, whose readers would list the canaries as models.
    label = file_label(judge.name) + _variant(job, benchmark)
    return job.out / benchmark.folder / "canaries" / f"{label}.jsonl"


def score_path(job: Job, benchmark: Benchmark, judge: Judge | None) -> Path:
    by = f"--{file_label(judge.name)}" if judge is not None else ""
    style = "--style" if job.settings.style_control else ""
    return job.out / "scores" / f"{benchmark.folder}--{job.name}{by}{_variant(job, benchmark)}{style}.json"


def _variant(job: Job, benchmark: Benchmark) -> str:
    """What file names end in, so that a trial or another choice replaces no other judgments."""
    settings = job.settings
    parts = [
        benchmark.baseline and f"vs-{benchmark.baseline}",
        settings.references != "gpt-4" and f"references-{settings.references}",
        settings.category,
        settings.limit and f"first-{settings.limit}",
    ]
    return "".join(f"--{part}" for part in parts if part)


def calls_of(job: Job, judge: Judge) -> Calls:
    """How a judge is called; its replies are kept for all models and benchmarks together."""
    prices = Prices(job.settings.price_prompt, job.settings.price_completion)
    cache = job.out / JUDGE_CALLS / f"{file_label(judge.name)}.jsonl"
    return Calls(cache, job.settings.concurrency, job.retries, prices)


@contextmanager
def locked(out: Path, label: str, console: Console) -> Iterator[None]:
    """Hold the lock of this name in `out`; where another process has it, say so and wait until it is done.

    The files stay; what counts is the operating system's lock, which ends with its process.

    Raises:
        InputError: the folder cannot be made, or its file system has no locks.
        ResourceError: it may not be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / LOCKS / f"{label}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(
                f"waiting for another process that is at work on {label} in {out} (Ctrl-C leaves it alone)"
            )
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        # NotImplementedError: a file system without locks.
        raise unwritable(f"--out {out}", error) from error
    try:
        yield
    finally:
        lock.release()
