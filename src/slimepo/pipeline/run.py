"""A whole recipe: data, then stage after stage, each starting from a model that one before it exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.data.chat import ChatFormat, chat_format
from slimepo.errors import InputError
from slimepo.files import read_json
from slimepo.model.load import check_model
from slimepo.pipeline.data import RunData, load_data, recipe_tokenizer, stage_rows
from slimepo.pipeline.evaluate import check_evaluations, evaluate_stage
from slimepo.pipeline.folder import check_folder, claim_folder
from slimepo.pipeline.recipe import RandomModel, Recipe, Stage
from slimepo.pipeline.stage import (
    exported_model,
    failure_on_record,
    run_stage,
    stage_arguments,
)
from slimepo.training.reference import SOURCES
from slimepo.words import nearest

if TYPE_CHECKING:
    from rich.console import Console


def run_recipe(recipe: Recipe, out: Path, console: Console, *, restart: bool = False) -> list[dict[str, Any]]:
    """Run every stage that is not done yet and return the figures of all of them.

    Raises:
        InputError: wrong input of any kind, found before a model is loaded where it can be. A benchmark that failed
            is raised when all stages are done; the same command then tries it again.
    """
    check_folder(recipe, out, restart)
    for stage in recipe.stages:
        stage_arguments(recipe, stage, out / stage.name)
    check_evaluations(recipe, out)
    results: list[dict[str, Any]] = []
    pending = [stage for stage in recipe.stages if read_json(out / stage.name / "stage.json") is None]
    for stage in pending:
        check_reference(recipe, stage)
    if pending:
        data = load_data(recipe)
        tokenizer = recipe_tokenizer(recipe)
        chat = chat_format(tokenizer, recipe.template_options)
        claim_folder(recipe, out, data.facts, console)
        _announce(recipe, chat, data, console)
    base: str | RandomModel = recipe.model
    exported: dict[str, str] = {}
    failed: list[Exception] = []
    for stage in recipe.stages:
        base = base if stage.start is None else exported[stage.start]
        done = read_json(out / stage.name / "stage.json")
        if done is not None:
            console.print(f"{stage.name}: done before, {done['steps']} steps")
            results.append(done)
        else:
            rows = stage_rows(recipe, stage, data, chat, out, console)
            ends = {chat.end_id}
            folder = out / stage.name
            with failure_on_record(folder):
                results.append(run_stage(recipe, stage, base, rows, tokenizer, ends, folder, console))
        base = exported[stage.name] = str(exported_model(out / stage.name))
        failed += evaluate_stage(recipe, stage.name, out, console)
    if failed:
        raise failed[0]
    return results


def check_reference(recipe: Recipe, stage: Stage) -> None:
    """Refuse, before anything trains, a reference that is nothing.

    Raises:
        InputError: it is no source, no stage before this one and no model that can be found.
    """
    before = recipe.before(stage)
    if stage.reference in (*SOURCES, *before):
        return
    try:
        check_model(stage.reference)
    except InputError as error:
        raise InputError(
            f"stage {stage.name!r}: reference {stage.reference!r} is none of {', '.join(SOURCES)}, no stage before it "
            f"({', '.join(before) or 'there is none'}){nearest(stage.reference, [*before, *SOURCES])}, and as another "
            f"model: {error}"
        ) from error


def _announce(recipe: Recipe, chat: ChatFormat, data: RunData, console: Console) -> None:
    parts = ", ".join(f"{name} {facts['rows']:,}" for name, facts in data.facts["parts"].items())
    console.print(
        f"{data.facts['rows']:,} rows ({data.facts['format']}) from {recipe.data.path}: {parts}",
    )
    if data.facts["in_no_part"] > 0:
        console.print(f"{data.facts['in_no_part']:,} rows are in no part of data.parts")
    if data.facts["malformed"]:
        console.print(f"{data.facts['malformed']} malformed rows skipped")
    for note in chat.notes:
        console.print(f"note: {note}")
