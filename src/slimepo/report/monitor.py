"""The monitor's file (`monitor.jsonl` of a stage) as curves, warnings, distributions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimepo.report.records import (
    Answer,
    Distribution,
    Sample,
    Warned,
    mapping,
    number,
    number_lines,
    numbers,
)

_PREFIX = "monitor/"


def monitor_lines(watched: Sequence[Any], curve: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """One line of numbers a probe, with the names that the log has for them without `monitor/`.

    Where there is no file, what the log lines themselves hold of it.
    """
    probes = [
        _flat_probe(line) for line in map(mapping, watched) if line.get("kind") in ("probe", "generation")
    ]
    found = number_lines(probes)
    if found:
        return found
    logged = [
        {"step": line["step"]}
        | {k.removeprefix(_PREFIX): v for k, v in line.items() if k.startswith(_PREFIX)}
        for line in curve
    ]
    return [line for line in logged if len(line) > 1]


def warnings_of(watched: Sequence[Any], done: dict[str, Any]) -> tuple[Warned, ...]:
    """Every time a warning came on, from the file, else from stage.json."""
    lines = [line for line in map(mapping, watched) if line.get("kind") == "warning"]
    if not lines:
        kept, stopped = mapping(done.get("monitor")), mapping(mapping(done.get("monitor")).get("stopped"))
        told = [mapping(line) for line in kept.get("warnings") or ()]
        return tuple(_warned(line, _same(line, stopped), number(line.get("gone"))) for line in told)
    return tuple(
        _warned(line, line.get("stops") is True, _gone(lines[at + 1 :], line))
        for at, line in enumerate(lines)
        if line.get("state") != "off"
    )


def _warned(line: dict[str, Any], stops: bool, gone: float | None) -> Warned:
    words, kind = str(line.get("message") or line.get("warning") or ""), str(line.get("warning") or "")
    return Warned(number(line.get("step")), words, stops, gone, kind, str(line.get("set") or ""))


def _same(line: dict[str, Any], stopped: dict[str, Any]) -> bool:
    """Whether a warning is the one that ended the run."""
    return bool(stopped) and all(line.get(key) == stopped.get(key) for key in ("step", "warning", "message"))


def _gone(later: Sequence[dict[str, Any]], warning: dict[str, Any]) -> float | None:
    """The step at which a warning went off again, from the lines behind its own; None where it held to the end."""
    for line in later:
        same = all(line.get(key) == warning.get(key) for key in ("warning", "set"))
        if same and line.get("state") == "off":
            return number(line.get("step"))
    return None


def monitor_distributions(watched: Sequence[Any]) -> dict[str, Distribution]:
    """Rejected tokens in the sample's first and last probe, for a run that was not scored at its end."""
    start = next((line for line in map(mapping, watched) if line.get("kind") == "start"), {})
    probes = [line for line in map(mapping, watched) if line.get("kind") == "probe"]
    edges = [value for value in map(number, start.get("bins") or ()) if value is not None]
    for part in ("heldout", "train"):
        counts = [mapping(probe.get(part)).get("rejected_histogram") for probe in probes]
        whole = [
            c
            for c in counts
            if isinstance(c, list) and len(c) == len(edges) - 1 and None not in map(number, c)
        ]
        if len(whole) > 1:
            return {"rejected_tokens": _without_empty_start(Distribution(edges, whole[0], whole[-1]))}
    return {}


def _without_empty_start(shape: Distribution) -> Distribution:
    """The monitor's bins reach further down than most models do."""
    both = [was + now for was, now in zip(shape.before, shape.after, strict=True)]
    first = next((at for at, count in enumerate(both) if count), 0)
    return Distribution(shape.edges[first:], shape.before[first:], shape.after[first:])


def monitor_samples(watched: Sequence[Any]) -> tuple[Sample, ...]:
    """The probe's prompts with the answers of the first and the last time they were asked."""
    start = next((line for line in map(mapping, watched) if line.get("kind") == "start"), {})
    asked = [line for line in map(mapping, watched) if line.get("kind") == "generation"]
    # Asked once only, before the first step, a run that was killed has no answers of its own.
    before, after = (
        [line for line in asked if bool(number(line.get("step"))) is later] for later in (False, True)
    )
    ends = {name: each[-1] for name, each in {"before": before, "after": after}.items() if each}
    samples = []
    for at, prompt in enumerate(map(mapping, start.get("prompts") or ())):
        given = {name: (line.get("answers") or [])[at : at + 1] for name, line in ends.items()}
        answers = tuple(_answer(name, mapping(each[0])) for name, each in given.items() if each)
        if prompt.get("text") and answers:
            samples.append(Sample(str(prompt["text"]), answers))
    return tuple(samples)


def _answer(name: str, given: dict[str, Any]) -> Answer:
    valid, finished = given.get("valid"), given.get("finished")
    return Answer(
        name,
        str(given.get("text") or ""),
        valid=valid if isinstance(valid, bool) else None,
        finished=finished if isinstance(finished, bool) else None,
    )


def _flat_probe(line: dict[str, Any]) -> dict[str, Any]:
    if line.get("kind") == "generation":
        told = {
            f"generation/{key}": value
            for key, value in numbers(line).items()
            if key not in ("step", "seconds")
        }
        return {"step": line.get("step")} | told
    flat = {"step": line.get("step")}
    for part in ("train", "heldout", "gradient_share"):
        figures = mapping(line.get(part))
        flat |= {f"{part}/{key}": value for key, value in numbers(figures).items()}
        past = figures.get("past_margin")
        if isinstance(past, list) and len(past) == 3:
            flat |= {f"{part}/past_soft_margin": past[1], f"{part}/past_hard_margin": past[2]}
    ratios = [
        value
        for value in map(number, mapping(line.get("entanglement")).get("ratio") or ())
        if value is not None
    ]
    return flat | ({"entanglement": sum(ratios) / len(ratios)} if ratios else {})
