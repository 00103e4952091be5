"""Reading rows of preference data from files, dataset folders and the Hub."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slimepo.data.columns import ALWAYS_READ, renamed, unread_columns
from slimepo.data.files import SUFFIXES, BadRow, PlacedRow, data_suffix, file_rows
from slimepo.data.formats import FORMATS, convert, known_format, recognise
from slimepo.data.messages import MalformedRow
from slimepo.data.rows import as_preference
from slimepo.data.split import message_hash
from slimepo.data.winners import NoVerdict, Tie, passed_over
from slimepo.errors import InputError
from slimepo.files import Kept
from slimepo.hub import look_for_hub, not_given
from slimepo.types import Preference, Unpaired
from slimepo.words import first_line, nearest_entry, plural

_ROWS_TO_RECOGNISE = 100
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Rows:
    """What was read: records of one kind, the format's name, and `(place, reason)` of each row left out.

    `unread` counts the rows in which a column (or a key of its messages) holds something that is not read;
    `scored_against` are places of rows whose own scores prefer the rejected answer. Left out are `ties`, which prefer
    neither of their answers, and rows `without_verdict`, where nothing says which one is better.
    """

    preferences: Kept[Preference]
    unpaired: Kept[Unpaired]
    format: str
    malformed: list[tuple[str, str]]
    unread: Counter[str] = field(default_factory=Counter)
    scored_against: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    without_verdict: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> dict[str, int]:
        """How many rows were left out, by reason."""
        return {
            "ties": len(self.ties),
            "without_verdict": len(self.without_verdict),
            "malformed": len(self.malformed),
        }


def read_rows(
    source: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Rows:
    """Read a .jsonl, .json, .parquet, .csv or .tsv file (each also .gz), a folder of them, a folder that
    `datasets` saved, or a Hub dataset id.

    `format` is a name of `slimepo.data.formats.FORMATS` or "auto"; `split` picks a part of a folder or Hub
    dataset (default: train); `limit` stops after that many rows; `columns` says which of the file's columns is ours,
    {"prompt": "question"}, or that one is left out, {"label": None}. Raises InputError for anything that cannot
    be read; a malformed row is one too unless `skip_bad_rows`, which collects it in `Rows.malformed`.
    """
    rows = placed_rows(source, split)
    return rows_from(
        rows, name=str(source), format=format, skip_bad_rows=skip_bad_rows, limit=limit, columns=columns or {}
    )


def all_preferences(rows: Rows) -> Sequence[Preference]:
    """Every row that was read as a record with two sides; an answer judged by itself has one of them."""
    if not rows.unpaired:
        return rows.preferences
    return Kept(itertools.chain(rows.preferences, map(as_preference, rows.unpaired)))


def rows_from_records(
    records: Iterable[Mapping[str, Any]],
    *,
    name: str = "dataset",
    format: str = "auto",
    skip_bad_rows: bool = False,
) -> Rows:
    """The same from rows in memory, a `datasets.Dataset` for one; places are `name:row N`, from 1."""
    placed = ((f"{name}:row {index}", row) for index, row in enumerate(records, 1))
    return rows_from(placed, name=name, format=format, skip_bad_rows=skip_bad_rows)


def rows_from(
    placed: Iterable[PlacedRow],
    *,
    name: str,
    format: str,
    skip_bad_rows: bool,
    limit: int | None = None,
    columns: Mapping[str, str | None] = MappingProxyType({}),
) -> Rows:
    """Recognise the format of `(place, row)` pairs and convert every row; `name` is for error messages."""
    rows = itertools.islice(placed, limit)
    head = list(itertools.islice(rows, _ROWS_TO_RECOGNISE))
    if not head:
        raise InputError(f"{name} holds no rows")
    if not skip_bad_rows:
        for place, row in head:
            if isinstance(row, BadRow):
                raise InputError(_stopped(place, row.reason))
    format = (
        _most_fitting([row for _, row in head], columns, name) if format == "auto" else known_format(format)
    )
    raw = [row for _, row in head if not isinstance(row, BadRow)]
    reads = {column for row in raw for column in FORMATS[format].reads(row)}
    if wrong := passed_over(raw, columns, (*reads, *ALWAYS_READ)):
        raise InputError(f"{name}: {wrong}")
    result = Rows(Kept(), Kept(), format, [])
    for place, row in itertools.chain(head, rows):
        try:
            if isinstance(row, BadRow):
                raise MalformedRow(row.reason)
            given, row = row, renamed(row, columns)
            record = convert(row, format, place)
        except Tie as tie:
            (result.without_verdict if tie.blank else result.ties).append(place)
            continue
        except MalformedRow as error:
            if isinstance(error, NoVerdict):
                # To go on without it would read the other numbers of a scale as names.
                raise InputError(f"{place}: {error}") from error
            if not skip_bad_rows:
                raise InputError(_stopped(place, str(error))) from error
            result.malformed.append((place, str(error)))
            continue
        result.unread.update(set(unread_columns(given, row, FORMATS[format].reads(row))))
        if isinstance(record, Unpaired):
            result.unpaired.append(record)
            continue
        result.preferences.append(record)
        if record.scores and record.scores[0] < record.scores[1]:
            result.scored_against.append(place)
    if not result.preferences and not result.unpaired:
        if not result.malformed:
            counts = [plural(len(result.ties), "tie")] * bool(result.ties)
            counts += [f"{len(result.without_verdict):,} without a verdict"] * bool(result.without_verdict)
            raise InputError(f"{name}: no row prefers an answer: {', '.join(counts)}")
        place, reason = result.malformed[0]
        raise InputError(
            f"{name}: none of its rows can be used; the first of {len(result.malformed):,}, {place}: {reason}"
        )
    return result


def _stopped(place: str, reason: str) -> str:
    way_out = "--skip-bad-rows of data check, data.skip_bad_rows=true of a recipe"
    return f"{place}: {reason} (to go on without it: {way_out})"


def _most_fitting(
    rows: list[Mapping[str, Any] | BadRow], columns: Mapping[str, str | None], name: str
) -> str:
    """The format that most of the first rows have, so that no one row decides for the others."""
    votes: Counter[str] = Counter()
    first_error: Exception | None = None
    for row in rows:
        if isinstance(row, BadRow):
            continue
        try:
            votes[recognise(renamed(row, columns), row)] += 1
        except Tie as tie:
            votes[recognise(tie.row, row)] += 1
        except (InputError, MalformedRow) as error:
            first_error = first_error or error
    if votes:
        return max(FORMATS, key=votes.__getitem__)
    if first_error is None:
        bad = next(row.reason for row in rows if isinstance(row, BadRow))
        raise InputError(f"{name}: none of the first {len(rows)} rows can be parsed; the first: {bad}")
    raise InputError(f"{name}: {first_error}") from first_error


def left_out_in_words(counts: Mapping[str, Any]) -> list[str]:
    """A sentence for each reason of `Rows.left_out` that there were rows for; other keys are passed over."""
    told = {
        "ties": ("tie", "left out, in which neither answer is preferred"),
        "without_verdict": ("row", "left out, in which nothing says which answer is better"),
        "malformed": ("malformed row", "skipped"),
    }
    return [f"{plural(counts[key], noun)} {what}" for key, (noun, what) in told.items() if counts.get(key)]


def row_notes(rows: Rows) -> Iterator[str]:
    """Columns that were not read, answers judged all alike, and pairs that contradict themselves or each other."""
    if rows.unread:
        columns = ", ".join(f"{name} ({count:,})" for name, count in sorted(rows.unread.items()))
        yield f"columns that were not read (rows that have them): {columns}"
    labels = {row.label for row in rows.unpaired}
    if len(labels) == 1:
        what = "desirable" if labels == {True} else "undesirable"
        yield f"every judged answer ({len(rows.unpaired):,}) is {what}: nothing is there to tell them from"
    if rows.scored_against:
        yield (
            f"rows that score their rejected answer higher than the chosen one: {len(rows.scored_against):,}; the "
            f"first, {rows.scored_against[0]}"
        )
    seen: set[tuple[str, str, str]] = set()
    turned: list[str] = []
    for row in rows.preferences:
        if row.rejected:
            prompt, chosen, rejected = (
                message_hash(row.prompt),
                message_hash(row.chosen),
                message_hash(row.rejected),
            )
            if chosen != rejected and (prompt, rejected, chosen) in seen:
                turned.append(row.source)
            seen.add((prompt, chosen, rejected))
    if turned:
        yield (
            f"pairs that stand there the other way round too (A preferred to B, and B to A): {len(turned):,}; the "
            f"first, {turned[0]}"
        )


# --- where rows come from ----------------------------------------------------------------------------


def placed_rows(source: str | Path, split: str | None) -> Iterator[PlacedRow]:
    """The rows of a source as they stand there, each with its place."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_rows(path, split)
    if path.is_file():
        if split is not None:
            raise InputError(f"{source} is one file and has no splits; leave out split '{split}'")
        return file_rows(path)
    text = str(source)
    is_file_name = data_suffix(path) is not None or path.suffix == ".gz"
    if _HUB_ID.fullmatch(text) and not is_file_name:
        return _hub_rows(text, split)
    raise InputError(f"no file or folder {source}{nearest_entry(path)}")


# --- folders and the Hub -----------------------------------------------------------------------------


def _folder_rows(folder: Path, split: str | None) -> Iterator[PlacedRow]:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_rows(folder, split)
    splits = {name: list(map(Path, paths)) for name, paths in _data_files(folder).items()}
    files = {name: part for paths in splits.values() for name, part in _shards(paths).items()} | splits
    if split not in files:
        read = {path.resolve() for paths in splits.values() for path in paths}
        if left := [path for path in _data_paths(folder) if path.resolve() not in read]:
            raise InputError(
                f"{folder} holds {left[0].relative_to(folder)}, which is in no split as datasets names them "
                f"({', '.join(splits)}); choose one of those with split, or give the file"
            )
        split = _pick_split(list(splits), split, str(folder))
        if len(parts := _shards(splits[split])) > 1:
            raise InputError(
                f"{folder} has for the split '{split}' several files that are no shards of one: {', '.join(parts)} "
                f"(choose one with split, or {split} for all of them)"
            )
    return itertools.chain.from_iterable(map(file_rows, files[split]))


def _data_paths(folder: Path) -> list[Path]:
    """The folder's data files, hidden ones aside."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and data_suffix(path)]
    return [
        path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _shards(paths: list[Path]) -> dict[str, list[Path]]:
    """Files by their names without numbers (train_prefs-00000-of-00002): the shards of one table together."""
    root = Path(os.path.commonpath([path.parent for path in paths]))
    grouped: dict[str, list[Path]] = {}
    for path in paths:
        stem = path.relative_to(root).as_posix().partition(data_suffix(path) or ".")[0]
        grouped.setdefault(re.sub(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?$", "", stem), []).append(path)
    return grouped


def _data_files(folder: Path) -> Mapping[str, Sequence[str]]:
    """The folder's files by split, under the names that `datasets` gives the splits."""
    if not _data_paths(folder):
        raise InputError(f"{folder} holds no data: no {', '.join(SUFFIXES)} file and no saved dataset")
    from datasets import load_dataset_builder

    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = load_dataset_builder(str(folder), cache_dir=cache)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} cannot be read as a dataset: {first_line(error)}; give one of its files"
        ) from error
    found: Mapping[str, Sequence[str]] = {
        str(name): paths for name, paths in builder.config.data_files.items()
    }
    return found


def _saved_rows(folder: Path, split: str | None) -> Iterator[PlacedRow]:
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a readable saved dataset: {first_line(error)}") from error
    return _dataset_rows(data, split, str(folder))


def _hub_rows(name: str, split: str | None) -> Iterator[PlacedRow]:
    from datasets import load_dataset

    look_for_hub(name)
    try:
        data = load_dataset(name)
    except Exception as error:
        # Of whatever kind: files of many makes are read there.
        hint = nearest_entry(Path(name)) if Path(name).parent.is_dir() else ""
        here = f"'{name}' is no file or folder here{hint}"
        raise InputError(f"{here}, and the Hub does not give it: {not_given(first_line(error))}") from error
    return _dataset_rows(data, split, name)


def _dataset_rows(data: Any, split: str | None, name: str) -> Iterator[PlacedRow]:
    if isinstance(data, dict):
        data = data[_pick_split(list(data), split, name)]
    elif split is not None:
        raise InputError(f"{name} is one table and has no splits; leave out split '{split}'")
    return ((f"{name}:row {index}", row) for index, row in enumerate(data, 1))


def _pick_split(found: list[str], split: str | None, name: str) -> str:
    """The split asked for; else the only one, the one called train, or the only one that starts so (train_prefs)."""
    if split in found:
        return str(split)
    trains = [each for each in found if each == "train"] or [
        each for each in found if each.startswith("train")
    ]
    candidates = found if len(found) == 1 else trains
    if split is None and len(candidates) == 1:
        return candidates[0]
    asked = f"no split '{split}'" if split else "several splits"
    raise InputError(f"{name} has {asked}; there are {', '.join(sorted(found))} (choose one with split)")
