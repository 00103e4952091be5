"""What the paper's models take on 8, 64 and 512 GPUs: memory on a device as planned, time and traffic as calculated.

    python -m benchmarks.scale

Nothing is measured. Memory is what `slimepo plan` says; the assumptions about speed stand below. Writes
results/scale-memory.csv and results/scale-time.csv anew and prints the tables of docs/scale.md.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import step_flops
from benchmarks.gpu import MODELS
from benchmarks.record import append_csv
from benchmarks.rows import Lengths
from slimepo.model.load import load_config
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.plan.plan import GIB
from slimepo.plan.ranks import on_a_rank, sizes_of
from slimepo.plan.step import PlannedStep, largest_batch, make_step, step_memory

RESULTS = Path(__file__).parent / "results"

# Every device keeps its share as there are more of them: so many pairs a step, so many tokens at once.
PAIRS, TOKENS = 16, 8192
# Mean of 1,000 UltraFeedback pairs in Llama 3.2's tokens; the other two tokenizers differ by a few per cent.
LENGTHS = Lengths(prompt=161, chosen=265, rejected=235)
# An H100 SXM: dense bfloat16 by its data sheet, and the share of it that training at these sizes is reported to reach.
FLOPS_A_SECOND = 989e12 * 0.40
# Bytes that a device sends in a second, 80 % of the data sheets': NVLink among eight, then a 400 Gb/s adapter each.
WITHIN_A_NODE, BETWEEN_NODES = 0.8 * 450e9, 0.8 * 50e9
DOLLARS_AN_HOUR = 3.0
# The paper: SLIME once over two thirds of UltraFeedback's 61,135 pairs, after three epochs of SFT on the other third.
PAPER_PAIRS, PAPER_DEMONSTRATIONS = 40_757, 3 * 20_378

TRAINS: dict[str, int | None] = {"LoRA and head": 64, "all weights": None}
SHARED_BY = [("ddp", 1), ("ddp", 8), ("zero2", 8), ("zero3", 8), ("fsdp2", 8), ("fsdp2", 64)]
DEVICES = (8, 64, 512)


def planned_step(model: Mapping[str, Any], rank: int | None) -> PlannedStep:
    """SLIME at the paper's settings, rows of at most 2,048 tokens, activations computed again layer by layer."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        stage = {
            "loss": "slime", "batch_size": PAIRS, "activation_checkpointing": "layers",
            "args": {"max_tokens_per_batch": TOKENS},
        }  # fmt: skip
        data = {"path": "none", "max_length": 2048}
        adapter = "none" if rank is None else {"r": rank}
        recipe = make_recipe({"model": folder, "adapter": adapter, "data": data, "stages": [stage]})
        # As the command loads them: weights that all train in float32, a frozen base in bfloat16.
        dtype = torch.float32 if rank is None else torch.bfloat16
        return make_step(recipe, recipe.stages[0], load_config(folder), dtype, gpu=True)


def memory_rows(name: str, trains: str, step: PlannedStep) -> Iterator[dict[str, Any]]:
    """GiB on a device at the peak of training, and while a model that is kept in parts is looked at as a whole."""
    alone = step_memory(step, largest_batch(step), accumulates=True)
    sizes = sizes_of(step.whole.model)
    for engine, ranks in SHARED_BY:
        parts, whole = on_a_rank(alone, sizes, engine, ranks)
        kept = {part: f"{size / GIB:.1f}" for part, size in parts.items()}
        yield {
            "model": name, "trains": trains, "devices": ranks, "engine": engine if ranks > 1 else "",
            **kept, "training": f"{sum(parts.values()) / GIB:.1f}", "looking": f"{whole / GIB:.1f}",
        }  # fmt: skip


def time_rows(name: str, trains: str, step: PlannedStep) -> Iterator[dict[str, Any]]:
    """Seconds of a step that computes and then sends, the one after the other, and the paper's run at that speed."""
    rank = TRAINS[trains]
    # Layers that are computed again go forward twice: 8 for 6 where all weights train, 6 for 4 where few do.
    again = 8 / 6 if rank is None else 6 / 4
    pair = again * step_flops(dict(MODELS[name]), LENGTHS, 1, rank, shared=True)
    demonstration = again * step_flops(dict(MODELS[name]), LENGTHS._replace(rejected=0), 1, rank, shared=True)
    sizes = sizes_of(step.whole.model)
    micro_batches = math.ceil(PAIRS * sum(LENGTHS) / TOKENS)
    # A step's traffic as docs/scale.md has it; weights are gathered forward and backward.
    traffic = {"ddp": 8 * sizes.trained, "fsdp2": micro_batches * (2 * sizes.weights + 4 * sizes.trained)}
    for engine, devices in product(traffic, DEVICES):
        computing = PAIRS * pair / FLOPS_A_SECOND
        sending = traffic[engine] / (WITHIN_A_NODE if devices <= 8 else BETWEEN_NODES)
        slowed = 1 + sending / computing
        hours = (
            (PAPER_PAIRS * pair + PAPER_DEMONSTRATIONS * demonstration)
            * slowed
            / FLOPS_A_SECOND
            / devices
            / 3600
        )
        yield {
            "model": name, "trains": trains, "engine": engine, "devices": devices, "pairs_a_step": PAIRS * devices,
            "computing_s": f"{computing:.2f}", "sent_GB": f"{traffic[engine] / 1e9:.1f}", "sending_s": f"{sending:.2f}",
            "pairs_an_hour": round(3600 * PAIRS * devices / (computing + sending)),
            "paper_hours": f"{hours:.3f}", "paper_dollars": f"{hours * devices * DOLLARS_AN_HOUR:.0f}",
        }  # fmt: skip


def print_memory(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each model and what trains, a column for each way of sharing; the higher of the two peaks."""
    columns = [f"{engine}, {ranks}" if ranks > 1 else "alone" for engine, ranks in SHARED_BY]
    print(f"| GiB on a device | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for (name, trains), each in groupby(rows, key=itemgetter("model", "trains")):
        peaks = [f"{max(float(row['training']), float(row['looking'])):.0f}" for row in each]
        print(f"| {name}, {trains} | {' | '.join(peaks)} |")


def print_time(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each model, what trains and engine."""
    columns = [f"pairs an hour, {devices}" for devices in DEVICES]
    print(
        f"\n| | computes, s | sends, GB | within a node, s | between nodes, s | {' | '.join(columns)} | paper, min |"
    )
    print(f"|---|{'---:|' * (5 + len(DEVICES))}")
    for (name, trains, engine), each in groupby(rows, key=itemgetter("model", "trains", "engine")):
        near, far, *_ = every = list(each)
        speeds = " | ".join(f"{row['pairs_an_hour'] / 1e6:.1f} M" for row in every)
        print(
            f"| {name}, {trains}, {engine} | {near['computing_s']} | {near['sent_GB']} | {near['sending_s']} | "
            f"{far['sending_s']} | {speeds} | {60 * float(near['paper_hours']):.0f} |"
        )


def main() -> None:
    """Write both files anew and print what docs/scale.md shows of them."""
    memory: list[dict[str, Any]] = []
    time: list[dict[str, Any]] = []
    for name, trains in product(MODELS, TRAINS):
        step = planned_step(MODELS[name], TRAINS[trains])
        memory += memory_rows(name, trains, step)
        time += time_rows(name, trains, step)
    for path, rows in ((RESULTS / "scale-memory.csv", memory), (RESULTS / "scale-time.csv", time)):
        path.unlink(missing_ok=True)
        append_csv(path, rows)
    print_memory(memory)
    print_time(time)


if __name__ == "__main__":
    main()
