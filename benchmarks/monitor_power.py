"""How often the displacement monitor speaks of unlearning, and how often it should: power and silence.

    python -m benchmarks.monitor_power [--seeds 0 1 2 3] [--data FOLDER]

For every seed the quickstart's SFT model is trained with objectives at good and at far too high learning rates, and
all held-out pairs and 1,000 training pairs are scored eight times a run: that is the truth. Then the monitor's rule is
played on 1,000 random samples of the size that the quickstart pays for, with and without its second look: at two looks,
in the middle and at the end, which is what most runs of the quickstart pay for, and at all eight. Some 15 minutes a
seed.
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
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback, set_seed

from benchmarks.record import append_csv, provenance
from slimepo.data.tokenize import TokenizedPair, tokenize
from slimepo.files import cache_folder
from slimepo.model.score import score_pairs
from slimepo.monitor.displacement import fall
from slimepo.monitor.settings import CHOSEN_SHARE, monitor_settings, reserve_size, sample_size
from slimepo.monitor.verdicts import judge_pairs, looks_fallen
from slimepo.playground.quickstart import build_world, sampled_pairs, sft_model
from slimepo.playground.settings import load_quickstart
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer

RESULTS = Path(__file__).parent / "results" / "monitor-power.csv"
RUNS = (
    ("slime", 1e-4), ("slime", 3e-4), ("slime", 1e-3), ("sft", 1e-3), ("dpo", 3e-5), ("dpo", 1e-4), ("dpo", 3e-4),
    ("dpo", 1e-3), ("simpo", 3e-5), ("simpo", 3e-4), ("simpo", 1e-3), ("kto", 1e-3),
)  # fmt: skip
PROBES, TRAIN_ROWS, SAMPLES = 8, 1000, 1000

FloatArray = NDArray[np.float64]
# Change of each pair's chosen answer since step 0, by run, step and set.
Changes = Mapping[str, FloatArray]


class Truth(TrainerCallback):  # type: ignore[misc]
    """Scores all rows of both sets eight times a run."""

    def __init__(self, model: PreTrainedModel, rows: dict[str, list[TokenizedPair]]) -> None:
        self.model, self.rows = model, rows
        self.found: dict[str, FloatArray] = {}
        self.start = {name: score_pairs(model, of, 64).chosen for name, of in rows.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % (-(-state.max_steps // PROBES)) == 0 or state.global_step == state.max_steps:
            for name, of in self.rows.items():
                change = score_pairs(self.model, of, 64).chosen - self.start[name]
                self.found[f"{state.global_step}|{name}"] = change


def measure(seed: int) -> Changes:
    """Train every run of `RUNS` from the seed's SFT model."""
    recipe = load_quickstart([f"seed={seed}"])
    world = build_world(recipe)
    start, _ = sft_model(recipe, world, Console(), cache_folder("playground"))
    train, heldout = (
        tokenize(sampled_pairs(recipe, world, start, tasks)[0], world.chat).rows
        for tasks in (world.compared, world.heldout)
    )
    found = {}
    for loss, rate in RUNS:
        model = copy.deepcopy(start)
        truth = Truth(model, {"heldout": heldout, "train": train[:TRAIN_ROWS]})
        set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            args = PreferenceConfig(
                output_dir=folder, loss=loss, learning_rate=rate, seed=seed, num_train_epochs=recipe.preference.epochs,
                per_device_train_batch_size=recipe.preference.batch_size * (2 if loss == "kto" else 1),
                train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
                monitor=False,
            )  # fmt: skip
            PreferenceTrainer(model=model, args=args, train_dataset=train, callbacks=[truth]).train()
        found |= {f"{loss} {rate:g}|{key}": change for key, change in truth.found.items()}
    return found


def play(
    heldout: Sequence[FloatArray], train: Sequence[FloatArray], size: int, reserve: int
) -> dict[str, Any]:
    """The share of samples in which the rule speaks, without and with a second look, and how many of these it takes."""
    rng = np.random.default_rng(0)
    spoke, looks = {"sample": 0, "second look": 0}, 0
    for _ in range(SAMPLES):
        held, trained = rng.permutation(len(heldout[0])), rng.permutation(len(train[0]))[:size]
        for rule in spoke:
            for all_held, all_trained in zip(heldout, train, strict=True):
                few = _figures(all_held[held[:size]])
                if rule == "second look" and looks_fallen(few, on=False):
                    looks += 1
                    few = _figures(all_held[held[: size + reserve]])
                if _speaks({"heldout": few, "train": _figures(all_trained[trained])}):
                    spoke[rule] += 1
                    break
    return {rule: round(times / SAMPLES, 3) for rule, times in spoke.items()} | {
        "looks": round(looks / SAMPLES, 2)
    }


def _figures(change: FloatArray) -> dict[str, Any]:
    return {"chosen_pairs": len(change), **fall(change)}


def _speaks(now: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(verdict.holds for verdict in judge_pairs(now, now, {}, ("unlearning",)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--data", type=Path, help="keep the measured changes here, and use what is there")
    given = parser.parse_args(argv)
    settings = monitor_settings(True)
    assert settings is not None
    for seed in given.seeds:
        kept = given.data / f"s{seed}.npz" if given.data else None
        changes: Changes = dict(np.load(kept)) if kept and kept.exists() else measure(seed)
        if kept and not kept.exists():
            np.savez(kept, **changes)
        for name in dict.fromkeys(key.split("|")[0] for key in changes):
            steps = sorted({int(key.split("|")[1]) for key in changes if key.startswith(f"{name}|")})
            heldout, train = (
                [changes[f"{name}|{step}|{of}"] for step in steps] for of in ("heldout", "train")
            )
            # As the monitor counts what a run reads: 32 pairs a step, one answer of each, or 64 judged answers.
            of_one = {"sft": 32 * CHOSEN_SHARE, "kto": 64 * CHOSEN_SHARE}
            read = steps[-1] * of_one.get(name.split()[0], 32)
            size = sample_size(settings, read, sets=2)
            reserve = reserve_size(settings, read, size)
            for looks in (slice(PROBES // 2 - 1, None, PROBES // 2), slice(None)):
                row = {
                    "seed": seed, "run": name, "change": round(float(heldout[-1].mean()), 3),
                    "lowest": round(float(min(h.mean() for h in heldout)), 3),
                    "fell": round(float((heldout[-1] < 0).mean()), 2), "size": size, "reserve": reserve,
                    "at steps": " ".join(map(str, steps[looks])), **play(heldout[looks], train[looks], size, reserve),
                }  # fmt: skip
                print(row, flush=True)
                append_csv(RESULTS, [row | provenance()])


if __name__ == "__main__":
    main()
