"""The table of docs/scale.md: how far every engine is from one rank; `python -m tests.parallel.table` writes it there.

Every cell of `worker` is trained alone and under each engine on two ranks; what is written are the largest relative
differences.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.parallel import worker

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
TRAINED = {"full": "all weights", "lora": "LoRA", "head": "LoRA and head"}
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
BEGIN, END = "<!-- engines -->", "<!-- end -->"


def run(engine: str, folder: Path) -> dict[str, Any]:
    """What the first of two ranks tells of each cell."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
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
    """A line for each kind of training and objective, a column an engine: the worst of its cells."""
    lines = [f"| {' | '.join(['', *found.keys()])} |", "|---|" + "---:|" * len(found)]
    for adapter, trained in TRAINED.items():
        for loss in worker.LOSSES:
            cells = [cell for cell in alone if cell.startswith(f"{adapter}-") and f"-{loss}-" in cell]
            columns = []
            for of_engine in found.values():
                apart = zip(*(differences(of_engine[c], alone[c]) for c in cells), strict=True)
                columns.append(", ".join(f"{max(each):.0e}" for each in apart))
            lines.append(f"| {' | '.join([f'{trained}, {loss}', *columns])} |")
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {engine: run(engine, Path(folder) / engine) for engine in ENGINES}
    lines = table(found, {cell: worker.train(cell, "alone", 1) for cell in worker.cells()})
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{chr(10).join(lines)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
    )
