"""A whole recipe: data, then stage after stage, each starting from a model that one before it exported."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.data.chat import ChatFormat, chat_format, load_tokenizer
from slimepo.data.read import Rows, read_rows
from slimepo.data.rows import as_preference
from slimepo.data.split import fingerprint, row_hash, split
from slimepo.data.tokenize import TokenizedPair, tokenize
from slimepo.errors import InputError
from slimepo.losses.table import nearest
from slimepo.model.load import check_model
from slimepo.pipeline.evaluate import check_evaluations, clear_evaluations, evaluate_stage
from slimepo.pipeline.folder import MARKER, is_main_process, read_json, versions, write_json, write_text
from slimepo.pipeline.recipe import Data, RandomModel, Recipe, Stage
from slimepo.pipeline.stage import (
    StageRows,
    exported_model,
    failure_on_record,
    run_stage,
    stage_arguments,
)
from slimepo.settings import dump
from slimepo.training.reference import SOURCES
from slimepo.types import Preference

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

SMOKE_ROWS = 200


@dataclass(frozen=True)
class RunData:
    """The rows of a run by part, `heldout` among them, and the facts worth keeping about them."""

    parts: dict[str, list[Preference]]
    facts: dict[str, Any]


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
        claim_folder(recipe, out, data, console)
        _announce(recipe, chat, data, console)
    base: str | RandomModel = recipe.model
    exported: dict[str, str] = {}
    failed: list[Exception] = []
    for stage in recipe.stages:
        base = base if stage.start is None else exported[stage.start]
        done = read_json(out / stage.name / "stage.json")
        if done is not None:
            console.print(f"{stage.name}: done before, {done['steps']} steps", highlight=False)
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


def check_folder(recipe: Recipe, out: Path, restart: bool) -> None:
    """Refuse a folder in which something else has been done; with `restart`, clear this run's stages away.

    Raises:
        InputError: the folder holds the run of another recipe, or something that is no run.
    """
    if not is_main_process() or not out.exists() or not any(out.iterdir()):
        return
    if not out.is_dir() or not (out / MARKER).exists():
        raise InputError(f"{out} is not empty and no run of slimepo; give another --out")
    old = (out / "recipe.yaml").read_text(encoding="utf-8")
    stages = [path.parent for path in (*out.glob("*/stage.json"), *out.glob("*/checkpoints"))]
    begun = _begun(out)
    if restart:
        for stage in set(stages):
            shutil.rmtree(stage)
        clear_evaluations(out)
    elif begun and old != dump(recipe):
        raise InputError(
            f"{out} holds a run of another recipe ({_first_difference(old, dump(recipe))}); "
            "give another --out, or --restart to throw that run away"
        )


def claim_folder(recipe: Recipe, out: Path, data: RunData, console: Console) -> None:
    """Write down what runs here: the resolved recipe, the libraries' versions, the data's facts.

    Raises:
        InputError: the run was begun on other data, so that going on would mix the two.
    """
    if not is_main_process():
        return
    begun = _begun(out)
    before = read_json(out / "data.json") if begun else None
    if before is not None and before["parts"] != data.facts["parts"]:
        raise InputError(
            f"{recipe.data.path} has changed since {out} was begun; give another --out, or --restart"
        )
    old: dict[str, str] = (read_json(out / "versions.json") if begun else None) or {}
    new = versions()
    changed = [f"{name} {old[name]} then, {new[name]} now" for name in old if old[name] != new.get(name)]
    if changed:
        console.print(f"note: the run was begun with other versions: {', '.join(changed)}", highlight=False)
    write_text(out / MARKER, "A run of slimepo; see recipe.yaml.\n")
    write_text(out / "recipe.yaml", dump(recipe))
    write_json(out / "versions.json", old or new)
    write_json(out / "data.json", data.facts)


def _begun(out: Path) -> bool:
    """Whether a run has something to go on from; one that failed before its first checkpoint has not."""
    return any(out.glob("*/stage.json")) or any(out.glob("*/checkpoints/checkpoint-*"))


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, or its model's, with the chat template it asks for."""
    name = recipe.tokenizer or recipe.model
    if not isinstance(name, str):
        raise InputError("a random model needs a tokenizer: give tokenizer: FOLDER-or-Hub-id")
    return load_tokenizer(name, recipe.chat_template)


def load_data(recipe: Recipe) -> RunData:
    """Read the recipe's rows and split them."""
    data = recipe.data
    rows = read_rows(
        data.path,
        format=data.format,
        split=data.split,
        skip_bad_rows=data.skip_bad_rows,
        limit=_limit(recipe),
    )
    records = _records(rows)
    parts = split(records, recipe.parts, recipe.seed)
    facts: dict[str, Any] = {
        "format": rows.format,
        "rows": len(records),
        "malformed": len(rows.malformed),
    }
    if data.heldout:
        heldout_rows = read_rows(
            data.heldout, format=data.format, split=data.heldout_split, skip_bad_rows=data.skip_bad_rows
        )
        parts["heldout"] = _records(heldout_rows)
    heldout = parts.get("heldout", [])
    if data.heldout_limit is not None and len(heldout) > data.heldout_limit:
        # By content, so that the order of the file does not matter.
        heldout = sorted(heldout, key=row_hash)[: data.heldout_limit]
    parts["heldout"] = heldout
    unused = len(records) - sum(len(p) for name, p in parts.items() if name != "heldout" or not data.heldout)
    facts["in_no_part"] = unused
    facts["parts"] = {
        name: {"rows": len(part), "fingerprint": fingerprint(part)} for name, part in parts.items()
    }
    return RunData(parts, facts)


def stage_rows(
    recipe: Recipe, stage: Stage, data: RunData, chat: ChatFormat, out: Path, console: Console
) -> StageRows:
    """Tokenise what a stage needs; every dropped row is counted, shown and written to the run folder.

    Raises:
        InputError: no row is left.
    """
    from slimepo.losses import find_objective

    objective = find_objective(stage.loss)
    train, dropped = _tokenized(
        data.parts[stage.part], chat, recipe.data, "rejected" in objective.sides, objective.judged, console
    )
    # Held-out demonstrations have one side; pairs are scored on both, whatever the stage trains on.
    heldout_rows = data.parts["heldout"]
    compared = any(row.rejected for row in heldout_rows)
    judged = any(row.rejected and not row.chosen for row in heldout_rows)
    heldout, heldout_dropped = _tokenized(heldout_rows, chat, recipe.data, compared, judged, console)
    _say_dropped(console, stage.part, len(train), dropped)
    _say_dropped(console, "heldout", len(heldout), heldout_dropped)
    if is_main_process():
        write_json(
            out / stage.name / "data.json",
            {"kept": len(train), "dropped": dropped, "heldout": heldout_dropped},
        )
    if not train:
        reasons = ", ".join(dropped) or "the part is empty"
        raise InputError(
            f"stage {stage.name!r}: no row of part {stage.part!r} is left to train on ({reasons})"
        )
    return StageRows(train, heldout)


def _records(rows: Rows) -> list[Preference]:
    """The rows that were read; an answer judged by itself is one with one side."""
    return [*rows.preferences, *map(as_preference, rows.unpaired)]


def _tokenized(
    rows: Sequence[Preference], chat: ChatFormat, data: Data, pairs: bool, one_sided: bool, console: Console
) -> tuple[list[TokenizedPair], dict[str, int]]:
    """Rows that can be trained on, and how many were dropped for each reason."""
    with console.status("tokenising") as status:
        result = tokenize(
            rows,
            chat,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            cut=data.cut_long_responses,
            pairs=pairs,
            one_sided=one_sided,
            progress=lambda done, total: status.update(f"tokenising: {done:,}/{total:,}"),
        )
    return result.rows, dict(Counter(drop.reason for drop in result.drops))


def _limit(recipe: Recipe) -> int | None:
    limits = [recipe.data.limit, SMOKE_ROWS if recipe.smoke else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _announce(recipe: Recipe, chat: ChatFormat, data: RunData, console: Console) -> None:
    parts = ", ".join(f"{name} {facts['rows']:,}" for name, facts in data.facts["parts"].items())
    console.print(
        f"{data.facts['rows']:,} rows ({data.facts['format']}) from {recipe.data.path}: {parts}",
        highlight=False,
    )
    if data.facts["in_no_part"] > 0:
        console.print(f"{data.facts['in_no_part']:,} rows are in no part of data.parts", highlight=False)
    if data.facts["malformed"]:
        console.print(f"{data.facts['malformed']} malformed rows skipped", highlight=False)
    for note in chat.notes:
        console.print(f"note: {note}", highlight=False)


def _say_dropped(console: Console, part: str, kept: int, dropped: dict[str, int]) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    console.print(
        f"{part}: {kept:,} rows kept, {sum(dropped.values())} dropped{f' ({reasons})' if reasons else ''}"
    )


def _first_difference(old: str, new: str) -> str:
    for before, after in zip(old.splitlines(), new.splitlines(), strict=False):
        if before != after:
            return f"{before.strip()!r} there, {after.strip()!r} now"
    return "one has more keys than the other"
