"""Folders to records: what runs and evaluations have left behind, also half-way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.evaluation.canaries import CanaryResult
from slimepo.evaluation.judge.request import scores_of_row
from slimepo.files import read_json
from slimepo.pipeline.folder import MARKER
from slimepo.report.records import Scored, Source, mapping, numbers, unique
from slimepo.report.stages import led_to, stage_record
from slimepo.settings import read_mapping


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Every folder read, one of seeds as its runs; records with the same name get their folder's as well.

    Raises:
        InputError: a folder is none of slimepo's, or there is nothing in any of them.
    """
    sources = [read_source(each) for path in paths for each in _seeds(path) or [path]]
    if len(sources) == 1 and len(sources[0].records) > 1:
        # Of one run the stages alone tell its records apart.
        only = sources[0]
        sources = [replace(only, records=tuple(replace(r, name=r.stage) for r in only.records))]
    if not any(
        record.curve or record.state != "unfinished" for s in sources for record in s.records
    ) and not any(source.scores for source in sources):
        raise InputError(
            f"{', '.join(map(str, paths))}: nothing in it yet; a report needs a run that has logged a line"
        )
    names = [record.name for source in sources for record in source.records]
    labels = iter(unique([_told_apart(r.name, s, names) for s in sources for r in s.records]))
    return [replace(s, records=tuple(replace(r, name=next(labels)) for r in s.records)) for s in sources]


def read_source(path: Path) -> Source:
    """What one folder holds.

    Raises:
        InputError: it is not there, is none of slimepo's folders, or a file in it is broken.
    """
    if not path.is_dir():
        there = "a file; give its folder" if path.exists() else "no such folder"
        raise InputError(f"report {path}: {there}")
    scores = read_scores(path)
    if (path / MARKER).exists():
        return replace(_run_source(path), scores=scores)
    runs = sorted(file.parent for file in path.glob(f"*/{MARKER}"))
    if runs:
        raise InputError(f"report {path}: a folder of runs; name them, such as {runs[0]}, or {path}/*")
    if scores:
        return Source(path, "evaluation", scores=scores)
    if (path.parent / MARKER).exists():
        raise InputError(f"report {path}: a part of the run {path.parent}; give {path.parent}")
    raise InputError(
        f"report {path}: not a run folder (of slimepo run, train or quickstart) and no scores of slimepo eval in it"
    )


def _seeds(path: Path) -> list[Path]:
    """The runs of a folder of seeds, in their order; none where it is no such folder."""
    seeds = [file.parent for file in path.glob(f"seed-*/{MARKER}")] if not (path / MARKER).exists() else []
    return sorted(seeds, key=lambda seed: (len(seed.name), seed.name))


def read_scores(path: Path) -> tuple[Scored, ...]:
    """Every `scores/*.json` in a folder or one or two levels under it, or where the folder is `scores` itself.

    Raises:
        InputError: one holds scores that are not as `slimepo eval` writes them.
    """
    patterns = ["scores/*.json", "*/scores/*.json", "*/*/scores/*.json"]
    patterns += ["*.json"] if path.name == "scores" else []
    found = []
    for file in sorted({file for pattern in patterns for file in path.glob(pattern)}):
        record = mapping(read_json(file))
        rows = [row for row in map(mapping, record.get("scores") or ()) if row]
        if rows:
            found.append(_scored(file, rows, mapping(record.get("canaries"))))
    return tuple(found)


def _scored(file: Path, rows: Sequence[dict[str, Any]], canaries: dict[str, Any]) -> Scored:
    try:
        scores = tuple(scores_of_row(row) for row in rows)
        return Scored(
            file.parent.parent, scores, {n: CanaryResult(**result) for n, result in canaries.items()}
        )
    except (InputError, TypeError) as error:
        raise InputError(f"{file}: no score file of slimepo eval ({error})") from None


def _told_apart(name: str, source: Source, names: Sequence[str]) -> str:
    if names.count(name) < 2:
        return name
    return f"{source.path.resolve().parent.name}/{name}"


def _run_source(path: Path) -> Source:
    recipe = read_mapping(path / "recipe.yaml", "recipe") if (path / "recipe.yaml").exists() else {}
    stages = [mapping(stage) for stage in recipe.get("stages") or ()]
    begun = [at for at, stage in enumerate(stages) if _begun(path / str(stage.get("name")))]
    # Supervised training that others start from is not what a report compares, unless there is nothing else yet.
    started = {place for at in begun for place in led_to(stages, at)}
    shown = [at for at in begun if at not in started or stages[at].get("loss") != "sft"]
    shown = shown or begun or list(range(len(stages)))[:1]
    records = [stage_record(path, recipe, stages, at, len(shown) > 1) for at in shown]
    others = [str(stages[at].get("name")) for at in begun if at not in shown]
    pairs = {name: mapping(read_json(path / name / "pairs.json")) for name in mapping(recipe.get("pairs"))}
    times = {name: mapping(read_json(path / name / "stage.json")).get("seconds") for name in others}
    times |= {f"{name} (pairs)": facts.get("seconds") for name, facts in pairs.items()}
    return Source(
        path,
        "run",
        tuple(records),
        data=mapping(read_json(path / "data.json")),
        versions={key: str(value) for key, value in mapping(read_json(path / "versions.json")).items()},
        recipe=recipe,
        pairs={name: facts for name, facts in pairs.items() if facts},
        seconds=numbers(times),
    )


def _begun(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("stage.json", "metrics.jsonl", "error.json"))
