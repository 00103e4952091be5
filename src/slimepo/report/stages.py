"""A stage of a run: its folder's files (log, monitor, answers, figures) as one record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimepo.files import json_lines, read_json
from slimepo.pipeline.folder import last_checkpoint
from slimepo.report.records import (
    Answer,
    Distribution,
    Record,
    Sample,
    State,
    Warned,
    distributions,
    flat,
    mapping,
    number,
    number_lines,
    numbers,
)

# Keys that say what a stage is called or stands behind, not what it did.
_NO_SETTINGS = ("seed", "name", "start")
_UNTOLD = "no end is recorded: still running, or killed"


def stage_record(
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
        start=str(stages[led[-1]].get("name") or "") if (led := led_to(stages, at)) else "",
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
    led = {str(stages[place].get("name")): _plain(stages[place]) for place in led_to(stages, at)}
    return {**flat(_plain(stages[at])), **whole, **flat(led)}


def _plain(stage: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key not in _NO_SETTINGS}


def _facts(done: dict[str, Any]) -> dict[str, Any]:
    """What a stage says about how it ran, beside its figures."""
    keys = ("layout", "reference", "parameters", "trained_parameters", "resumed_from_step")
    told = {key: done[key] for key in keys if done.get(key)}
    return told | {"monitor": mapping(done.get("monitor")).get("facts") or []}


def led_to(stages: Sequence[dict[str, Any]], at: int) -> list[int]:
    """The stages that a stage's model came from: the one before, unless `start` names another."""
    if at == 0:
        return []
    names = [stage.get("name") for stage in stages[:at]]
    start = stages[at].get("start")
    place = names.index(start) if start in names else at - 1
    return [*led_to(stages, place), place]


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


# Tasks shown of a run, over all families.
SHOWN = 24


def task_samples(lines: Sequence[Any]) -> tuple[Sample, ...]:
    """Of a stage's `answers.jsonl` the first tasks of each family, with the answers before and after training."""
    families: dict[str, list[dict[str, Any]]] = {}
    for line in map(mapping, lines):
        families.setdefault(str(line.get("family") or ""), []).append(line)
    each = max(1, SHOWN // max(1, len(families)))
    return tuple(_sample(line) for of_family in families.values() for line in of_family[:each])


def _sample(line: dict[str, Any]) -> Sample:
    prompt = line.get("prompt")
    turns = [str(mapping(turn).get("content") or "") for turn in prompt] if isinstance(prompt, list) else []
    answers = tuple(
        _task_answer(when, mapping(line[when])) for when in ("before", "after") if mapping(line.get(when))
    )
    return Sample("\n".join(turns), answers, str(line.get("gold") or ""), str(line.get("family") or ""))


def _task_answer(run: str, given: dict[str, Any]) -> Answer:
    flags = {key: given[key] for key in ("correct", "valid", "finished") if isinstance(given.get(key), bool)}
    return Answer(run, "" if given.get("text") is None else str(given["text"]), **flags)
