"""One model on one benchmark, and where its files lie."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError
from slimepo.evaluation.answerers import model_name
from slimepo.evaluation.benchmarks.base import Kind
from slimepo.evaluation.judge.client import Retries
from slimepo.evaluation.judge.many import Judge, Prices
from slimepo.evaluation.rows import Row, write_rows
from slimepo.evaluation.settings import Evaluation

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

    @property
    def prices(self) -> Prices:
        return Prices(self.settings.price_prompt, self.settings.price_completion)


def make_job(settings: Evaluation, model: str, out: Path, name: str | None = None) -> Job:
    """A job under the model's own name unless another is given."""
    name = name or model_name(model)
    if not re.fullmatch(r"[^/\\\s][^/\\\r\n]*", name) or name in (".", ".."):
        raise InputError(f"--name {name!r} cannot be a file name")
    return Job(settings, model, name, out)


def answers_path(job: Job, kind: Kind) -> Path:
    return job.out / kind.folder / kind.answers_file(job.name)


def judgments_path(job: Job, kind: Kind, judge: Judge) -> Path:
    return job.out / kind.folder / kind.judgments_file(job.name, file_label(judge.name) + kind.variant)


def canary_path(job: Job, kind: Kind, judge: Judge) -> Path:
    # Apart from the official files, whose readers would list the canaries as models.
    return job.out / kind.folder / "canaries" / f"{file_label(judge.name)}{kind.variant}.jsonl"


def score_path(job: Job, kind: Kind, judge: Judge) -> Path:
    style = "--style" if job.settings.style_control else ""
    name = f"{kind.folder}--{job.name}--{file_label(judge.name)}{kind.variant}{style}.json"
    return job.out / "scores" / name


def file_label(name: str) -> str:
    """A judge's name as part of a file name."""
    return re.sub(r"[^\w.@+-]+", "-", re.sub(r"https?://", "", name)).strip("-")


def replace_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".part.{path.name}")
    write_rows(temporary, rows)
    os.replace(temporary, path)


def say(console: Console, text: str) -> None:
    """One line as it is: what judges and paths say is no markup."""
    console.print(text)
