"""What the arms of a sweep did to a real model's IFEval answers, beside those of the model that they started from.

    python -m benchmarks.ifeval_arms SWEEP START [--against ARM] [--out CSV]

SWEEP is a folder of `slimepo sweep recipes/sweeps/smollm2-ifeval.yaml`, or the `search` in it, START the `--out` of
`slimepo eval ifeval` on the model that all arms start from. Of each: the four scores with their intervals, their
differences to the start, paired by prompt; tokens of an answer, answers that end, the share of an answer's 4-grams of
words that stand in it further ahead, the shares of answers that begin with a quotation mark and of those with fewer
than ten words; and what became of the held-out pairs and requests, of these also the difference to the arm `--against`
with the same seed, paired by request. Arms without scores are named, and have the latter alone. Of an arm with several
seeds a last line has the means over them with 95 % intervals (Student's t), also of the differences to the arm
`--against`, seed by seed.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from slimepo.evaluation.benchmarks.bootstrap import paired_difference
from slimepo.evaluation.benchmarks.ifeval import FIGURES
from slimepo.files import json_lines, read_json
from slimepo.means import mean_of

RESULTS = Path(__file__).parents[1] / "docs" / "study" / "smollm2-ifeval.csv"
GRAM = 4


def repeated(text: str) -> float:
    """The share of a text's 4-grams of words that stand in it further ahead; 0 of fewer than four words."""
    words = text.split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def line(
    arm: str,
    evaluation: Path | None,
    keys: set[int],
    start: dict[str, Any] | None = None,
    stage: Path | None = None,
    against: Path | None = None,
) -> dict[str, Any]:
    """The figures of one model; of its answers to the benchmark those to the prompts `keys`."""
    found: dict[str, Any] = {"arm": arm}
    if evaluation is not None:
        score = scores_of(evaluation)
        for name in FIGURES:
            measure = score["measures"][name]
            found |= {
                name: measure["value"],
                f"{name}_low": measure["lower"],
                f"{name}_high": measure["upper"],
            }
            if start is not None:
                found |= apart(f"{name}_to_start", score["items"][name], start["items"][name])
        answers = [row for row in answers_of(evaluation) if row["key"] in keys]
        turns = [row["slimepo"]["turns"][-1] for row in answers]
        found["tokens"] = mean([turn["tokens"] for turn in turns])
        found["ended"] = sum(turn["stop"] == "stop" for turn in turns)
        found["under_ten_words"] = mean([len(row["response"].split()) < 10 for row in answers])
        found["quoted"] = mean([row["response"].lstrip().startswith('"') for row in answers])
        found["repeated_4_grams"] = mean([repeated(row["response"]) for row in answers])
    if stage is not None:
        heldout = read_json(stage)["heldout"]
        for side in ("chosen", "rejected"):
            key = f"logps/{side}"
            found[f"{side}_change"] = heldout["after"][key] - heldout["before"][key]
        found |= {"chosen_fell": heldout["chosen_fell"], "accuracy": heldout["after"]["accuracy"]}
        if (stage.parent / "answers.jsonl").exists():
            before, after = (right(stage.parent, when) for when in ("before", "after"))
            found["requests"] = 100 * mean(value for (value,) in after)
            found |= apart("requests_to_start", after, before)
            if against is not None:
                found |= apart("requests_to_control", after, right(against, "after"))
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def over_seeds(
    arm: str, lines: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Means over an arm's lines, one a seed, with the ends of their intervals; `control` has the same seeds."""
    found: dict[str, Any] = {"arm": f"{arm}, {len(lines)} seeds"}
    names = [name for name in lines[0] if name != "arm" and not name.endswith(("_low", "_high"))]
    for name in (name for name in names if all(name in each for each in lines)):
        figures = {name: [each[name] for each in lines]}
        if control and "_to_" not in name and all(name in each for each in control):
            pairs = zip(lines, control, strict=True)
            figures[f"{name}_to_control"] = [each[name] - other[name] for each, other in pairs]
        for figure, values in figures.items():
            middle, half, _ = mean_of(values)
            found |= {figure: middle, f"{figure}_low": middle - half, f"{figure}_high": middle + half}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def apart(name: str, ones: Sequence[Any], others: Sequence[Any]) -> dict[str, float]:
    """A difference in points with its interval, paired by prompt."""
    ends = zip((name, f"{name}_low", f"{name}_high"), paired_difference(ones, others, seed=0), strict=True)
    return {end: 100 * value for end, value in ends}


def right(stage: Path, when: str) -> list[list[int]]:
    """Whether each held-out request was answered as it asks, and the answer ended."""
    answers = [row[when] for row in json_lines(stage / "answers.jsonl")]
    return [[int(answer["correct"] and answer["finished"])] for answer in answers]


def scores_of(evaluation: Path) -> dict[str, Any]:
    """The scores of the one model that an evaluation's folder has."""
    (file,) = (evaluation / "scores").glob("ifeval--*.json")
    found: dict[str, Any] = read_json(file)["scores"][0]
    return found


def answers_of(evaluation: Path) -> list[dict[str, Any]]:
    """The answers of that model."""
    (file,) = (evaluation / "ifeval").glob("*.jsonl")
    return json_lines(file)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("--against", help="an arm's folder in SWEEP, such as sft-on-chosen")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    # What an arm shares with others is linked.
    stages = [
        stage for stage in sorted(given.sweep.glob("*/seed-*/*/stage.json")) if not stage.parent.is_symlink()
    ]
    found = {stage: stage.parents[1] / "eval" for stage in stages}
    for stage, folder in found.items():
        if not (folder / "scores").exists():
            print(f"not evaluated yet: {stage.parents[1]}")
    evaluations = [given.start, *(folder for folder in found.values() if (folder / "scores").exists())]
    # Of one model more prompts may have been answered.
    keys = set.intersection(*({row["key"] for row in answers_of(each)} for each in evaluations))
    start = scores_of(given.start)
    lines = [line("base", given.start, keys)]
    for stage, folder in found.items():
        seed, arm = stage.parents[1], stage.parents[2]
        (control,) = (
            given.sweep.glob(f"{given.against}/{seed.name}/*/stage.json") if given.against else (None,)
        )
        lines.append(
            line(
                f"{arm.name}, {seed.name}",
                folder if folder in evaluations else None,
                keys,
                start,
                stage,
                control.parent if control and control != stage else None,
            )
        )
    arms: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, each in zip(found, lines[1:], strict=True):
        arms.setdefault(stage.parents[2].name, {})[stage.parents[1].name] = each
    for arm, seeds in arms.items():
        others = arms.get(given.against or "", {}) if arm != given.against else {}
        if len(seeds) > 1:
            lines.append(
                over_seeds(arm, list(seeds.values()), [others[seed] for seed in seeds] if others else [])
            )
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*dict.fromkeys(name for each in lines for name in each)])
        writer.writeheader()
        writer.writerows(lines)
    for each in lines:
        print({name: each[name] for name in each if "loose" not in name})
    return lines


if __name__ == "__main__":
    main()
