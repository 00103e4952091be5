"""The rows of a run: read, split into parts, tokenised for a stage."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.checkpoints.identity import digest_of
from slimepo.data.chat import load_tokenizer
from slimepo.data.overlap import found_in
from slimepo.data.read import Rows, all_preferences, left_out_in_words, read_rows, row_notes
from slimepo.data.render import ChatFormat
from slimepo.data.rows import Row
from slimepo.data.split import fingerprint, message_hash, order, row_hash, split
from slimepo.data.tokenize import Tokenized, by_reason, in_words, joined, tokenize_for
from slimepo.errors import InputError
from slimepo.files import is_main_process, write_json
from slimepo.onpolicy.rewards import Prompt
from slimepo.parallel.agree import each_its_share
from slimepo.pipeline.pairs.make import read_pairs
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import Data, Stage
from slimepo.pipeline.rewards import COST
from slimepo.pipeline.tasks import RunTasks, prompt_ids
from slimepo.types import Preference
from slimepo.words import plural

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

SMOKE_ROWS = 200


@dataclass(frozen=True)
class StageRows:
    """Tokenised rows of one stage: those trained on, or prompts that it answers itself, and those only scored; and the
    run's tasks, where it has some."""

    train: Sequence[Row] | Sequence[Prompt]
    heldout: Sequence[Row]
    tasks: RunTasks | None = None


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, or its model's, with the chat template it asks for."""
    name = recipe.tokenizer or recipe.model
    if not isinstance(name, str):
        raise InputError("a random model needs a tokenizer: give tokenizer: FOLDER-or-Hub-id")
    return load_tokenizer(recipe.path(name), recipe.chat_template)


def template_facts(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> dict[str, str]:
    """Names for the chat template with its options, and for the tokens that it is cut into."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = repr((tokenizer.chat_template, sorted(options.items())))
    return {"template": digest_of(template.encode()), "tokens": digest_of(tokens.encode())}


def load_data(recipe: Recipe) -> tuple[dict[str, Sequence[Preference]], dict[str, Any]]:
    """The recipe's rows by part, `heldout` among them (none without a path), and facts worth keeping about them."""
    data = recipe.data

    def read(
        path: str, part: str | None, columns: Mapping[str, str | None], limit: int | None = None
    ) -> tuple[Sequence[Preference], Rows]:
        rows = read_rows(
            recipe.path(path), format=data.format, split=part, skip_bad_rows=data.skip_bad_rows, limit=limit,
            columns=columns,
        )  # fmt: skip
        # An answer judged by itself is a row with one side.
        return all_preferences(rows), rows

    if data.path is None:
        parts: dict[str, Sequence[Preference]] = {}
        facts: dict[str, Any] = {"rows": 0}
    else:
        smoke = SMOKE_ROWS if recipe.smoke else None
        limit = min((each for each in (data.limit, smoke) if each is not None), default=None)
        records, rows = read(data.path, data.split, data.columns, limit)
        parts = {**split(records, recipe.parts, recipe.seed)}
        facts = {"format": rows.format, "rows": len(records), **rows.left_out, "notes": list(row_notes(rows))}
    if data.heldout:
        columns = data.columns if data.heldout_columns is None else data.heldout_columns
        parts["heldout"], rows = read(data.heldout, data.heldout_split, columns)
        facts["heldout_notes"] = [
            f"held out: {note}" for note in (*left_out_in_words(rows.left_out), *row_notes(rows))
        ]
    heldout = parts.get("heldout", [])
    if data.heldout_limit is not None and len(heldout) > data.heldout_limit:
        # By content, so that the order of the file does not matter.
        heldout = heapq.nsmallest(data.heldout_limit, heldout, key=row_hash)
    parts["heldout"] = heldout
    if data.path and not heldout and recipe.parts.get("heldout"):
        prompts = len({message_hash(row.prompt) for row in records})
        facts.setdefault("heldout_notes", []).append(
            f"none of the {facts['rows']} rows is held out, so no pair is scored before and after: rows of one prompt "
            f"stay together, and there are {prompts:,} prompts; give heldout a larger share in data.parts, such as "
            "{preference: 0.7, heldout: 0.3}, or a file of its own (data.heldout)"
        )
    used = sum(len(part) for name, part in parts.items() if name != "heldout" or not data.heldout)
    facts["in_no_part"] = facts["rows"] - used
    facts["parts"] = {
        name: {"rows": len(part), "fingerprint": fingerprint(part), "order": order(part)}
        for name, part in parts.items()
    }
    return parts, facts


def leaks(recipe: Recipe, parts: Mapping[str, Sequence[Preference]], tasks: RunTasks | None) -> Iterator[str]:
    """A sentence where prompts that are held out are trained on too, for pairs and for tasks."""
    heldout = {"row": [(row.source, row.prompt) for row in parts.get("heldout", ())]}
    heldout["task"] = [(task.id, task.prompt) for task in tasks.heldout] if tasks else []
    for what, held in heldout.items():
        trained = (
            row.prompt for name in {stage.part for stage in recipe.stages} for row in parts.get(name, ())
        )
        asked = (task.prompt for task in (tasks.train if tasks else ()))
        if held and (found := found_in((prompt for _, prompt in held), chain(trained, asked))):
            yield (
                f"{len(found):,} of {plural(len(held), f'held-out {what}')} {'has' if len(found) == 1 else 'have'} a "
                "prompt that is trained on too (system messages, letter case, blanks and the last punctuation aside) "
                f"and so tests nothing new; the first, {held[found[0]][0]}"
            )


def stage_rows(
    recipe: Recipe,
    stage: Stage,
    parts: Mapping[str, Sequence[Preference]],
    tasks: RunTasks | None,
    chat: ChatFormat,
    out: Path,
    console: Console,
) -> StageRows:
    """Tokenise what a stage needs; every dropped row is counted, shown and written to the run folder.

    Held out are the pairs of held-out tasks for a stage that trains on pairs of the run's own, else the data's.

    Raises:
        InputError: no row is left.
    """
    from slimepo.losses import find_objective

    objective = find_objective(stage.loss)
    train_rows, heldout_rows = parts.get(stage.part, []), parts["heldout"]
    if stage.rollouts is not None:
        train_rows = []
    elif stage.part in recipe.pairs:
        by_cost = "weight" in objective.asks and recipe.pairs[stage.part].reward == COST
        train_rows = read_pairs(out / stage.part / "train.jsonl", by_cost=by_cost)
        heldout_rows = read_pairs(out / stage.part / "heldout.jsonl", by_cost=by_cost) or heldout_rows
        # What the model itself has written may hold any token, and is to be learnt from as it is.
        chat = replace(chat, marks=None)
    train: Sequence[Row] | Sequence[Prompt]
    # Of rows that are sampled the log tells how many there were.
    tokens_trained: dict[str, int] = {}
    if stage.rollouts is None:
        pairs = len(objective.positions or ()) > 1
        tokens = _tokenized(train_rows, chat, recipe.data, pairs, objective.judged, console)
        train, left_out, told = tokens.rows, _counts(tokens), in_words(tokens)
        tokens_trained = {"response_tokens": sum(len(ids) for row in tokens.rows for ids in row.responses)}
    else:
        train, left_out = _prompts(tasks, chat, recipe.data)
        told = [f"{count} {reason}" for reason, count in left_out.items()]
    # Held-out demonstrations have one side; pairs are scored on both, whatever the stage trains on.
    compared = any(row.rejected for row in heldout_rows)
    judged = any(row.rejected and not row.chosen for row in heldout_rows)
    heldout = _tokenized(heldout_rows, chat, recipe.data, compared, judged, console)
    part = stage.part if stage.rollouts is None else "tasks"
    for name, kept, drops, words in (
        (part, train, left_out, told),
        ("heldout", heldout.rows, _counts(heldout), in_words(heldout)),
    ):
        console.print(f"{name}: {len(kept):,} rows kept, {sum(drops.values()):,} dropped")
        for line in words:
            console.print(f"  {line}", highlight=False)
    if is_main_process():
        write_json(
            out / stage.name / "data.json",
            {"kept": len(train), "dropped": left_out, "heldout": _counts(heldout), **tokens_trained},
        )
    if not train:
        raise InputError(
            f"stage {stage.name!r}: no row of part {part!r} is left to train on "
            f"({'; '.join(told) or 'the part is empty'})"
        )
    return StageRows(train, heldout.rows, tasks)


def _counts(tokens: Tokenized) -> dict[str, int]:
    return {reason: len(drops) for reason, drops in by_reason(tokens.drops).items()}


def _prompts(tasks: RunTasks | None, chat: ChatFormat, data: Data) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of the tasks for training, and how many were longer than data.max_prompt_length."""
    of_tasks = tasks.train if tasks else []
    ids = prompt_ids(of_tasks, chat)
    most = data.max_prompt_length or data.max_length
    kept = [
        Prompt(task.id, task.prompt, task.row, each)
        for task, each in zip(of_tasks, ids, strict=True)
        if len(each) <= most
    ]
    long = len(of_tasks) - len(kept)
    return kept, {"prompt too long": long} if long else {}


def _tokenized(
    rows: Sequence[Preference], chat: ChatFormat, data: Data, pairs: bool, one_sided: bool, console: Console
) -> Tokenized:
    """The rows' ids, each rank's share of them made by it."""
    with console.status("tokenising") as status:

        def ids(share: Sequence[Preference]) -> Tokenized:
            return tokenize_for(
                share,
                chat,
                data,
                pairs=pairs,
                one_sided=one_sided,
                progress=lambda done, total: status.update(f"tokenising: {done:,}/{total:,}"),
            )

        return joined(each_its_share(rows, ids))
