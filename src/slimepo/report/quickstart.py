"""A quickstart's result as records: a run each, all from one SFT model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimepo.report.monitor import monitor_distributions, monitor_lines, monitor_samples, warnings_of
from slimepo.report.records import (
    Answer,
    Record,
    Sample,
    Source,
    distributions,
    flat,
    mapping,
    number,
    number_lines,
    numbers,
    short_number,
    unique,
)

SFT_START = "SFT start"
# Of the recipe's runs only one's own settings count as its settings.
_OF_ALL_RUNS = ("objectives", "preference.learning_rates", "preference.sweep", "seed")


def quickstart_source(path: Path, result: Any) -> Source:
    """What quickstart.json holds; nothing in it is required."""
    result = mapping(result)
    found = [mapping(run) for run in result.get("runs") or () if isinstance(run, Mapping)]
    labels = unique([_label(run) for run in found])
    records = tuple(
        _record(path, result, run, found, label) for run, label in zip(found, labels, strict=True)
    )
    return Source(
        path,
        "quickstart",
        records,
        versions={key: str(value) for key, value in mapping(result.get("versions")).items()},
        recipe=result.get("recipe"),
        quickstart=result,
    )


def start_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """What the SFT model scored before any run: `sft.metrics`, and the `before` of the runs where they have one."""
    runs = [mapping(run) for run in result.get("runs") or ()]
    before = next((figures for run in runs if (figures := numbers(run.get("before")))), {})
    return {**numbers(mapping(result.get("sft")).get("metrics")), **before}


def samples(result: Mapping[str, Any]) -> list[Sample]:
    """The held-out tasks with every run's judged answer, the SFT model's first."""
    return [_sample(mapping(each)) for each in result.get("samples") or ()]


def _record(
    path: Path,
    result: Mapping[str, Any],
    run: dict[str, Any],
    runs: Sequence[Mapping[str, Any]],
    label: str,
) -> Record:
    options = mapping(run.get("options"))
    rate = number(run.get("learning_rate"))
    recipe = flat(mapping(result.get("recipe")))
    shared = {key: value for key, value in recipe.items() if not key.startswith(_OF_ALL_RUNS)}
    loss = str(options.pop("loss", None) or run.get("objective") or "unknown")
    curve, watched = number_lines(run.get("curve")), run.get("monitor") or ()
    error, seed = str(run.get("error") or ""), number(result.get("seed"))
    return Record(
        name=label,
        source=str(path),
        loss=loss,
        series=_series(run, runs),
        settings={
            "loss": loss,
            **flat({"loss_options": options} if options else {}),
            "learning_rate": rate,
            **shared,
        },
        seed=None if seed is None else int(seed),
        learning_rate=rate,
        state="failed" if error else "finished",
        note=error,
        before=numbers(run.get("before")) or numbers(mapping(result.get("sft")).get("metrics")),
        after=numbers(run.get("after")),
        chosen_fell=number(run.get("chosen_fell")),
        heldout=number(mapping(result.get("pairs")).get("heldout")),
        curve=curve,
        monitor=monitor_lines(watched, curve),
        warnings=warnings_of(watched, run),
        distributions=distributions(run.get("distributions")) or monitor_distributions(watched),
        samples=monitor_samples(watched) if not result.get("samples") else (),
        kept=number(mapping(result.get("pairs")).get("train")),
        steps=number(run.get("steps")) or (curve[-1]["step"] if curve else None),
        seconds=number(run.get("seconds")),
        peak_memory=number(run.get("peak_memory")),
    )


def _label(run: Mapping[str, Any]) -> str:
    return str(
        run.get("name") or f"{run.get('objective') or 'run'} {short_number(number(run.get('learning_rate')))}"
    )


def _series(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """The objective; where runs differ in its options too, the run's name without its learning rate."""
    objective = str(run.get("objective") or mapping(run.get("options")).get("loss") or "unknown")
    stem = _stem(run)
    same = [other for other in runs if other.get("objective") == run.get("objective")]
    if all(other.get("options") == run.get("options") for other in same):
        return objective
    told = ", ".join(f"{key} {value}" for key, value in mapping(run.get("options")).items() if key != "loss")
    stems = {_stem(other) for other in same if other.get("options") != run.get("options")}
    return f"{objective} {told}".strip() if stem in ("", *stems) else stem


def _stem(run: Mapping[str, Any]) -> str:
    return re.sub(r"\s+[\d.]+(e[-+]?\d+)?$", "", str(run.get("name") or ""))


def _sample(raw: dict[str, Any]) -> Sample:
    answers = tuple(
        _answer(SFT_START if name == "sft" else name, mapping(given))
        for name, given in mapping(raw.get("answers")).items()
    )
    return Sample(
        str(raw.get("prompt") or ""), answers, str(raw.get("gold") or ""), str(raw.get("family") or "")
    )


def _answer(run: str, given: dict[str, Any]) -> Answer:
    flags = {key: given[key] for key in ("correct", "valid", "finished") if isinstance(given.get(key), bool)}
    return Answer(run, "" if given.get("text") is None else str(given["text"]), **flags)
