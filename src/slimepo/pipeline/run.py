"""A whole recipe: data, then stage after stage, each starting from a model that one before it exported."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from slimepo.data.chat import chat_format
from slimepo.data.read import left_out_in_words
from slimepo.data.render import ChatFormat
from slimepo.errors import InputError, NonFiniteLossError, Preempted, ResourceError, failure
from slimepo.files import is_main_process, read_json, write_json, write_text
from slimepo.losses.table import weighs_rows
from slimepo.model.load import load_config, random_config
from slimepo.model.quantize import refuse_no_bitsandbytes
from slimepo.model.sizes import parameters_of
from slimepo.onpolicy.vllm import check_server
from slimepo.parallel.agree import on_main
from slimepo.pipeline.data import leaks, load_data, recipe_tokenizer, stage_rows, template_facts
from slimepo.pipeline.evaluate import check_evaluations, evaluate_stage
from slimepo.pipeline.folder import (
    check_folder,
    claim_folder,
    held,
    record_end,
    record_settings,
    stage_result,
)
from slimepo.pipeline.pairs.make import make_pairs
from slimepo.pipeline.recipe.arguments import stage_arguments
from slimepo.pipeline.recipe.read import load_recipe
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import RandomModel, Stage
from slimepo.pipeline.remote.push import check_push_of, push_run
from slimepo.pipeline.remote.standin import with_stand_ins
from slimepo.pipeline.rewards import COST, check_rewards, reward_weights
from slimepo.pipeline.stage import run_stage
from slimepo.pipeline.start import exported_model, stage_base
from slimepo.pipeline.tasks import RunTasks, load_tasks
from slimepo.redaction import redact
from slimepo.settings import dump
from slimepo.terminal import make_console
from slimepo.training.prepare import refuse_ranks
from slimepo.types import REFERENCE_SOURCES, Preference
from slimepo.words import nearest, plural

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.training.config import PreferenceConfig


def run_recipe(
    recipe: Recipe, out: Path, console: Console, *, restart: bool = False, accept: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Run every stage of every seed that is not done yet and return the figures of all of them.

    accept: differences from what the folder's run was begun with that may be, each by the name that is refused.

    A stage whose loss stops being finite hides no other: what does not need its model runs first.

    Raises:
        InputError: wrong input of any kind, found before a model is loaded where it can be. A benchmark that failed
            is raised when all stages are done; the same command then tries it again.
        NonFiniteLossError: of the first stage that it happened to.
    """
    recipe = with_stand_ins(recipe, console)
    runs = runs_of(recipe, out)
    results: list[dict[str, Any]] = []
    failed: list[Exception] = []
    with ending_on_term(), ExitStack() as locks:
        # The ranks know each other from here on: what the first one refuses ends them all.
        arguments = [
            {stage.name: stage_arguments(run, stage, folder / stage.name) for stage in run.stages}
            for run, folder in runs
        ]
        for args in [args for of_run in arguments for args in of_run.values()]:
            refuse_ranks(args)
        ranks = PartialState()
        for _, folder in runs:
            on_main(partial(locks.enter_context, held(folder, console)), ranks)
        for run, folder in runs:
            on_main(partial(check_folder, run, folder, restart, accept), ranks)
            on_main(partial(check_push_of, run, folder), ranks)
        for (run, folder), of_stages in zip(runs, arguments, strict=True):
            if len(runs) > 1:
                console.print(f"seed {run.seed}", style="bold")
            try:
                of_run, failures = _run_stages(run, of_stages, folder, console, accept)
                failures += push_run(run, folder, console)
            except BaseException as error:
                record_end(folder, error)
                raise
            record_end(folder, failures[0] if failures else None, of_run)
            results += of_run
            failed += failures
    if failed:
        raise failed[0]
    return results


@contextmanager
def ending_on_term() -> Iterator[None]:
    """Inside, SIGTERM ends a process as Ctrl-C does: locks are given back, and how it ended is written down.

    While a stage trains it has a checkpoint written first (`training.callbacks.SaveOnTerm`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_loop(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run a recipe on this rank of a group that another program has made, such as Ray Train's TorchTrainer.

    Args:
        config: `recipe` and `out`, paths that all ranks see, `overrides` as on the command line, and `smoke`.

    Raises:
        InputError: as of `run_recipe`; and a key that is none, or not there.
    """
    unknown = [key for key in config if key not in ("recipe", "out", "overrides", "smoke")]
    missing = [key for key in ("recipe", "out") if key not in config]
    if unknown or missing:
        what = f"no {missing[0]!r}" if missing else f"the unknown key {unknown[0]!r}"
        raise InputError(f"train_loop's config has {what}; it takes recipe, out, overrides and smoke")
    recipe = load_recipe(
        Path(config["recipe"]), config.get("overrides", []), smoke=config.get("smoke", False)
    )
    return run_recipe(recipe, Path(config["out"]), make_console())


def only_pairs(recipe: Recipe, out: Path, console: Console) -> list[Path]:
    """Make the pairs of a recipe whose models are there, and train nothing; their files, for any run to train on.

    Raises:
        InputError: the recipe has no pairs, or none whose model is there.
    """
    if not recipe.pairs:
        raise InputError("the recipe makes no pairs: give pairs: {NAME: {}}")
    tasks, chat = load_tasks(recipe), chat_format(recipe_tokenizer(recipe), recipe.template_options)
    assert tasks is not None
    files = []
    with held(out, console):
        check_folder(recipe, out, restart=False)
        claim_folder(recipe, out, {**(read_json(out / "data.json") or {}), "tasks": tasks.facts}, console)
        for name, made in recipe.pairs.items():
            if made.reward not in (None, COST):
                check_rewards(reward_weights(made.reward), bool(recipe.tasks and recipe.tasks.checker))
            if made.model is not None and read_json(out / made.model / "stage.json") is None:
                console.print(f"{name}: left out, for stage {made.model} is not done")
                continue
            model = str(exported_model(out / made.model)) if made.model else str(recipe.model)
            record_settings(recipe, out, name)
            make_pairs(recipe, name, model, tasks, chat, out / name, console)
            files.append(out / name / "train.jsonl")
    if not files:
        raise InputError(f"no stage that the pairs are samples of is done in {out}: slimepo run comes first")
    return files


def runs_of(recipe: Recipe, out: Path) -> list[tuple[Recipe, Path]]:
    """The recipe of each seed with its run folder: `out` itself, with several seeds `out/seed-N`."""
    if len(recipe.seeds) > 1:
        return [
            (recipe.model_copy(update={"seed": seed, "seeds": []}), out / f"seed-{seed}")
            for seed in recipe.seeds
        ]
    return [(recipe.model_copy(update={"seed": [*recipe.seeds, recipe.seed][0], "seeds": []}), out)]


def _load(
    recipe: Recipe, pending: Sequence[Stage], out: Path, console: Console, accept: Collection[str]
) -> tuple[RunTasks | None, dict[str, Sequence[Preference]], ChatFormat]:
    """Tasks, rows and chat format of stages that are not done, after a look at all that these need."""
    if recipe.quantize is not None:
        refuse_no_bitsandbytes()
    for stage in pending:
        check_stage(recipe, stage)
    if not recipe.smoke:
        on_main(lambda: check_space(recipe, len(pending), out), PartialState())
    tasks, (parts, facts) = load_tasks(recipe), load_data(recipe)
    for stage in pending:
        check_weights(stage, parts.get(stage.part, ()))
    chat = chat_format(recipe_tokenizer(recipe), recipe.template_options)
    facts |= template_facts(chat.tokenizer, recipe.template_options)
    facts |= {"tasks": tasks.facts} if tasks else {}
    facts["heldout_notes"] = [*facts.get("heldout_notes", ()), *leaks(recipe, parts, tasks)]
    on_main(lambda: claim_folder(recipe, out, facts, console, accept), PartialState())
    _announce(recipe, chat, facts, tasks, console)
    return tasks, parts, chat


def _run_stages(
    recipe: Recipe,
    arguments: Mapping[str, PreferenceConfig],
    out: Path,
    console: Console,
    accept: Collection[str] = (),
) -> tuple[list[dict[str, Any]], list[Exception]]:
    """The figures of every stage, and what went wrong on the way."""
    check_evaluations(recipe, out)
    pending = [stage for stage in recipe.stages if stage_result(out / stage.name) is None]
    if pending:
        tasks, parts, chat = _load(recipe, pending, out, console, accept)
    if is_main_process():
        # What may have changed beside the stages that are done, a judge, say, is written down too.
        write_text(out / "recipe.yaml", dump(recipe))
    results: list[dict[str, Any]] = []
    broken: dict[str, Exception] = {}
    failed: list[Exception] = []
    for stage in recipe.stages:
        folder, base = out / stage.name, stage_base(recipe, stage, out)
        done = stage_result(folder)
        missing = [name for name in recipe.needs(stage) if name in broken]
        if done is not None:
            console.print(f"{stage.name}: done before, {done['steps']} steps")
            results.append(done)
        elif missing:
            console.print(f"{stage.name}: left out, for {missing[0]} has no model")
            broken[stage.name] = broken[missing[0]]
            continue
        else:
            if stage.part in recipe.pairs and tasks is not None:
                sampled = recipe.pairs[stage.part].model
                model = str(exported_model(out / sampled)) if sampled else str(recipe.model)
                record_settings(recipe, out, stage.part)
                make_pairs(recipe, stage.part, model, tasks, chat, out / stage.part, console)
            record_settings(recipe, out, stage.name)
            rows = stage_rows(recipe, stage, parts, tasks, chat, out, console)
            if is_main_process():
                (folder / "error.json").unlink(missing_ok=True)
            try:
                args = arguments[stage.name]
                results.append(run_stage(recipe, stage, args, base, rows, chat, folder, console, accept))
            except Preempted:
                raise
            except Exception as error:
                # Whatever breaks a stage is left in its folder for the report, if the disk takes it.
                if is_main_process():
                    with suppress(OSError):
                        write_json(folder / "error.json", {"error": redact(failure(error).words)})
                if not isinstance(error, NonFiniteLossError):
                    raise
                console.print(f"{stage.name}: {error}", style="red")
                broken[stage.name] = error
                continue
        failed += evaluate_stage(recipe, stage.name, out, console)
    return results, [*dict.fromkeys(broken.values()), *failed]


def check_space(recipe: Recipe, stages: int, out: Path) -> None:
    """Refuse a disk without room for the least that so many stages leave: models, and a checkpoint of all weights.

    Raises:
        ResourceError: with what is needed and what is free.
    """
    if isinstance(recipe.model, RandomModel):
        config = random_config(recipe.model.architecture, recipe.model.sizes, recipe_tokenizer(recipe))
    else:
        config = load_config(recipe.model)
    try:
        size = parameters_of(config) * (2 if recipe.export_dtype == "bfloat16" else 4)
    except InputError:
        return  # No model comes of it here; whoever loads it will say why, or loads it in another way.
    needed = size * (stages + (recipe.adapter is None))
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    if free < needed:
        raise ResourceError(
            f"--out {out}: models take {needed / 2**30:,.2f} GiB at the least, {free / 2**30:,.2f} GiB are free; "
            "make room, or give a folder on another disk"
        )


def check_stage(recipe: Recipe, stage: Stage) -> None:
    """Refuse, before anything trains, what a stage asks for and cannot have.

    Raises:
        InputError: its reference, its objective's side information, its rewards and costs, or the server that samples.
    """
    check_reference(recipe, stage)
    checker = bool(recipe.tasks and recipe.tasks.checker)
    asked = recipe.pairs.get(stage.part)
    made = asked.reward if asked else None
    if asked and asked.engine.startswith("http") and not recipe.smoke:
        check_server(asked.rollouts)
    if asked and made != COST and weighs_rows(stage.loss):
        raise InputError(
            f"stage {stage.name!r}: {stage.loss} weighs pairs by their costs, and pairs {stage.part!r} have none: "
            f"give tasks.cost and pairs.{stage.part}.reward=cost"
        )
    if stage.rollouts is not None or made not in (None, COST):
        check_rewards(reward_weights(stage.reward if made is None else made), checker)
    if stage.rollouts is not None and stage.rollouts.cost is not None:
        check_rewards(reward_weights(stage.rollouts.cost.of, "cost"), checker, "cost")


def check_weights(stage: Stage, rows: Sequence[Preference]) -> None:
    """Refuse, before anything trains, rows of a file that all have the weight 1 where the stage's loss goes by it.

    Raises:
        InputError: with what to give.
    """
    if rows and weighs_rows(stage.loss) and all(row.weight == 1 for row in rows):
        raise InputError(
            f"stage {stage.name!r}: {stage.loss} weighs pairs by their costs, and no row of part {stage.part!r} has a "
            "weight but 1: give the column `weight`, or use simpo"
        )


def check_reference(recipe: Recipe, stage: Stage) -> None:
    """Refuse, before anything trains, a reference that is nothing.

    Raises:
        InputError: it is no source, no stage before this one and no model that can be found.
    """
    before = recipe.before(stage)
    if stage.reference in (*REFERENCE_SOURCES, *before):
        return
    try:
        load_config(stage.reference)
    except InputError as error:
        known = f"none of {', '.join(REFERENCE_SOURCES)}, no stage before it ({', '.join(before) or 'there is none'})"
        hint = nearest(stage.reference, [*before, *REFERENCE_SOURCES])
        raise InputError(
            f"stage {stage.name!r}: reference {stage.reference!r} is {known}{hint}, and as another model: {error}"
        ) from error


def _announce(
    recipe: Recipe, chat: ChatFormat, facts: dict[str, Any], tasks: RunTasks | None, console: Console
) -> None:
    if recipe.data.path is not None:
        parts = ", ".join(f"{name} {part['rows']:,}" for name, part in facts["parts"].items())
        console.print(
            f"{plural(facts['rows'], 'row')} ({facts['format']}) from {recipe.path(recipe.data.path)}: {parts}"
        )
    if facts["in_no_part"] > 0:
        console.print(f"{facts['in_no_part']:,} rows are in no part of data.parts")
    for sentence in left_out_in_words(facts):
        console.print(sentence)
    if tasks is not None:
        console.print(f"tasks: {len(tasks.train):,} for training, {len(tasks.heldout):,} held out")
    for note in (*chat.notes, *facts.get("notes", ()), *facts["heldout_notes"], *unread(recipe)):
        console.print(f"note: {note}", highlight=False)


def unread(recipe: Recipe) -> list[str]:
    """What of the recipe this run makes nothing of; said, not refused, for `slimepo pairs` and sweeps may."""
    notes = []
    for stage in recipe.stages:
        usual = Stage.model_validate({"loss": stage.loss}).epochs
        if stage.max_steps > 0 and stage.epochs != usual:
            notes.append(
                f"{stage.name}: it takes max_steps = {stage.max_steps:,}, whatever epochs = {stage.epochs:g} is"
            )
    parts = {stage.part for stage in recipe.stages}
    notes += [
        f"pairs {name!r}: no stage trains on them, so they are not made"
        for name in recipe.pairs
        if name not in parts
    ]
    sampling = any(stage.rollouts is not None for stage in recipe.stages)
    if recipe.tasks and recipe.tasks.train and not sampling and not parts & recipe.pairs.keys():
        notes.append(
            "tasks.train: nothing answers them, for no stage has rollouts or trains on pairs of samples"
        )
    return notes
