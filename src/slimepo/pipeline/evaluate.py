"""A recipe's `evaluate:` list, after the stages that it names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.settings import Evaluation
from slimepo.pipeline.folder import EVAL_FOLDER

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.pipeline.recipe import Recipe


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
    for place, entry in enumerate(recipe.evaluate):
        try:
            _check_entry(recipe, place, out)
        except InputError as error:
            raise InputError(f"evaluate: {entry.benchmark}: {error}") from error


def _check_entry(recipe: Recipe, place: int, out: Path) -> None:
    from slimepo.data.chat import chat_format
    from slimepo.evaluation.answerers import prompt_ids
    from slimepo.evaluation.benchmarks.bench_arena import ArenaHard, need_tokenizer
    from slimepo.evaluation.judge.many import PROBE, check_judge
    from slimepo.evaluation.libraries import need_libraries
    from slimepo.evaluation.run import STEPS, load_benchmark
    from slimepo.pipeline.data import recipe_tokenizer

    entry = recipe.evaluate[place]
    need_libraries(entry, "", STEPS)
    awaited = _answered_before(recipe, place, out)
    kind = load_benchmark(entry, out / EVAL_FOLDER, judged=entry.judge is not None, awaited=awaited)
    own_judge = entry.judge is not None and _is_to_be_trained(recipe, entry, entry.judge, out)
    if entry.system or own_judge:
        prompt_ids(chat_format(recipe_tokenizer(recipe), recipe.template_options), PROBE)
    if entry.judge is not None and not own_judge:
        check_judge(entry.judge, entry.key_variable)
    if entry.judge is not None and isinstance(kind, ArenaHard):
        need_tokenizer(kind, {})


def _first_run(recipe: Recipe, entry: Evaluation) -> int:
    """The place of the stage after which an entry runs first."""
    return next(i for i, stage in enumerate(recipe.stages) if entry in evaluations_of(recipe, stage.name))


def _answered_before(recipe: Recipe, place: int, out: Path) -> list[str]:
    """The models of this run that the list lets answer the same questions before the entry at `place` first runs."""
    entry = recipe.evaluate[place]
    first = (_first_run(recipe, entry), place)
    return [
        f"{out.resolve().name}-{stage.name}"
        for i, stage in enumerate(recipe.stages)
        for j, other in enumerate(recipe.evaluate)
        if (other.benchmark, other.rules) == (entry.benchmark, entry.rules)
        and other in evaluations_of(recipe, stage.name)
        and (i, j) < first
    ]


def _is_to_be_trained(recipe: Recipe, entry: Evaluation, judge: str, out: Path) -> bool:
    """Whether a local judge is a stage of this run that is trained by the time that it judges, and not there yet."""
    place = Path(judge.removeprefix("hf:")).resolve()
    trained = recipe.stages[: _first_run(recipe, entry) + 1]
    folders = [(out / stage.name).resolve() for stage in trained]
    return not place.exists() and any(place in (folder, folder / "model") for folder in folders)


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
        except (InputError, UnscoredError) as error:
            console.print(f"{stage}: {entry.benchmark} failed: {error}")
            failed.append(error)
    return failed


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
