"""A stage of a run: its folder's files (log, monitor, answers, figures) as one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimepo.checkpoints.store import newest
from slimepo.files import json_lines, read_json
from slimepo.pipeline.folder import STATUS
from slimepo.report.records import (
    Answer,
    Distribution,
    Fallen,
    Record,
    Sample,
    State,
    Warned,
    distribution,
    items,
    mapping,
    number,
    number_lines,
    numbers,
)
from slimepo.settings import flat
from slimepo.words import short_number

# Tasks shown of a stage, over all families; prompts shown over time, and at how many steps each.
SHOWN, PROMPTS, STEPS = 24, 6, 6
# Keys that say what a stage is called or stands behind, not what it did.
_NO_SETTINGS = ("seed", "name", "start")
_UNTOLD = "no end is recorded: still running, or killed"

Lines = Sequence[Mapping[str, Any]]


def stage_record(path: Path, recipe: dict[str, Any], at: int, several: bool) -> Record:
    """What stage `at` of the run at `path` has left so far; of several, a record has its stage in its name."""
    stages = [mapping(stage) for stage in recipe.get("stages") or ()]
    stage, led = stages[at], led_to(stages, at)
    names = [str(each.get("name") or "") for each in stages]
    folder, label = path / names[at], path.resolve().name
    done, drops = mapping(read_json(folder / "stage.json")), mapping(read_json(folder / "data.json"))
    heldout, monitor = mapping(done.get("heldout")), mapping(done.get("monitor"))
    curve = [line for line in number_lines(json_lines(folder / "metrics.jsonl")) if "loss" in line]
    watched = json_lines(folder / "monitor.jsonl")
    by_step = json_lines(folder / "answers-by-step.jsonl")
    shapes = mapping(read_json(folder / "distributions.json"))
    state, note = _state(folder, done, watched, curve, stage)
    # The stage's own settings are plain, those of stages that led to it stand under their names.
    own = [flat({key: each[key] for key in each if key not in _NO_SETTINGS}) for each in stages]
    whole = flat({key: value for key, value in recipe.items() if key not in ("stages", "seed")})
    seed = number(recipe.get("seed"))
    return Record(
        name=f"{label}/{names[at]}" if several else label,
        source=str(path),
        loss=str(stage.get("loss") or "unknown"),
        stage=names[at],
        start=names[led[-1]] if led else "",
        settings={**own[at], **whole, **flat({names[place]: own[place] for place in led})},
        seed=None if seed is None else int(seed),
        learning_rate=number(stage.get("learning_rate")),
        state=state,
        note=note,
        before=numbers(heldout.get("before")),
        after=numbers(heldout.get("after")),
        chosen_fell=number(heldout.get("chosen_fell")),
        heldout=number(heldout.get("pairs")),
        prompts=number(heldout.get("prompts")),
        curve=curve,
        monitor=monitor_lines(watched),
        monitor_facts=tuple(monitor.get("facts") or ()),
        warnings=warnings_of(watched),
        distributions={name: shape for name in shapes if (shape := distribution(shapes[name]))}
        or monitor_distributions(watched),
        samples=task_samples(json_lines(folder / "answers.jsonl")) or monitor_samples(watched),
        answered=[
            {"step": step} | {key: 100 * value for key, value in numbers(line.get("figures")).items()}
            for line in by_step
            if (step := number(line.get("step"))) is not None
        ],
        fallen=fallen_answers(watched, label),
        over_time=answers_over_time(by_step) or samples_over_time(folder / "checkpoints" / "rollouts.jsonl"),
        layout=str(done.get("layout") or ""),
        trained_parameters=number(done.get("trained_parameters")),
        kept=number(drops.get("kept")),
        dropped=numbers(drops.get("dropped")),
        dropped_heldout=numbers(drops.get("heldout")),
        steps=number(done.get("steps")) or (curve[-1]["step"] if curve else None),
        seconds=number(done.get("seconds")),
        times=numbers(done.get("times")),
        peak_memory=number(done.get("peak_memory")),
        certificate=mapping(read_json(folder / "certificate.json")),
    )


def led_to(stages: Sequence[dict[str, Any]], at: int) -> list[int]:
    """The stages that a stage's model came from: the one before, unless `start` names another."""
    if at == 0:
        return []
    names = [stage.get("name") for stage in stages[:at]]
    start = stages[at].get("start")
    place = names.index(start) if start in names else at - 1
    return [*led_to(stages, place), place]


def _state(
    folder: Path, done: dict[str, Any], watched: Lines, curve: Lines, stage: dict[str, Any]
) -> tuple[State, str]:
    """Whether a stage came to its end, and what is to be said of one that did not."""
    stopped = number(mapping(mapping(done.get("monitor")).get("stopped")).get("step"))
    if stopped is not None:
        planned = next((number(line.get("steps")) for line in watched), None)
        return "stopped", f"step {stopped:.0f}{'' if planned is None else f' of {planned:.0f}'}"
    if done:
        return "finished", ""
    if error := mapping(read_json(folder / "error.json")):
        return "failed", str(error.get("error") or "no reason is recorded")
    ended = mapping(read_json(folder.parent / STATUS))
    if ended.get("status") == "failed":
        return "failed", str(ended.get("error") or "no reason is recorded")
    untold = _UNTOLD
    if ended.get("status") == "preempted":
        untold = "it was told to end, and the same command goes on from there"
    if not curve:
        return "unfinished", f"nothing is logged yet; {untold}"
    step, epoch, epochs = curve[-1]["step"], curve[-1].get("epoch"), number(stage.get("epochs"))
    where = f"step {step:.0f}"
    checkpoint = newest(folder / "checkpoints")
    state = mapping(read_json(checkpoint / "trainer_state.json")) if checkpoint else {}
    if planned := number(state.get("max_steps")):
        where += f" of {planned:.0f}"
    elif epoch is not None and epochs:
        where += f", {epoch:.2f} of {epochs:g} epochs"
    return "unfinished", f"the last line is of {where}; {untold}"


def monitor_lines(watched: Lines) -> list[dict[str, float]]:
    """One line of numbers a look of the monitor, under the names that the log has for them without `monitor/`."""
    lines = []
    for line in watched:
        figures = {f"generation/{key}": value for key, value in numbers(line).items()}
        if line.get("kind") == "probe":
            parts = {part: numbers(line.get(part)) for part in ("train", "heldout", "gradient_share")}
            figures = {f"{part}/{key}": value for part, of in parts.items() for key, value in of.items()}
            told = mapping(line.get("entanglement")).get("ratio") or ()
            if ratios := [value for value in map(number, told) if value is not None]:
                figures["entanglement"] = sum(ratios) / len(ratios)
        if line.get("kind") in ("probe", "generation"):
            lines.append({"step": line.get("step"), **figures})
    return number_lines(lines)


def warnings_of(watched: Lines) -> tuple[Warned, ...]:
    """Every time a warning came on, and the step at which it went off again; last what was done about it."""
    lines = [line for line in watched if line.get("kind") == "warning"]
    found = []
    for at, line in enumerate(lines):
        if line.get("state") == "off":
            continue
        kind, rows = str(line.get("warning") or ""), str(line.get("set") or "")
        later = [each for each in lines[at + 1 :] if each.get("state") == "off"]
        of_this = (each for each in later if all(each.get(k) == line.get(k) for k in ("warning", "set")))
        gone = number(next(of_this, {}).get("step"))
        words = str(line.get("message") or kind)
        found.append(Warned(number(line.get("step")), words, line.get("stops") is True, gone, kind, rows))
    cures = [line for line in watched if line.get("kind") == "cure"]
    found += [Warned(number(line.get("step")), str(line.get("message")), kind="cure") for line in cures]
    return tuple(found)


def monitor_distributions(watched: Lines) -> dict[str, Distribution]:
    """Rejected tokens in the sample's first and last probe, for a run that was not scored at its end."""
    edges = next((line.get("bins") for line in watched if line.get("kind") == "start"), None)
    probes = [line for line in watched if line.get("kind") == "probe"]
    for part in ("heldout", "train"):
        counts = [c for probe in probes if (c := mapping(probe.get(part)).get("rejected_histogram"))]
        ends = {"edges": edges, "before": counts[0], "after": counts[-1]} if len(counts) > 1 else {}
        if shape := distribution(ends):
            # The monitor's bins reach further down than most models do.
            filled = [was or now for was, now in zip(shape.before, shape.after, strict=True)]
            first = next((at for at, count in enumerate(filled) if count), 0)
            cut = (side[first:] for side in (shape.edges, shape.before, shape.after))
            return {"rejected_tokens": Distribution(*cut)}
    return {}


def monitor_samples(watched: Lines) -> tuple[Sample, ...]:
    """The probe's prompts with the answers of the first and the last time they were asked."""
    # Asked once only, before the first step, a run that was killed has no answers of its own.
    asked = {
        "after" if number(line.get("step")) else "before": line.get("answers") or []
        for line in watched
        if line.get("kind") == "generation"
    }
    prompts = next((line.get("prompts") or [] for line in watched if line.get("kind") == "start"), [])
    samples = []
    for at, prompt in enumerate(map(mapping, prompts)):
        answers = _answers({when: given[at] for when, given in asked.items() if at < len(given)})
        if prompt.get("text") and answers:
            samples.append(Sample(str(prompt["text"]), answers))
    return tuple(samples)


def fallen_answers(watched: Lines, run: str) -> tuple[Fallen, ...]:
    """The chosen answers that the monitor found to have fallen most, those that it wrote whole."""
    line = next((line for line in reversed(watched) if line.get("kind") == "fallen"), {})
    found = []
    for told in map(mapping, items(line.get("answers"))):
        before, after, mean = (
            tuple(value for value in map(number, items(told.get(key))) if value is not None)
            for key in ("before", "after", "mean")
        )
        tokens, length = tuple(map(str, items(told.get("tokens")))), number(told.get("length"))
        if len(tokens) == len(before) == len(after) > 0 and len(mean) == 2:
            prompt, part = str(told.get("prompt") or ""), str(line.get("set") or "heldout")
            whole = int(length or len(tokens))
            found.append(Fallen(run, prompt, tokens, before, after, (mean[0], mean[1]), whole, part))
    return tuple(found)


def task_samples(lines: Lines) -> tuple[Sample, ...]:
    """Of a stage's `answers.jsonl` the first tasks of each family, with the answers before and after training."""
    families: dict[str, list[Sample]] = {}
    for line in lines:
        sample = _sample(line, ("before", "after"))
        families.setdefault(sample.family, []).append(sample)
    each = max(1, SHOWN // max(1, len(families)))
    return tuple(sample for of_family in families.values() for sample in of_family[:each])


def answers_over_time(lines: Lines) -> tuple[Sample, ...]:
    """Of `answers-by-step.jsonl` the tasks whose answers changed most, with those of a few steps."""
    tasks = next((tasks for line in lines if (tasks := items(line.get("tasks")))), [])
    by_step = {f"step {step:.0f}": line for line in lines if (step := number(line.get("step"))) is not None}
    shown = spread(list(by_step), STEPS)
    told = []
    for at, task in enumerate(map(mapping, tasks)):
        given = {when: items(by_step[when].get("answers")) for when in shown}
        told.append(task | {when: answers[at] for when, answers in given.items() if at < len(answers)})
    samples = [sample for each in told if (sample := _sample(each, shown)).answers]
    # What never changes shows nothing.
    samples.sort(key=lambda sample: -len({answer.text for answer in sample.answers}))
    return tuple(samples[:PROMPTS])


def samples_over_time(file: Path) -> tuple[Sample, ...]:
    """Of the samples that a stage learned from the prompts that came most often, with the first answer each time."""
    times: dict[str, list[dict[str, Any]]] = {}
    for line in json_lines(file):
        if items(line.get("samples")) and number(line.get("step")) is not None:
            times.setdefault(str(line.get("prompt")), []).append(line)
    often = sorted((lines for lines in times.values() if len(lines) > 1), key=len, reverse=True)
    found = []
    for lines in often[:PROMPTS]:
        answers = []
        for line in spread(lines, STEPS):
            reward = number((items(line.get("rewards")) or [None])[0])
            ended = (items(line.get("finished")) or [None])[0]
            worth = "" if reward is None else f", reward {short_number(reward)}"
            what = f"step {line['step']:.0f}{worth}"
            # An answer that was cut off is marked; of one that ended there is nothing to say.
            answers.append(Answer(what, str(line["samples"][0]), finished=None if ended else False))
        found.append(Sample(_text(lines[0].get("messages")), tuple(answers)))
    return tuple(found)


def spread(several: Sequence[Any], most: int) -> list[Any]:
    """At most so many of several, evenly, with the first and the last."""
    if len(several) <= most:
        return list(several)
    return [several[round(at * (len(several) - 1) / (most - 1))] for at in range(most)]


def _sample(told: Mapping[str, Any], when: Sequence[str]) -> Sample:
    answers, gold = _answers(told, when), str(told.get("gold") or "")
    return Sample(_text(told.get("prompt")), answers, gold, str(told.get("family") or ""))


def _text(turns: Any) -> str:
    return "\n".join(str(mapping(turn).get("content") or "") for turn in items(turns))


def _answers(told: Mapping[str, Any], when: Sequence[str] = ("before", "after")) -> tuple[Answer, ...]:
    """What was answered at some times, with the verdicts that somebody gave."""
    answers = []
    for time in when:
        if given := mapping(told.get(time)):
            verdicts = {key: given.get(key) for key in ("correct", "valid", "finished")}
            flags = {key: value for key, value in verdicts.items() if isinstance(value, bool)}
            answers.append(Answer(time, "" if given.get("text") is None else str(given["text"]), **flags))
    return tuple(answers)
