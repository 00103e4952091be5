"""The rows of a run: read, split into parts, tokenised for a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.data.chat import ChatFormat, load_tokenizer
from slimepo.data.read import Rows, read_rows
from slimepo.data.rows import Row, as_preference
from slimepo.data.split import fingerprint, row_hash, split
from slimepo.data.tokenize import tokenize
from slimepo.errors import InputError
from slimepo.files import is_main_process, write_json
from slimepo.pipeline.recipe import Data, Recipe, Stage
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


@dataclass(frozen=True)
class StageRows:
    """Tokenised rows of one stage: those trained on and those only scored."""

    train: Sequence[Row]
    heldout: Sequence[Row]


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
        data.parts[stage.part], chat, recipe.data, len(objective.positions) > 1, objective.judged, console
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
) -> tuple[list[Row], dict[str, int]]:
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


def _say_dropped(console: Console, part: str, kept: int, dropped: dict[str, int]) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    console.print(
        f"{part}: {kept:,} rows kept, {sum(dropped.values())} dropped{f' ({reasons})' if reasons else ''}"
    )
