"""One training step (forward and backward) of slimepo and its peers, side by side on this machine's CPU.

    python -m benchmarks.step [--quick] [--vocab 4096 32768] [--pairs 24] [--repeats 3] [--only TRL Liger]
    python -m benchmarks.step --grow

Every contender has a process of its own, the same random Llama model in float32, the same pairs and the same
micro-batches. One step is measured at a time; contenders take turns (A B C, C B A, ...). The optimizer's update
is left out: it is the same for all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import BASELINE, CONTENDERS, HEADS
from benchmarks.record import append_csv, provenance
from benchmarks.rows import Lengths, benchmark_rows, cut_vocabulary, equal_rows, mean_lengths, tiny_rows
from benchmarks.worker import Job, Run, Worker
from slimepo.data.rows import Row

RESULTS = Path(__file__).parent / "results"

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
}
TINY = MODEL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}

USUAL_ARGUMENTS = {"vocab": [4096, 32768], "pairs": 24, "micro_batch": 8, "repeats": 3}

# A growth curve varies one of these and leaves the others at the middle of the workload.
USUAL = {"pairs": 8, "response": 200, "prompt": 150, "vocabulary": 4096}
CURVES = {
    "pairs": (2, 4, 8, 16),
    "response": (50, 100, 200, 400, 800),
    "prompt": (50, 150, 450, 1350),
    "vocabulary": (1024, 4096, 16384, 65536),
}
GROWING = (BASELINE, "slimepo padded", "TRL DPO at its best", "TRL SimPO")

# Losses of the same objective on the same pairs; float32 in another order differs by less.
SAME_LOSS = 1e-4


@dataclass(frozen=True)
class Measured:
    """A contender's runs, or why there are none."""

    name: str
    runs: list[Run]
    absent: str | None = None

    @property
    def cpu(self) -> float:
        """Median seconds of process CPU time of a step."""
        return statistics.median(run.cpu for run in self.runs)

    @property
    def wall(self) -> float:
        """Median seconds of a step."""
        return statistics.median(run.wall for run in self.runs)

    @property
    def extra_mb(self) -> float:
        """Median of the most memory over the idle process, in MiB."""
        return statistics.median(run.extra_bytes for run in self.runs) / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its tables and append its rows to a CSV file."""
    args = _arguments(arguments)
    console = Console(width=None if Console().is_terminal else 140)
    stem = "step-quick.csv" if args.quick else "growth-cpu.csv" if args.grow else "step-cpu.csv"
    out = args.out or RESULTS / stem
    parts = (
        _growth(args, console)
        if args.grow
        else (_side_by_side(vocabulary, args, console) for vocabulary in args.vocab)
    )
    for rows in parts:
        # At once: a later part that fails must not take the figures of an earlier one with it.
        append_csv(out, rows)
        console.print(f"appended {len(rows)} rows to {out}")


def measure(jobs: Sequence[Job], repeats: int, console: Console) -> list[Measured]:
    """Every job `repeats` times, in turns, each in its own process.

    Raises:
        WorkerFailedError: a contender broke.
        ValueError: contenders of one objective disagree about its loss.
    """
    with _workers(jobs, console) as (workers, absent):
        results = {job.contender: Measured(job.contender, [], absent.get(job.contender)) for job in jobs}
        for repeat in range(repeats):
            for worker in workers if repeat % 2 == 0 else workers[::-1]:
                results[worker.job.contender].runs.append(worker.run())
            console.print(f"  turn {repeat + 1} of {repeats} done", highlight=False)
    for objective in ("slimepo", "SimPO"):
        _check_losses([m for name, m in results.items() if objective in name and m.runs])
    return list(results.values())


@contextmanager
def _workers(jobs: Sequence[Job], console: Console) -> Iterator[tuple[list[Worker], dict[str, str]]]:
    workers: list[Worker] = []
    absent: dict[str, str] = {}
    try:
        for job in jobs:
            worker = Worker(job)
            workers.append(worker)
            # One at a time: building is not measured, but two at once may not fit into memory.
            reason = worker.ready()
            if reason is not None:
                absent[job.contender] = reason
                console.print(f"  left out: {job.contender}: {reason}", highlight=False)
                workers.remove(worker)
                worker.stop()
        yield workers, absent
    finally:
        for worker in workers:
            worker.stop()


def _check_losses(group: Sequence[Measured]) -> None:
    losses = {measured.name: measured.runs[0].loss for measured in group}
    if losses and max(losses.values()) - min(losses.values()) > SAME_LOSS * abs(max(losses.values())):
        raise ValueError(f"contenders of one objective disagree about its loss: {losses}")


def _side_by_side(vocabulary: int, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    pairs, source = tiny_rows(args.pairs) if args.quick else benchmark_rows(args.pairs)
    pairs = cut_vocabulary(pairs, vocabulary)
    model = (TINY if args.quick else MODEL) | {"vocab_size": vocabulary}
    lengths = mean_lengths(pairs)
    title = (
        f"vocabulary {vocabulary:,}: {len(pairs)} pairs ({source}; mean tokens {lengths.prompt} prompt, "
        f"{lengths.chosen} chosen, {lengths.rejected} rejected), micro-batches of {args.micro_batch}"
    )
    console.print(title, highlight=False)
    jobs = [Job(name, pairs, args.micro_batch, model, args.threads) for name in _names(args)]
    results = measure(jobs, args.repeats, console)
    _print(results, len(pairs), title, console)
    shared = provenance() | {"source": source} | _shape(model, pairs, args.micro_batch, args.threads)
    return [shared | _figures(measured, results, len(pairs)) for measured in results if measured.runs]


def _growth(args: argparse.Namespace, console: Console) -> Iterator[list[dict[str, Any]]]:
    for curve, values in CURVES.items():
        table = Table(title=f"seconds of CPU time (MiB extra) by {curve}", title_justify="left")
        for heading in (curve, *GROWING):
            table.add_column(heading, justify="right")
        for value in values[:2] if args.quick else values:
            point = USUAL | {curve: value}
            lengths = Lengths(point["prompt"], point["response"], point["response"])
            pairs = equal_rows(2, Lengths(9, 7, 5)) if args.quick else equal_rows(point["pairs"], lengths)
            pairs = cut_vocabulary(pairs, point["vocabulary"])
            model = (TINY if args.quick else MODEL) | {"vocab_size": point["vocabulary"]}
            jobs = [Job(name, pairs, len(pairs), model, args.threads) for name in GROWING]
            results = measure(jobs, args.repeats, console)
            table.add_row(f"{value:,}", *(f"{m.cpu:.2f} ({m.extra_mb:,.0f})" for m in results))
            shared = provenance() | {"source": "equal lengths", "curve": curve, "value": value}
            shared |= _shape(model, pairs, len(pairs), args.threads)
            yield [shared | _figures(measured, results, len(pairs)) for measured in results]
        console.print(table)


def _names(args: argparse.Namespace) -> list[str]:
    everything = [*CONTENDERS, *(HEADS if args.heads else ())]
    if not args.only:
        return everything
    return [name for name in everything if name == BASELINE or any(part in name for part in args.only)]


def _shape(model: dict[str, Any], pairs: Sequence[Row], micro_batch: int, threads: int) -> dict[str, Any]:
    lengths = mean_lengths(pairs)
    return {
        "vocabulary": model["vocab_size"],
        "hidden": model["hidden_size"],
        "layers": model["num_hidden_layers"],
        "dtype": "float32",
        "threads": threads,
        "pairs": len(pairs),
        "micro_batch": micro_batch,
        "prompt_tokens": lengths.prompt,
        "chosen_tokens": lengths.chosen,
        "rejected_tokens": lengths.rejected,
    }


def _figures(measured: Measured, results: Sequence[Measured], pairs: int) -> dict[str, Any]:
    base = next(m for m in results if m.name == BASELINE)
    return {
        "contender": measured.name,
        "repeats": len(measured.runs),
        "cpu_s": round(measured.cpu, 4),
        "cpu_s_least": round(min(run.cpu for run in measured.runs), 4),
        "cpu_s_most": round(max(run.cpu for run in measured.runs), 4),
        "wall_s": round(measured.wall, 4),
        "pairs_per_cpu_s": round(pairs / measured.cpu, 4),
        "times_baseline": round(measured.cpu / base.cpu, 4),
        "extra_mib": round(measured.extra_mb, 1),
        "memory_times_baseline": round(measured.extra_mb / base.extra_mb, 4),
        "loss": measured.runs[0].loss,
    }


def _print(results: Sequence[Measured], pairs: int, title: str, console: Console) -> None:
    known = CONTENDERS | HEADS
    table = Table(title=title, title_justify="left", caption=f"times: against {BASELINE}, in this run")
    table.add_column("contender")
    for heading in ("pairs/s", "CPU time", "wall", "extra MiB", "memory"):
        table.add_column(heading, justify="right")
    table.add_column("runs")
    base = next(m for m in results if m.name == BASELINE)
    for measured in results:
        runs = known[measured.name].runs
        if measured.absent is not None:
            table.add_row(measured.name, "-", "-", "-", "-", "-", f"left out: {measured.absent}")
            continue
        table.add_row(
            measured.name,
            f"{pairs / measured.cpu:.2f}",
            f"{measured.cpu / base.cpu:.2f}x",
            f"{measured.wall / base.wall:.2f}x",
            f"{measured.extra_mb:,.0f}",
            f"{measured.extra_mb / base.extra_mb:.2f}x",
            runs,
        )
    console.print(table)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and a few pairs, to see that it runs"
    )
    parser.add_argument(
        "--grow", action="store_true", help="how cost grows with pairs, lengths and vocabulary"
    )
    parser.add_argument("--heads", action="store_true", help="each implementation of the head as well")
    parser.add_argument("--vocab", type=int, nargs="+", help="vocabulary sizes (4096 32768)")
    parser.add_argument("--pairs", type=int, help="pairs of a step (24)")
    parser.add_argument("--micro-batch", type=int, help="pairs of a forward pass (8, TRL's default)")
    parser.add_argument("--repeats", type=int, help="measured steps of each contender (3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", help=f"contenders with one of these in their name, and {BASELINE}"
    )
    parser.add_argument("--out", type=Path, help="CSV file to append to (benchmarks/results/...)")
    args = parser.parse_args(arguments)
    usual = {"vocab": [256], "pairs": 4, "micro_batch": 2, "repeats": 1} if args.quick else USUAL_ARGUMENTS
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
