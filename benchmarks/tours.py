"""Best of N round trips, by what the answers were shaped with: the figures of docs/systems.md.

    python -m benchmarks.tours SWEEP [--out CSV]

SWEEP is a folder of `slimepo sweep recipes/sweeps/tours.yaml`. Of each arm and seed, and of the SFT model that they
start from: the share of single samples that are trips, as the model gives them, with the grammar, and with grammar and
repair; and the best of 1, 4, 8, 16 and 32 samples with both: its length over that of the shortest trip, minus 1.
`adaptive` draws 8 at a time until two share the best length, 32 at most.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimepo.data.render import encode_prompt
from slimepo.means import mean_of
from slimepo.model.chat import ChatModel, load_chat_model
from slimepo.model.generate import completion_text, generate
from slimepo.model.grammar import grammars_for
from slimepo.onpolicy.best_of import settled
from slimepo.pipeline.start import exported_model
from slimepo.pipeline.tasks import Task, read_tasks
from slimepo.playground.tasks import judge
from slimepo.playground.tours import cost, grammar, repair

RESULTS = Path(__file__).parent / "results" / "tours.csv"
MOST, LOT = 32, 8


def texts(
    chat: ChatModel, tasks: Sequence[Task], samples: int, *, shaped: bool, seed: int
) -> list[list[str]]:
    """Samples at temperature 1, as they come or `shaped` by the grammar; of an unfinished one what there is."""
    grammars = grammars_for(chat.model, chat.tokenizer, chat.end_ids)
    constraints = [functools.partial(grammars, grammar(task.row)) for task in tasks] if shaped else None
    found = generate(
        chat.model, [encode_prompt(chat.chat, task.prompt) for task in tasks], end_token_ids=chat.end_ids,
        max_new_tokens=32, temperature=1.0, samples=samples, seed=seed, batch_rows=512, constraints=constraints,
    )  # fmt: skip
    return [[completion_text(chat.tokenizer, c) for c in given] for given in found]


def figures(chat: ChatModel, tasks: Sequence[Task], seed: int) -> dict[str, float]:
    """The figures of one model."""
    free = texts(chat, tasks, 1, shaped=False, seed=seed)
    shaped = texts(chat, tasks, MOST, shaped=True, seed=seed)
    mended = [[repair(task.row, text) for text in given] for task, given in zip(tasks, shaped, strict=True)]
    samples = {"free": free, "grammar": shaped, "repaired": mended}
    found = {
        f"trips, {name}": float(
            np.mean([judge(task.row, given[0]).valid for task, given in zip(tasks, of, strict=True)])
        )
        for name, of in samples.items()
    }
    costs = np.array(
        [[cost(task.row, text) for text in given] for task, given in zip(tasks, mended, strict=True)]
    )
    for count in (1, 4, 8, 16, MOST):
        found[f"gap of {count}"] = float(np.mean(costs[:, :count].min(axis=1)) - 1)
    drawn = [
        next((n for n in range(LOT, MOST, LOT) if settled([-each for each in of[:n]])), MOST) for of in costs
    ]
    found["gap, adaptive"] = float(np.mean([of[:n].min() for of, n in zip(costs, drawn, strict=True)]) - 1)
    found["samples, adaptive"] = float(np.mean(drawn))
    return found


def models(sweep: Path) -> Iterator[tuple[str, int, Path]]:
    """Arm, seed and run folder's stage of every cell that is done, the start first."""
    cells = sorted(
        stage.parent
        for stage in sweep.glob("*/seed-*/*/stage.json")
        if stage.parents[2].name not in ("shared", "world")
    )
    started = set()
    for cell in cells:
        seed = int(cell.parent.name.removeprefix("seed-"))
        if cell.name == "sft" and seed not in started:
            started.add(seed)
            yield "start", seed, cell
        elif cell.name != "sft":
            yield cell.parents[1].name, seed, cell


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for arm, seed, stage in models(given.sweep):
        tasks = read_tasks(str(given.sweep / "world" / f"seed-{seed}" / "world" / "heldout.jsonl"))
        rows.append(
            {"arm": arm, "seed": seed, **figures(load_chat_model(str(exported_model(stage))), tasks, seed)}
        )
        print(rows[-1], flush=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        means = {
            name: mean_of([row[name] for row in of_arm]) for name in rows[0] if name not in ("arm", "seed")
        }
        print(arm, {name: f"{mean.value:.4f} ± {mean.half:.4f}" for name, mean in means.items()})
    return rows


if __name__ == "__main__":
    main()
