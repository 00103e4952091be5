"""Answers side by side: what models said to the tasks that are held out, and to the monitor's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from slimepo.report.records import Answer, Sample, Source, mapping

# Tasks shown of a run, over all families.
SHOWN = 24


def task_samples(lines: Sequence[Any]) -> tuple[Sample, ...]:
    """Of a stage's `answers.jsonl` the first tasks of each family, with the answers before and after training."""
    families: dict[str, list[dict[str, Any]]] = {}
    for line in map(mapping, lines):
        families.setdefault(str(line.get("family") or ""), []).append(line)
    each = max(1, SHOWN // max(1, len(families)))
    return tuple(_sample(line) for of_family in families.values() for line in of_family[:each])


def shown_samples(sources: Sequence[Source]) -> list[Sample]:
    """The prompts that runs answered, each with everybody's answer."""
    found: dict[str, Sample] = {}
    for record in (record for source in sources for record in source.records):
        names = {"before": "before training", "after": record.name}
        for sample in record.samples:
            old = found.setdefault(sample.prompt, replace(sample, answers=()))
            told = [replace(answer, run=names[answer.run]) for answer in sample.answers]
            # Runs that started alike gave the same answer before: it is shown once.
            new = tuple(answer for answer in told if answer not in old.answers)
            found[sample.prompt] = replace(old, answers=(*old.answers, *new))
    return list(found.values())


def _sample(line: dict[str, Any]) -> Sample:
    prompt = line.get("prompt")
    turns = [str(mapping(turn).get("content") or "") for turn in prompt] if isinstance(prompt, list) else []
    answers = tuple(
        _answer(when, mapping(line[when])) for when in ("before", "after") if mapping(line.get(when))
    )
    return Sample("\n".join(turns), answers, str(line.get("gold") or ""), str(line.get("family") or ""))


def _answer(run: str, given: dict[str, Any]) -> Answer:
    flags = {key: given[key] for key in ("correct", "valid", "finished") if isinstance(given.get(key), bool)}
    return Answer(run, "" if given.get("text") is None else str(given["text"]), **flags)
