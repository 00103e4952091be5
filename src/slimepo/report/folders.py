"""Folders to records: what runs and evaluations have left behind, also half-way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimepo.errors import InputError
from slimepo.evaluation.canaries import CanaryResult
from slimepo.evaluation.judge.request import scores_of_row
from slimepo.files import json_lines, read_json
from slimepo.pipeline.folder import MARKER, last_checkpoint
from slimepo.report.answers import task_samples
from slimepo.report.monitor import monitor_distributions, monitor_lines, monitor_samples, warnings_of
from slimepo.report.records import (
    Record,
    Scored,
    Source,
    State,
    distributions,
    flat,
    mapping,
    number,
    number_lines,
    numbers,
    unique,
)
from slimepo.settings import read_mapping

# Keys that say what a stage is called or stands behind, not what it did.
_NO_SETTINGS = ("seed", "name", "start")
_UNTOLD = "no end is recorded: still running, or killed"


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
    started = {place for at in begun for place in _led_to(stages, at)}
    shown = [at for at in begun if at not in started or stages[at].get("loss") != "sft"]
    shown = shown or begun or list(range(len(stages)))[:1]
    records = [_stage_record(path, recipe, stages, at, len(shown) > 1) for at in shown]
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


def _stage_record(
    path: Path, recipe: dict[str, Any], stages: Sequence[dict[str, Any]], at: int, several: bool
) -> Record:
    stage, name = stages[at], str(stages[at].get("name") or "")
    folder = path / name
    done = mapping(read_json(folder / "stage.json"))
    heldout = mapping(done.get("heldout"))
    drops = mapping(read_json(folder / "data.json"))
    lines = json_lines(folder / "metrics.jsonl")
    curve = [line for line in number_lines(lines) if "loss" in line]
    watched = json_lines(folder / "monitor.jsonl")
    state, note = _state(folder, done, watched, curve, stage)
    loss = str(stage.get("loss") or "unknown")
    label = path.resolve().name
    return Record(
        name=f"{label}/{name}" if several else label,
        source=str(path),
        loss=loss,
        series=loss,
        stage=name,
        start=str(stages[led[-1]].get("name") or "") if (led := _led_to(stages, at)) else "",
        settings=_settings(recipe, stages, at),
        seed=int(seed) if (seed := number(recipe.get("seed"))) is not None else None,
        learning_rate=number(stage.get("learning_rate")),
        state=state,
        note=note,
        before=numbers(heldout.get("before")),
        after=numbers(heldout.get("after")),
        chosen_fell=number(heldout.get("chosen_fell")),
        heldout=number(heldout.get("pairs")),
        prompts=number(heldout.get("prompts")),
        curve=curve,
        monitor=monitor_lines(watched, curve),
        warnings=warnings_of(watched, done),
        distributions=distributions(read_json(folder / "distributions.json"))
        or monitor_distributions(watched),
        samples=task_samples(json_lines(folder / "answers.jsonl")) or monitor_samples(watched),
        facts=_facts(done),
        kept=number(drops.get("kept")),
        dropped=numbers(drops.get("dropped")),
        steps=number(done.get("steps")) or (curve[-1]["step"] if curve else None),
        seconds=number(done.get("seconds")),
        peak_memory=number(done.get("peak_memory")),
    )


def _state(
    folder: Path,
    done: dict[str, Any],
    watched: Sequence[Any],
    curve: Sequence[dict[str, float]],
    stage: dict[str, Any],
) -> tuple[State, str]:
    stopped = number(mapping(mapping(done.get("monitor")).get("stopped")).get("step"))
    if stopped is not None:
        planned = next((number(mapping(line).get("steps")) for line in watched), None)
        return "stopped", f"step {stopped:.0f}{'' if planned is None else f' of {planned:.0f}'}"
    if done:
        return "finished", ""
    error = mapping(read_json(folder / "error.json"))
    if error:
        return "failed", str(error.get("error") or "no reason is recorded")
    if not curve:
        return "unfinished", f"nothing is logged yet; {_UNTOLD}"
    step, epoch, epochs = curve[-1]["step"], curve[-1].get("epoch"), number(stage.get("epochs"))
    checkpoint = last_checkpoint(folder / "checkpoints")
    planned = (
        number(mapping(read_json(checkpoint / "trainer_state.json")).get("max_steps")) if checkpoint else None
    )
    if planned:
        where = f"step {step:.0f} of {planned:.0f}"
    elif epoch is not None and epochs:
        where = f"step {step:.0f}, {epoch:.2f} of {epochs:g} epochs"
    else:
        where = f"step {step:.0f}"
    return "unfinished", f"the last line is of {where}; {_UNTOLD}"


def _settings(recipe: dict[str, Any], stages: Sequence[dict[str, Any]], at: int) -> dict[str, Any]:
    """The recipe of a stage, flat: its own keys plain, those of the stages that led to it under their names."""
    whole = flat({key: value for key, value in recipe.items() if key not in ("stages", "seed")})
    led = {str(stages[place].get("name")): _plain(stages[place]) for place in _led_to(stages, at)}
    return {**flat(_plain(stages[at])), **whole, **flat(led)}


def _led_to(stages: Sequence[dict[str, Any]], at: int) -> list[int]:
    """The stages that a stage's model came from: the one before, unless `start` names another."""
    if at == 0:
        return []
    names = [stage.get("name") for stage in stages[:at]]
    start = stages[at].get("start")
    place = names.index(start) if start in names else at - 1
    return [*_led_to(stages, place), place]


def _plain(stage: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key not in _NO_SETTINGS}


def _facts(done: dict[str, Any]) -> dict[str, Any]:
    """What a stage says about how it ran, beside its figures."""
    keys = ("layout", "reference", "parameters", "trained_parameters", "resumed_from_step")
    told = {key: done[key] for key in keys if done.get(key)}
    return told | {"monitor": mapping(done.get("monitor")).get("facts") or []}
