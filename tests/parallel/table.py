"""The table of docs/scale.md: how far every engine is from one rank, `python -m tests.parallel.table [RANKS]`.

Every cell of `worker` is trained alone and under each engine; printed are the largest relative differences.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.parallel import worker

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def run(engine: str, ranks: int, folder: Path) -> dict[str, Any]:
    """What the first rank tells of each cell."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launch, worker.__file__, str(folder), engine, *worker.cells()]
    subprocess.run(command, check=True, capture_output=True)
    return {cell: json.loads((folder / f"{cell}-0.json").read_text()) for cell in worker.cells()}


def differences(found: Mapping[str, Any], alone: Mapping[str, Any]) -> tuple[float, float]:
    """The largest difference of a loss, as a share of the largest loss; of all that moved, as a share of its norm."""
    losses = [torch.tensor(each["losses"]) for each in (found, alone)]
    moved = [
        torch.cat([torch.tensor(each["moved"][name]) for name in alone["moved"]]) for each in (found, alone)
    ]
    loss = (losses[0] - losses[1]).abs().max() / losses[1].abs().max().clamp(min=1e-3)
    return loss.item(), ((moved[0] - moved[1]).norm() / moved[1].norm()).item()


def table(found: Mapping[str, Mapping[str, Any]], alone: Mapping[str, Any]) -> list[str]:
    """A line for each kind of training, a column an engine: the worse of one and several micro-batches a step."""
    kinds = list(dict.fromkeys(cell.rpartition("-")[0] for cell in alone))
    lines = [f"| {' | '.join(['', *found])} |", "|---|" + "---:|" * len(found)]
    for kind in kinds:
        cells: Sequence[str] = [cell for cell in alone if cell.rpartition("-")[0] == kind]
        columns = []
        for of_engine in found.values():
            worst = [
                max(pair) for pair in zip(*(differences(of_engine[c], alone[c]) for c in cells), strict=True)
            ]
            columns.append(f"{worst[0]:.0e}, {worst[1]:.0e}")
        lines.append(f"| {' | '.join([kind.replace('-', ', '), *columns])} |")
    return lines


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            (Path(folder) / engine).mkdir()
        found = {engine: run(engine, ranks, Path(folder) / engine) for engine in ENGINES}
    print("\n".join(table(found, {cell: worker.train(cell, "alone", 1) for cell in worker.cells()})))
