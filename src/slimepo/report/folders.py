"""Folders to a report: what runs and evaluations have left behind, also half-way, and what a page is made from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.evaluation.score_files import read_scores
from slimepo.files import MARKER, read_json
from slimepo.pipeline.folder import STATUS
from slimepo.report import tables
from slimepo.report.benchmarks import ScoreColumn, score_columns
from slimepo.report.groups import Group, group_records
from slimepo.report.records import Source, mapping, numbers, unique
from slimepo.report.stages import led_to, stage_record
from slimepo.settings import read_mapping

# What a sweep keeps beside its arms: starts that they share, and worlds.
_NO_ARMS = ("shared", "world")


@dataclass(frozen=True)
class Report:
    """What a page is made from: the folders as they were given, and their runs grouped over seeds.

    `name` is that of the one folder given, empty where there are several. `searches` are what sweeps tried before their
    seeds, by the folder's name.
    """

    sources: tuple[Source, ...]
    groups: tuple[Group, ...]
    name: str = ""
    searches: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model and the data, where all runs share them; else the run's name, or how many runs there are."""
        recipes = [mapping(source.recipe) for source in self.sources if source.records]
        models = {_last(recipe.get("model")) for recipe in recipes} - {""}
        data = {_last(mapping(recipe.get("data")).get("path")) for recipe in recipes} - {""}
        if len(models) == 1 and len(data) <= 1:
            return " on ".join((*models, *data))
        if self.name:
            return self.name
        return f"slimepo report: {self.runs} runs" if self.runs else "slimepo report"

    @property
    def runs(self) -> int:
        """Runs on the page, each seed counted."""
        return sum(len(group.records) for group in self.groups)

    @property
    def counted(self) -> str:
        """How many runs are on the page; where there is none, how many scores of how many models."""
        models = [score.model for column in self.scores for score in column.scores]
        told = {"score": len(models), "model": len(set(models))}
        if self.runs or not models:
            told = {"run": self.runs}
        return " of ".join(f"{number} {what}{'' if number == 1 else 's'}" for what, number in told.items())

    @cached_property
    def results(self) -> tables.Table:
        """What training did to held-out data."""
        return tables.results(self.groups, self.sources)

    @cached_property
    def scores(self) -> list[ScoreColumn]:
        """The benchmarks' columns."""
        return score_columns(self.sources)


def read_report(paths: Sequence[Path]) -> Report:
    """Read every folder.

    Raises:
        InputError: one is no folder of slimepo's, or there is nothing in any of them.
    """
    sources = read_sources(paths)
    groups = group_records([record for source in sources for record in source.records])
    found = {path.resolve().name: mapping(read_json(path / "search.json")) for path in paths if path.is_dir()}
    searches = {name: search for name, search in found.items() if search}
    return Report(tuple(sources), tuple(groups), next(iter(found), "") if len(paths) == 1 else "", searches)


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Every folder read, one of seeds as its runs; records with the same name get their folder's as well.

    Raises:
        InputError: a folder is none of slimepo's, or there is nothing in any of them.
    """
    sources = []
    for path in paths:
        # A run has its recipe beside its mark; a folder of seeds, or of a sweep, has runs in it.
        inside = () if (path / "recipe.yaml").exists() else ("seed-*", "*/seed-*")
        found = [file.parent for place in inside for file in path.glob(f"{place}/{MARKER}")]
        runs = [run for run in found if run.parent.name not in _NO_ARMS]
        # Seed 2 stands before seed 10.
        runs.sort(key=lambda run: (run.parent.name, len(run.name), run.name))
        sources += [read_source(each) for each in runs or [path]]
    records = [record for source in sources for record in source.records]
    begun = any(record.curve or record.state != "unfinished" for record in records)
    if not begun and not any(source.scores for source in sources):
        raise InputError(
            f"{', '.join(map(str, paths))}: nothing in it yet; a report needs a run that has logged a line"
        )
    # Of one run the stages alone tell its records apart.
    alone = len(sources) == 1 and len(records) > 1
    names = [record.stage if alone else record.name for record in records]
    folders = [source.path.resolve().parent.name for source in sources for _ in source.records]
    told_apart = [
        name if names.count(name) < 2 else f"{folder}/{name}"
        for name, folder in zip(names, folders, strict=True)
    ]
    labels = iter(unique(told_apart))
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
        return replace(_read_run(path), scores=scores)
    if runs := sorted(file.parent for file in path.glob(f"*/{MARKER}")):
        raise InputError(f"report {path}: a folder of runs; name them, such as {runs[0]}, or {path}/*")
    if scores:
        return Source(path, scores=scores)
    if (path.parent / MARKER).exists():
        raise InputError(f"report {path}: a part of the run {path.parent}; give {path.parent}")
    raise InputError(
        f"report {path}: not a run folder (of slimepo run, train or quickstart) and no scores of slimepo eval in it"
    )


def _read_run(path: Path) -> Source:
    recipe = read_mapping(path / "recipe.yaml", "recipe") if (path / "recipe.yaml").exists() else {}
    stages = [mapping(stage) for stage in recipe.get("stages") or ()]
    names = [str(stage.get("name") or "") for stage in stages]
    files = ("stage.json", "metrics.jsonl", "error.json")
    begun = [at for at, name in enumerate(names) if any((path / name / file).exists() for file in files)]
    # Supervised training that others start from is not what a report compares, unless there is nothing else yet.
    started = {place for at in begun for place in led_to(stages, at)}
    shown = [at for at in begun if at not in started or stages[at].get("loss") != "sft"]
    shown = shown or [*begun] or list(range(len(stages)))[:1]
    waiting = [at for at in range(len(stages)) if at not in begun]
    ended = mapping(read_json(path / STATUS)).get("status") in ("done", "stopped")
    done = all((path / names[at] / "stage.json").exists() for at in begun)
    # A run that was cut short between two stages, or is between them now.
    between = bool(begun and waiting) and done and not ended
    shown += waiting[:1] if between else []
    pairs = {name: mapping(read_json(path / name / "pairs.json")) for name in mapping(recipe.get("pairs"))}
    others = [names[at] for at in begun if at not in shown]
    times = {name: mapping(read_json(path / name / "stage.json")).get("seconds") for name in others}
    times |= {f"{name} (pairs)": facts.get("seconds") for name, facts in pairs.items()}
    records = [stage_record(path, recipe, at, len(shown) > 1) for at in shown]
    if between and waiting[1:]:
        behind = f"{len(waiting) - 1} more stage{'' if len(waiting) == 2 else 's'} behind it"
        records[-1] = replace(records[-1], note=f"{records[-1].note}; {behind}")
    return Source(
        path,
        tuple(records),
        data=mapping(read_json(path / "data.json")),
        versions={key: str(value) for key, value in mapping(read_json(path / "versions.json")).items()},
        recipe=recipe,
        pairs={name: facts for name, facts in pairs.items() if facts},
        seconds=numbers(times),
    )


def _last(path: Any) -> str:
    """What a model or a file is called, without its folders; nothing for a random model."""
    if not isinstance(path, str):
        return ""
    *folders, name = re.sub(r"\.(jsonl?|csv|parquet)(\.gz)?$", "", path.rstrip("/")).split("/")
    # Names that many files have say nothing by themselves.
    return "/".join([*folders[-1:], name]) if name in ("train", "pairs", "data", "model") else name
