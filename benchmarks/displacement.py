"""Does a forecast made before training tell which chosen answers fall? Rank correlations over runs that are done.

    python -m benchmarks.displacement RUN... [--pairs FILE [--limit N]] [--gradient-pairs N] [--out CSV]

Each RUN is a run folder with a preference stage: on pairs of its own samples, whose held-out pairs are looked at, or on
a data set; then FILE has the pairs, those that it trained on or others. CHES and the entanglement ratio are worked out
with the model that the stage started from (`slimepo data check --displacement`), and each is set against the change of
the chosen answer's log-prob per token that training made. The ratio takes two backward passes a pair;
`--gradient-pairs N` works it out for N of them, evenly spread. Prints Spearman's rank correlation for each objective
and rate, means over seeds with 95 % intervals; of one run an interval over pairs (bootstrap) is in the file.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from slimepo.data.batch import StepCollator
from slimepo.data.chat import chat_format, load_tokenizer
from slimepo.data.read import read_rows
from slimepo.data.rows import Row
from slimepo.data.tokenize import tokenize
from slimepo.files import read_json
from slimepo.means import mean_of
from slimepo.model.load import load_model
from slimepo.model.score import score_pairs
from slimepo.pipeline.pairs.make import read_pairs
from slimepo.plan.displacement import forecast
from slimepo.settings import read_mapping

RESULTS = Path(__file__).parent / "results" / "displacement.csv"
BATCH, BATCH_TOKENS = 16, 8192


def correlations(
    run: Path,
    known: dict[tuple[Any, ...], Any],
    pairs: Path | None = None,
    limit: int | None = None,
    gradient_pairs: int | None = None,
) -> list[dict[str, Any]]:
    """A row for each preference stage of a run; `known` keeps what was worked out of a start for the next run."""
    recipe = read_mapping(run / "recipe.yaml", "recipe")
    found = []
    for stage in recipe["stages"]:
        if stage["part"] not in recipe["pairs"] and (pairs is None or stage["loss"] == "sft"):
            continue
        done = read_json(run / stage["name"] / "stage.json")
        # Of the run's own stage, or another model; the folder may have been moved since.
        base = Path(done["base"])
        own = run / base.parent.name / base.name
        start = own if own.is_dir() else base
        file = pairs or run / stage["part"] / "heldout.jsonl"
        data = recipe["data"]
        lengths = (data["max_length"], data["cut_long_responses"])
        key = (start.resolve(), file.resolve(), *lengths)
        if key not in known:
            model = _loaded(start)
            chat = chat_format(load_tokenizer(str(start)))
            preferences = read_rows(file, limit=limit).preferences if pairs else read_pairs(file)
            rows = tokenize(preferences, chat, max_length=lengths[0], cut=lengths[1]).rows
            known[key] = rows, _chosen(model, rows), forecast(model, rows, gradient_pairs, BATCH)
        rows, before, told = known[key]
        change = _chosen(_loaded(run / stage["name"] / "model"), rows) - before
        row = {
            "objective": stage["loss"], "learning_rate": stage["learning_rate"], "seed": recipe["seed"],
            "pairs": len(rows), "fell": float(np.mean(change < 0)), "chosen_change": float(change.mean()),
        }  # fmt: skip
        for name, values in {"ches": told.ches, "ratio": told.ratio, "margin": told.margin}.items():
            there = ~np.isnan(values)
            row[name] = float(spearmanr(values[there], change[there]).statistic)
            row[f"{name}_low"], row[f"{name}_high"] = _interval(values[there], change[there])
        row["gradient_pairs"] = int(np.isfinite(told.ratio).sum())
        found.append(row)
    return found


def _chosen(model: Any, rows: Sequence[Row]) -> np.ndarray:
    """The chosen answers' log-probs per token, `[rows]`, in nats; nothing else of the pairs is computed."""
    alone = [Row(row.prompt_ids, row.responses[:1], id=row.id) for row in rows]
    return score_pairs(model, alone, collator=StepCollator(BATCH, max_tokens=BATCH_TOKENS)).chosen


def _loaded(folder: Path) -> Any:
    return load_model(str(folder)).to("cuda" if torch.cuda.is_available() else "cpu")


def _interval(values: np.ndarray, change: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % of a rank correlation, pairs drawn again with replacement."""
    random = np.random.default_rng(0)
    drawn = (random.integers(len(values), size=len(values)) for _ in range(draws))
    low, high = np.quantile([spearmanr(values[i], change[i]).statistic for i in drawn], [0.025, 0.975])
    return float(low), float(high)


def main(arguments: Sequence[str] | None = None) -> None:
    """Work out every run, write them to the CSV file and print means."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.displacement", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--pairs", type=Path, help="pairs to look at, in place of the held-out ones")
    parser.add_argument("--limit", type=int, help="so many of them")
    parser.add_argument(
        "--gradient-pairs", type=int, help="the entanglement ratio of so many pairs; otherwise of all"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    known: dict[tuple[Any, ...], Any] = {}
    rows = [
        row
        for run in args.runs
        for row in correlations(run, known, args.pairs, args.limit, args.gradient_pairs)
    ]
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["objective"], row["learning_rate"]].append(row)
    print("| | runs | fell | CHES | entanglement ratio | margin |\n|---|---:|---:|---:|---:|---:|")
    for (objective, rate), each in groups.items():
        told = [mean_of([row[name] for row in each]) for name in ("ches", "ratio", "margin")]
        cells = [f"{m.value:+.2f}" + (f" ± {m.half:.2f}" if m.n > 1 else "") for m in told]
        fell = np.mean([row["fell"] for row in each])
        print(f"| {objective}, {rate:g} | {len(each)} | {fell:.0%} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
