"""A recipe's `evaluate:` list, after the stages that it names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.settings import Evaluation

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.recipe import Recipe

# Inside the run folder; what `slimepo eval --out` would be given.
EVAL_FOLDER = "eval"
JUDGE_CALLS = "judge_calls"


def evaluations_of(recipe: Recipe, stage: str) -> list[Evaluation]:
    """What runs after a stage: entries that name it, and after the last one those that name none."""
    last = recipe.stages[-1].name
    return [entry for entry in recipe.evaluate if stage in (entry.stages or [last])]


def check_evaluations(recipe: Recipe, out: Path) -> None:
    """Fetch every file and look for every library and key before anything is trained.

    Raises:
        InputError: a library is missing, a benchmark's file cannot be had, or a judge has no key.
    """
    if recipe.smoke or _several_processes():
        return
    from slimepo.evaluation.bench_arena import ArenaHard, need_tokenizer
    from slimepo.evaluation.bench_runs import STEPS, load_benchmark
    from slimepo.evaluation.endpoint import api_key, parse_endpoint
    from slimepo.evaluation.judge import LOCAL
    from slimepo.evaluation.libraries import need_libraries

    for entry in recipe.evaluate:
        need_libraries(entry, "", STEPS)
        # A baseline of one's own may be a model that an earlier stage is still to make.
        judged = entry.judge is not None and entry.baseline is None
        kind = load_benchmark(entry, out / EVAL_FOLDER, judged=judged)
        if entry.judge is not None and isinstance(kind, ArenaHard):
            need_tokenizer(kind, {})
        if entry.judge is not None and not entry.judge.startswith(LOCAL):
            api_key(parse_endpoint(entry.judge, entry.key_variable))


def evaluate_stage(recipe: Recipe, stage: str, out: Path, console: Console) -> list[Exception]:
    """Run a stage's benchmarks; failures are said and returned, so that hours of training are not lost to them."""
    entries = evaluations_of(recipe, stage)
    reason = "a smoke run" if recipe.smoke else "several processes" if _several_processes() else ""
    if entries and reason:
        console.print(
            f"{stage}: evaluate is left out ({reason}); `slimepo eval` does it by itself", highlight=False
        )
        return []
    failed: list[Exception] = []
    for entry in entries:
        from slimepo.evaluation.bench_runs import run_benchmark
        from slimepo.evaluation.job import make_job

        console.print(f"{stage}: {entry.benchmark}", markup=False, highlight=False)
        try:
            run_benchmark(make_job(entry, str(out / stage), out / EVAL_FOLDER), console)
        except (InputError, UnscoredError) as error:
            console.print(
                f"{stage}: {entry.benchmark} failed: {error}", markup=False, highlight=False, soft_wrap=True
            )
            failed.append(error)
    return failed


def clear_evaluations(out: Path) -> None:
    """Throw away a run's answers, judgments and scores; what judges replied stays: it is paid for, and still true."""
    folder = out / EVAL_FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != JUDGE_CALLS:
            shutil.rmtree(path)


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
