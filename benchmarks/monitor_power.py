"""How often the displacement monitor speaks of unlearning, and how often it should: power and silence.

    python -m benchmarks.monitor_power [--seeds 0 4 5] [--first RUNS]

For every seed a small model is trained from scratch in the built-in world, pairs are made of its own samples, and from
there objectives train on them at good and at far too high learning rates. At the steps at which the monitor looks, all
held-out pairs and 500 training pairs are scored: that is the truth. Then the monitor's rule is played on 1,000 random
samples of the size that it takes, of each set. Models and scores are kept in the cache folder (`SLIMEPO_CACHE`), a file
a run, so that what was cut off goes on. Some eleven minutes of process time a seed.

Seed 0 chose the steps; the others report.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, TrainerCallback, set_seed

from benchmarks.record import append_csv, provenance
from slimepo.data.tokenize import tokenize
from slimepo.files import cache_folder
from slimepo.model.chat import load_chat_model
from slimepo.model.score import score_pairs
from slimepo.monitor.displacement import fall
from slimepo.monitor.settings import MonitorSettings, look_steps
from slimepo.monitor.verdicts import judge_pairs
from slimepo.pipeline.pairs.make import read_pairs
from slimepo.pipeline.run import run_recipe, runs_of
from slimepo.playground.quickstart import load_quickstart
from slimepo.terminal import make_console
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer

RESULTS = Path(__file__).parent / "results" / "monitor-power.csv"
RUNS = (
    ("dpo", 1e-3), ("simpo", 1e-3), ("slime", 1e-4), ("dpo", 3e-5), ("simpo", 3e-5), ("sft", 1e-3),
    ("dpo", 3e-4), ("slime", 1e-3),
)  # fmt: skip
TRAIN_ROWS, SAMPLES = 500, 1_000
QUIET: dict[str, Any] = dict(
    train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
    logging_steps=1000, monitor=False,
)  # fmt: skip

FloatArray = NDArray[np.float64]


class Truth(TrainerCallback):  # type: ignore[misc]
    """How far every chosen answer of both sets has moved, at the steps at which the monitor would look."""

    def __init__(
        self, model: PreTrainedModel, rows: Mapping[str, Sequence[Any]], start: Mapping[str, FloatArray]
    ) -> None:
        self.model, self.rows, self.start = model, rows, start
        self.found: dict[str, FloatArray] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in look_steps(state.max_steps):
            for name, rows in self.rows.items():
                change = score_pairs(self.model, rows, 64).chosen - self.start[name]
                self.found[f"{state.global_step}|{name}"] = change


def own_world(seed: int, out: Path) -> tuple[PreTrainedModel, dict[str, Sequence[Any]]]:
    """The quickstart's SFT model of a seed, and the pairs of its own samples; one step of one stage has them made."""
    control = "objectives=[{loss: sft, learning_rates: [1e-4], name: control}]"
    world = load_quickstart(
        out, [f"seed={seed}", control, "preference.max_steps=1", "preference.monitor=false"]
    )
    ((recipe, folder),) = runs_of(world.recipe, out)
    world.write(recipe, folder)
    run_recipe(recipe, folder, make_console())
    loaded = load_chat_model(str(folder / "sft"))
    pairs = {name: read_pairs(folder / "samples" / f"{name}.jsonl") for name in ("train", "heldout")}
    return loaded.model, {name: tokenize(rows, loaded.chat).rows for name, rows in pairs.items()}


def measure(seed: int, runs: Sequence[tuple[str, float]], folder: Path) -> None:
    """Train the runs that have no file yet, each from the seed's model."""
    missing = [run for run in runs if not (folder / f"{run[0]}-{run[1]:g}.npz").exists()]
    if not missing:
        return
    base, pairs = own_world(seed, folder / "run")
    rows = {"heldout": pairs["heldout"], "train": pairs["train"][:TRAIN_ROWS]}
    start = {name: score_pairs(base, of, 64).chosen for name, of in rows.items()}
    for loss, rate in missing:
        model = copy.deepcopy(base)
        truth = Truth(model, rows, start)
        with tempfile.TemporaryDirectory() as output:
            args = PreferenceConfig(
                output_dir=output, loss=loss, learning_rate=rate, seed=seed, num_train_epochs=2,
                per_device_train_batch_size=32, **QUIET,
            )  # fmt: skip
            set_seed(seed)
            PreferenceTrainer(model, args, pairs["train"], callbacks=[truth]).train()
        np.savez(folder / f"{loss}-{rate:g}.npz", **truth.found)
        print(seed, loss, rate, {k: round(float(v.mean()), 3) for k, v in truth.found.items()}, flush=True)


def play(looks: Sequence[Mapping[str, FloatArray]], pairs: int) -> float:
    """The share of samples of so many pairs of each set in which the rule speaks at one look or more."""
    rng, spoke = np.random.default_rng(0), 0
    for _ in range(SAMPLES):
        drawn = {name: rng.permutation(len(change))[:pairs] for name, change in looks[0].items()}
        found = ({name: fall(change[drawn[name]]) for name, change in look.items()} for look in looks)
        spoke += any(verdict.holds for now in found for verdict in judge_pairs(now, now, {}))
    return spoke / SAMPLES


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 4, 5])
    parser.add_argument("--first", type=int, default=len(RUNS), help="only so many of the runs")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[MonitorSettings.model_fields["pairs"].default]
    )
    given = parser.parse_args(argv)
    for seed in given.seeds:
        folder = cache_folder("monitor-power") / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        measure(seed, RUNS[: given.first], folder)
        for loss, rate in RUNS[: given.first]:
            changes = np.load(folder / f"{loss}-{rate:g}.npz")
            last = max(int(key.split("|")[0]) for key in changes)
            steps = look_steps(last)[1:]
            looks = [{name: changes[f"{step}|{name}"] for name in ("heldout", "train")} for step in steps]
            held = [look["heldout"] for look in looks]
            for pairs in given.pairs:
                row = {
                    "seed": seed, "run": f"{loss} {rate:g}", "change": round(float(held[-1].mean()), 3),
                    "lowest": round(float(min(change.mean() for change in held)), 3),
                    "fell": round(float((held[-1] < 0).mean()), 2), "pairs": pairs,
                    "at steps": " ".join(map(str, steps)), "speaks": play(looks, pairs),
                }  # fmt: skip
                print(row, flush=True)
                append_csv(RESULTS, [row | provenance()])


if __name__ == "__main__":
    main()
