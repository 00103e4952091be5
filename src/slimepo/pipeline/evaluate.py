"""A recipe's `evaluate:` list, after the stages that it names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.settings import Evaluation
from slimepo.pipeline.folder import EVAL_FOLDER

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.pipeline.recipe.schema import Recipe


def evaluations_of(recipe: Recipe, stage: str) -> list[Evaluation]:
    """What runs after a stage: entries that name it, and after the last one those that name none."""
    last = recipe.stages[-1].name
    return [entry for entry in recipe.evaluate if stage in (entry.stages or [last])]


def check_evaluations(recipe: Recipe, out: Path) -> None:
    """Fetch every file and look for every library, judge, baseline and key before anything is trained.

    Raises:
        InputError: a library is missing, a benchmark's file cannot be had, a judge has no key or is no model, or a
            baseline neither has answered nor will have by then.
    """
    if recipe.smoke or _several_processes():
        return
    # In the order in which they will run: what has been trained, and who has answered which questions, by then.
    trained: list[Path] = []
    answered: dict[tuple[str, str], list[str]] = {}
    for stage in recipe.stages:
        trained.append((out / stage.name).resolve())
        name = f"{out.resolve().name}-{stage.name}"
        for entry in evaluations_of(recipe, stage.name):
            there = answered.setdefault((entry.benchmark, entry.rules), [])
            try:
                _check_entry(recipe, entry, out, trained, there, name)
            except InputError as error:
                raise InputError(f"evaluate: {entry.benchmark}: {error}") from error
            there.append(name)


def _check_entry(
    recipe: Recipe, entry: Evaluation, out: Path, trained: Sequence[Path], answered: Sequence[str], name: str
) -> None:
    from slimepo.data.chat import chat_format
    from slimepo.evaluation.answerers import check_backend, prompt_ids
    from slimepo.evaluation.judge.many import PROBE, check_judge
    from slimepo.evaluation.run import load_benchmark
    from slimepo.pipeline.data import recipe_tokenizer

    check_backend(entry.backend)
    if entry.model_key_variable is not None:
        raise InputError("model_key_variable is for a model behind an endpoint; a stage's is a local one")
    benchmark = load_benchmark(entry, out / EVAL_FOLDER, awaited=answered)
    benchmark.ready({})
    if name in benchmark.against:
        raise InputError(f"{name} is its own baseline; name the stages after which this runs (stages: [...])")
    judge = Path((entry.judge or "").removeprefix("hf:")).resolve()
    to_be_trained = not judge.exists() and any(judge in (folder, folder / "model") for folder in trained)
    own_judge = entry.judge is not None and to_be_trained
    if entry.system or own_judge:
        prompt_ids(chat_format(recipe_tokenizer(recipe), recipe.template_options), PROBE)
    if entry.judge is not None and not own_judge:
        check_judge(entry.judge, entry.key_variable)


def evaluate_stage(recipe: Recipe, stage: str, out: Path, console: Console) -> list[Exception]:
    """Run a stage's benchmarks; failures are said and returned, so that hours of training are not lost to them."""
    entries = evaluations_of(recipe, stage)
    reason = "a smoke run" if recipe.smoke else "several processes" if _several_processes() else ""
    if entries and reason:
        console.print(f"{stage}: evaluate is left out ({reason}); `slimepo eval` does it by itself")
        return []
    failed: list[Exception] = []
    for entry in entries:
        from slimepo.evaluation.job import make_job
        from slimepo.evaluation.run import run_benchmark

        console.print(f"{stage}: {entry.benchmark}")
        try:
            run_benchmark(make_job(entry, str(out / stage), out / EVAL_FOLDER), console)
        except Exception as error:
            # Of whatever kind: the stages that follow are not lost to it.
            known = isinstance(error, InputError | UnscoredError)
            console.print(f"{stage}: {entry.benchmark} failed: {error if known else repr(error)}")
            failed.append(error)
    return failed


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
