"""The head alone, forward and backward, side by side with its peers on this machine's CPU.

    python -m benchmarks.head [--quick] [--threads 1] [--repeats 5]

Hidden states to log-probs of given tokens and back, in float32, with a head that is frozen or trains. Contenders take
turns in one process, the order turned round every time. Memory is measured in a process of its own for each contender
and number of tokens. Before anything is timed, every contender's log-probs and gradients are held to the specification.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.memory import forget_peak, peak, settle
from benchmarks.record import append_csv, provenance
from slimepo.kernels import linear_logps, linear_logps_stats

RESULTS = Path(__file__).parent / "results" / "head-cpu.csv"
PEER = "cut-cross-entropy"

# A contender's results may differ from the specification's by this, relative to the largest value.
TOLERANCE = 1e-4

Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """`tokens` response tokens of width `hidden` against `vocabulary` tokens."""

    vocabulary: int
    hidden: int
    tokens: int


SHAPES = [
    Shape(vocabulary, hidden, tokens)
    for vocabulary, tokens in ((4096, 4096), (32768, 2048), (151936, 1024))
    for hidden in (64, 256)
]
MEMORY_SHAPES = [Shape(32768, 256, tokens) for tokens in (512, 1024, 2048, 4096, 8192)]
TINY = [Shape(512, 16, 64)]


def contenders() -> dict[str, Contender]:
    """Name -> log-probs `[N]` from hidden states, head and targets; Apple's only where its package is installed."""
    found: dict[str, Contender] = {
        "full log-softmax": _full_log_softmax,
        "F.cross_entropy": _cross_entropy,
        "slimepo chunked": lambda h, w, t: linear_logps(h, w, t, impl="chunked"),
        "slimepo chunked + stats": lambda h, w, t: linear_logps_stats(h, w, t, impl="chunked").logps,
    }
    peer = _cut_cross_entropy()
    return found if peer is None else {PEER: peer} | found


def _full_log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


def _cut_cross_entropy() -> Contender | None:
    """Its implementation for CPUs (`impl="torch_compile"`); its own kernels need a GPU."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return None

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")
        return -loss

    return logps


class Problem:
    """Random tensors of a shape; `step` runs a contender forward and backward."""

    def __init__(self, shape: Shape, trained: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(shape.tokens, shape.hidden, generator=generator).requires_grad_()
        weight = torch.randn(shape.vocabulary, shape.hidden, generator=generator) / shape.hidden**0.5
        self.weight = weight.requires_grad_(trained)
        self.targets = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=generator)
        # An objective hands every token its own gradient.
        self.upstream = torch.randn(shape.tokens, generator=generator)

    def step(self, contender: Contender) -> Tensor:
        self.hidden.grad = self.weight.grad = None
        logps = contender(self.hidden, self.weight, self.targets)
        logps.backward(self.upstream)
        return logps.detach()


@dataclass(frozen=True)
class Timing:
    """Medians of a forward and backward pass, in seconds."""

    cpu: float
    wall: float


def verify(names: dict[str, Contender], trained: bool) -> None:
    """Hold every contender to the specification on a small problem.

    Raises:
        SystemExit: one of them differs.
    """
    problem = Problem(Shape(1001, 31, 130), trained)

    def results(contender: Contender) -> list[Tensor]:
        logps = problem.step(contender)
        grads = [t.grad for t in (problem.hidden, problem.weight) if t.grad is not None]
        return [logps, *(grad.clone() for grad in grads)]

    expected = results(lambda h, w, t: linear_logps(h, w, t, impl="naive"))
    for name, contender in names.items():
        for actual, truth in zip(results(contender), expected, strict=True):
            if not (actual - truth).abs().max() <= TOLERANCE * truth.abs().max():
                raise SystemExit(f"{name} differs from the specification: nothing is timed")


def timings(names: dict[str, Contender], shape: Shape, trained: bool, repeats: int) -> dict[str, Timing]:
    """Contenders take turns, after one step each that does not count."""
    problem = Problem(shape, trained)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for contender in names.values():
        problem.step(contender)
    for turn in range(repeats):
        order = list(names)[:: 1 if turn % 2 == 0 else -1]
        for name in order:
            cpu, wall = time.process_time(), time.perf_counter()
            problem.step(names[name])
            runs[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: Timing(*(statistics.median(column) for column in zip(*values, strict=True)))
        for name, values in runs.items()
    }


def extra_bytes(name: str, shape: Shape, trained: bool, threads: int) -> int:
    """Peak memory of one step over the idle process, in a process of its own."""
    job = json.dumps({"name": name, "shape": asdict(shape), "trained": trained, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.head", "--measure", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: the process that measures its memory failed\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def _measure(job: dict[str, Any]) -> int:
    torch.set_num_threads(job["threads"])
    problem, contender = Problem(Shape(**job["shape"]), job["trained"]), contenders()[job["name"]]
    problem.step(contender)
    problem.hidden.grad = problem.weight.grad = None
    idle = settle()
    forget_peak()
    problem.step(contender)
    return peak() - idle


def time_rows(
    shapes: Sequence[Shape], threads: int, repeats: int, console: Console
) -> Iterator[dict[str, Any]]:
    """Print a table and give a CSV row for each contender, shape and kind of head."""
    names = contenders()
    for trained in (False, True):
        verify(names, trained)
        for shape in shapes:
            measured = timings(names, shape, trained, repeats)
            base = measured.get(PEER)
            table = Table(title=f"{'trained' if trained else 'frozen'} head, {shape}, {threads} thread(s)")
            for column in ("contender", "CPU s", "wall s", f"{PEER} / this, CPU", "wall"):
                table.add_column(column, justify="left" if column == "contender" else "right")
            for name, timing in measured.items():
                ratios = ("", "") if base is None else (base.cpu / timing.cpu, base.wall / timing.wall)
                shown = [ratio if ratio == "" else f"{ratio:.2f}" for ratio in ratios]
                table.add_row(name, f"{timing.cpu:.3f}", f"{timing.wall:.3f}", *shown)
                yield _row("time", name, shape, trained, threads) | {
                    "cpu_s": f"{timing.cpu:.4f}",
                    "wall_s": f"{timing.wall:.4f}",
                    "peer_over_this_cpu": shown[0],
                    "peer_over_this_wall": shown[1],
                    "extra_mib": "",
                    "gradients_mib": "",
                }
            console.print(table)


def memory_rows(shapes: Sequence[Shape], threads: int, console: Console) -> Iterator[dict[str, Any]]:
    """The same for peak extra memory, over the number of tokens."""
    names = contenders()
    for trained in (False, True):
        table = Table(title=f"{'trained' if trained else 'frozen'} head: peak MiB over the idle process")
        for column in ("tokens", "gradients", *names):
            table.add_column(column, justify="right")
        for shape in shapes:
            gradients = shape.hidden * (shape.tokens + (shape.vocabulary if trained else 0)) * 4 / 2**20
            extra = {name: extra_bytes(name, shape, trained, threads) / 2**20 for name in names}
            table.add_row(
                str(shape.tokens), f"{gradients:.0f}", *(f"{mebibytes:.0f}" for mebibytes in extra.values())
            )
            for name, mebibytes in extra.items():
                yield _row("memory", name, shape, trained, threads) | {
                    "cpu_s": "",
                    "wall_s": "",
                    "peer_over_this_cpu": "",
                    "peer_over_this_wall": "",
                    "extra_mib": f"{mebibytes:.1f}",
                    "gradients_mib": f"{gradients:.1f}",
                }
        console.print(table)


def _row(kind: str, name: str, shape: Shape, trained: bool, threads: int) -> dict[str, Any]:
    try:
        peer = version("cut-cross-entropy")
    except PackageNotFoundError:
        peer = "absent"
    head = "trained" if trained else "frozen"
    described = {"kind": kind, "contender": name, "head": head, **asdict(shape), "threads": threads}
    return provenance() | {"cut-cross-entropy": peer} | described


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes; nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(_measure(json.loads(arguments.measure)))
        return
    torch.set_num_threads(arguments.threads)
    console = Console()
    if PEER not in contenders():
        console.print(f"{PEER} is not installed: no ratios (pip install {PEER})")
    shapes, memory_shapes = (TINY, TINY) if arguments.quick else (SHAPES, MEMORY_SHAPES)
    rows = list(time_rows(shapes, arguments.threads, arguments.repeats, console))
    rows += memory_rows(memory_shapes, arguments.threads, console)
    if not arguments.quick:
        append_csv(RESULTS, rows)
        console.print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main()
