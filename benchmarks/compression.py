"""What fewer bits and fewer weights do to trained models: exact match and chosen log-probs, by objective.

    python -m benchmarks.compression RUN... [--tasks 300] [--out CSV]

Each RUN is a run folder of the built-in world, or an arm of a sweep in it, whose last stage is measured: as it is,
with the weights of its layers rounded to 8, 4 and 3 bits, and with 30, 50 and 70 % of them set to 0 (`slimepo export
--bits`, `--prune`). Exact match is of held-out tasks, the log-prob per token of the chosen answers of held-out pairs.
Prints means over seeds with 95 % intervals, and of each setting the change from the same model as it was.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimepo.data.tokenize import tokenize
from slimepo.means import mean_of
from slimepo.model.chat import load_chat_model
from slimepo.model.compress import Compression, compress
from slimepo.model.logps import install_logps
from slimepo.model.score import score_pairs
from slimepo.pipeline.pairs.make import read_pairs
from slimepo.pipeline.recipe.read import load_recipe
from slimepo.pipeline.tasks import answer_tasks, load_tasks, measure
from slimepo.terminal import make_console

RESULTS = Path(__file__).parent / "results" / "compression.csv"
SETTINGS = {
    "as trained": Compression(),
    **{f"{bits} bits": Compression(bits=bits) for bits in (8, 4, 3)},
    **{f"{share:.0%} zeros": Compression(prune=share) for share in (0.3, 0.5, 0.7)},
}
FIGURES = {"exact_match": "exact match", "chosen": "chosen log-prob per token"}


def measured(run: Path, count: int) -> list[dict[str, Any]]:
    """A row for each setting of the last stage of a run."""
    recipe = load_recipe(run / "recipe.yaml")
    stage = recipe.stages[-1]
    tasks = load_tasks(recipe)
    assert tasks is not None
    tasks = replace(tasks, heldout=tasks.heldout[:count])
    trained = load_chat_model(str(run / stage.name))
    rows = tokenize(read_pairs(run / stage.part / "heldout.jsonl"), trained.chat).rows[:count]
    found = []
    for name, setting in SETTINGS.items():
        model = copy.deepcopy(trained.model)
        compress(model, setting)
        answers = answer_tasks(model, tasks, trained.chat, trained.end_ids, make_console(), name)
        install_logps(model)
        chosen = score_pairs(model, rows, 64).chosen
        found.append(
            {
                "objective": stage.name, "seed": recipe.seed, "setting": name, "tasks": len(tasks.heldout),
                "pairs": len(rows), "exact_match": measure(tasks.heldout, answers)["exact_match"],
                "chosen": float(chosen.mean()),
            }
        )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every run, write all rows to the CSV file and print means."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        rows += measured(run, args.tasks)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for figure, words in FIGURES.items():
        print(f"\n| {words} | {' | '.join(SETTINGS)} |\n|---|{'---:|' * len(SETTINGS)}")
        of: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for row in rows:
            of[row["objective"]][row["setting"]][row["seed"]] = row[figure]
        for objective, by_setting in of.items():
            start, cells = by_setting["as trained"], []
            for setting, by_seed in by_setting.items():
                values = [by_seed[seed] - (start[seed] if setting != "as trained" else 0) for seed in by_seed]
                scale = 100 if figure == "exact_match" else 1
                sign = "" if setting == "as trained" else "+"
                mean, digits = mean_of([scale * value for value in values]), 1 if scale == 100 else 3
                half = f" ± {mean.half:.{digits}f}" if mean.n > 1 else ""
                cells.append(f"{mean.value:{sign}.{digits}f}{half}")
            print(f"| {objective} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
