"""Head and training step at the shapes of real models on a CUDA device, in bfloat16, with LoRA and a trained head.

    python -m benchmarks.gpu [--model llama-3.2-3b qwen3-4b gemma-3-4b] [--pairs 4] [--repeats 5]
                             [--attention side_by_side flex varlen]
    python -m benchmarks.gpu --smoke

Random weights of the true shapes (they do not change the speed). First the heads, frozen and trained: hidden states to
log-probs and back. Then a whole step; each contender has the device to itself, in a process of its own. Model FLOPs
utilisation counts what the objective needs, without what is computed twice, against the rate of a large matrix product
measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import peers
from benchmarks.contenders import Contender, slimepo
from benchmarks.flops import step_flops
from benchmarks.memory import forget_peak, peak, settle
from benchmarks.record import append_csv, provenance
from benchmarks.rows import Lengths, cut_vocabulary, equal_rows
from benchmarks.worker import be_quiet, worker_context
from slimepo.errors import InputError
from slimepo.kernels import linear_logps
from slimepo.model.adapters import lora_config, untie_head
from slimepo.model.attention.table import PATHS

RESULTS = Path(__file__).parent / "results"

# Sizes of the config.json files of meta-llama/Llama-3.2-3B, Qwen/Qwen3-4B and google/gemma-3-4b-pt (its text
# part) on the Hugging Face Hub.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 199,
}
# Rows of 2,048 tokens.
LENGTHS, TINY_LENGTHS = Lengths(512, 1536, 1536), Lengths(24, 16, 16)
# The response tokens of four such pairs.
HEAD_TOKENS = 12_288

BASELINE = "slimepo shared"
CONTENDERS: dict[str, Contender] = {
    BASELINE: Contender(functools.partial(slimepo, layout="shared"), "prompts computed once"),
    "slimepo packed": Contender(functools.partial(slimepo, layout="packed"), "no padding"),
    "slimepo padded": Contender(functools.partial(slimepo, layout="padded"), "padded rows"),
    "TRL DPO as shipped": Contender(functools.partial(peers.trl_dpo), "reference: the adapter switched off"),
    "TRL DPO at its best": Contender(functools.partial(peers.trl_dpo, best=True), "reference known"),
    "TRL SimPO": Contender(peers.trl_simpo, "CPOTrainer, loss simpo, cpo_alpha 0"),
}
# "slimepo shared" attends along the path that it measures to be the fastest; these attend along one that is given.
MEASURED = tuple(name for name, path in PATHS.items() if path.measured)
ALONG: dict[str, Contender] = {
    f"{BASELINE}, {path}": Contender(
        functools.partial(slimepo, layout="shared", attention=path), f"attention {path}"
    )
    for path in PATHS
}


@dataclass(frozen=True)
class Job:
    """One contender with one model; all contenders compute their activations again, or none does."""

    contender: str
    model: dict[str, Any]
    lengths: Lengths
    pairs: int
    repeats: int
    rank: int
    checkpointing: bool


@dataclass(frozen=True)
class Result:
    """Median seconds of a step, the most bytes over what the idle model holds, and the loss; or why there is none."""

    seconds: float = 0.0
    extra_bytes: int = 0
    loss: float = 0.0
    failed: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, or say why it cannot run here."""
    args = _arguments(arguments)
    console = Console(width=None if Console().is_terminal else 140)
    if not args.smoke and not torch.cuda.is_available():
        console.print(
            "skipped: this benchmark needs a CUDA device and torch sees none here; "
            "--smoke runs it with tiny shapes on the CPU"
        )
        return
    out = args.out or RESULTS / ("gpu-smoke.csv" if args.smoke else "step-gpu.csv")
    rate = matmul_rate(256 if args.smoke else 8192)
    console.print(f"{_device_name()}: matrix products at {rate / 1e12:.3g} TFLOP/s", highlight=False)
    for name in args.model:
        model = MODELS[name] | (_TINY if args.smoke else {})
        head = out.with_name(f"head-{out.name.removeprefix('step-')}")
        _heads(name, model, rate, head, args, console)
        _forget()  # the steps have the device to themselves
        _steps(name, model, rate, out, args, console)
    console.print(f"appended to {out}")


def matmul_rate(size: int) -> float:
    """FLOP/s of a square bfloat16 product (float32 on a CPU), the best of several."""
    device, dtype = _device()
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(_timed(lambda: one @ two)[0] for _ in range(10))
    return 2 * size**3 / seconds


def heads() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Ways from hidden states `[N, H]`, head `[V, H]` and targets `[N]` to log-probs `[N]`, by name."""
    return {
        "slimepo": linear_logps,
        "slimepo chunked": functools.partial(linear_logps, impl="chunked"),
        "TRL's fused head": peers.trl_head,
        "cut-cross-entropy": peers.apple_head,
        "full log-softmax": functools.partial(linear_logps, impl="naive"),
    }


def head_step(name: str, model: dict[str, Any], tokens: int, trained: bool, repeats: int) -> Result:
    """A head forward and backward under bfloat16 autocast, its weights in float32 where it trains."""
    device, dtype = _device()
    torch.manual_seed(0)
    hidden = torch.randn(tokens, model["hidden_size"], device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(model["vocab_size"], model["hidden_size"], device=device).mul_(0.02)
    weight = weight.requires_grad_() if trained else weight.to(dtype)
    targets = torch.randint(model["vocab_size"], (tokens,), device=device)
    # An objective hands every token its own gradient.
    upstream = torch.randn(tokens, device=device)

    def step() -> float:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logps = heads()[name](hidden, weight, targets)
        logps.float().backward(upstream)
        return logps.mean().item()

    try:
        mean = step()
        hidden.grad = weight.grad = None
        idle = _forget()
        timed = [_timed(step) for _ in range(repeats)]
    except torch.OutOfMemoryError as error:
        return Result(failed=f"out of memory: {str(error).splitlines()[0]}")
    except peers.PeerAbsentError as error:
        return Result(failed=str(error))
    return Result(statistics.median(seconds for seconds, _ in timed), _peak() - idle, mean)


def run_contender(job: Job) -> Result:
    """Build one contender and measure its steps (in a process of its own)."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _run(job, Path(folder))
    except torch.OutOfMemoryError as error:
        return Result(failed=f"out of memory: {str(error).splitlines()[0]}")
    except (peers.PeerAbsentError, InputError) as error:
        return Result(failed=str(error))


def _run(job: Job, folder: Path) -> Result:
    from transformers import AutoConfig, AutoModelForCausalLM

    be_quiet()
    torch.set_num_threads(1)
    device, dtype = _device()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**job.model), dtype=dtype)
    untie_head(model)
    rows = cut_vocabulary(equal_rows(job.pairs, job.lengths), job.model["vocab_size"])
    setup = peers.Setup([rows], folder, bf16=device.type == "cuda", adapter=lora_config(r=job.rank))
    build: Callable[..., peers.Step] = (CONTENDERS | ALONG)[job.contender].build
    step = build(model, setup, checkpointing=job.checkpointing)
    losses = [step()]
    idle = _forget()
    timed = [_timed(step) for _ in range(job.repeats)]
    return Result(statistics.median(seconds for seconds, _ in timed), _peak() - idle, losses[0])


def _steps(
    name: str, model: dict[str, Any], rate: float, out: Path, args: argparse.Namespace, console: Console
) -> None:
    lengths = TINY_LENGTHS if args.smoke else LENGTHS
    jobs = [
        Job(
            contender,
            model,
            lengths,
            args.pairs,
            args.repeats,
            args.rank,
            not args.no_checkpointing,
        )
        for contender in [*CONTENDERS, *(f"{BASELINE}, {path}" for path in args.attention)]
    ]
    table = Table(
        title=f"{name}: {args.pairs} pairs of {lengths.prompt} + {lengths.chosen} tokens",
        title_justify="left",
    )
    for heading in ("contender", "pairs/s", "time", "MFU", "extra GB", "runs"):
        table.add_column(heading)
    base = 0.0
    for job in jobs:
        contender, result = job.contender, _in_own_process(job)
        base = result.seconds if contender == BASELINE else base
        if result.failed:
            table.add_row(contender, "-", "-", "-", "-", result.failed)
            continue
        needed = step_flops(model, lengths, args.pairs, args.rank, shared=contender.startswith(BASELINE))
        row = {
            "contender": contender,
            "seconds": round(result.seconds, 5),
            "pairs_per_s": round(args.pairs / result.seconds, 4),
            "times_baseline": _times(result.seconds, base),
            "needed_tflop": round(needed / 1e12, 4),
            "mfu": round(needed / result.seconds / rate, 4),
            "extra_gb": round(result.extra_bytes / 1e9, 3),
            "loss": result.loss,
        }
        # At once: a run that is cut off has not been for nothing.
        append_csv(out, [_shape(name, model, lengths, args, rate) | row])
        console.print(
            f"{contender}: {row['pairs_per_s']:.3g} pairs/s, {row['extra_gb']:.2f} GB", highlight=False
        )
        table.add_row(
            contender,
            f"{row['pairs_per_s']:.3g}",
            f"{row['times_baseline']}x",
            f"{row['mfu']:.0%}",
            f"{row['extra_gb']:.2f}",
            (CONTENDERS | ALONG)[contender].runs,
        )
    console.print(table)


def _shape(
    name: str, model: dict[str, Any], lengths: Lengths, args: argparse.Namespace, rate: float
) -> dict[str, Any]:
    return provenance() | {
        "device": _device_name(),
        "matmul_tflops": round(rate / 1e12, 3),
        "model": name,
        "hidden": model["hidden_size"],
        "layers": model["num_hidden_layers"],
        "vocabulary": model["vocab_size"],
        "lora_rank": args.rank,
        "checkpointing": not args.no_checkpointing,
        "pairs": args.pairs,
        "prompt_tokens": lengths.prompt,
        "response_tokens": lengths.chosen,
        "repeats": args.repeats,
    }


def _heads(
    name: str, model: dict[str, Any], rate: float, out: Path, args: argparse.Namespace, console: Console
) -> None:
    tokens = 512 if args.smoke else HEAD_TOKENS
    table = Table(title=f"{name}: head at {tokens:,} tokens, forward and backward", title_justify="left")
    for heading in ("head", "", "ms", "time", "extra GB", "mean log-prob"):
        table.add_column(heading)
    for trained in (False, True):
        kind = "trained" if trained else "frozen"
        base = 0.0
        for head in heads():
            result = head_step(head, model, tokens, trained, args.repeats)
            base = result.seconds if head == "slimepo" else base
            if result.failed:
                table.add_row(head, kind, "-", "-", "-", result.failed)
                continue
            row = {
                "device": _device_name(), "matmul_tflops": round(rate / 1e12, 3), "model": name,
                "hidden": model["hidden_size"], "vocabulary": model["vocab_size"], "tokens": tokens,
                "head": kind, "contender": head, "repeats": args.repeats, "ms": round(1e3 * result.seconds, 3),
                "times_baseline": _times(result.seconds, base), "extra_gb": round(result.extra_bytes / 1e9, 3),
                "mean_logp": result.loss,
            }  # fmt: skip
            append_csv(out, [provenance() | row])
            figures = (f"{row['ms']:.4g}", f"{row['times_baseline']}x", f"{row['extra_gb']:.2f}")
            table.add_row(head, kind, *figures, f"{result.loss:.4f}")
    console.print(table)


def _times(seconds: float, base: float) -> float | str:
    """How many times the baseline's seconds; nothing where the baseline failed."""
    return round(seconds / base, 3) if base else ""


def _in_own_process(job: Job) -> Result:
    # A fresh process gives all of the device's memory back, which an allocator's cache would not. A forked one cannot
    # use CUDA where a library of the fork server's has started it.
    context = worker_context(threads=1, start="spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run_contender, job).result()


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    _wait()
    start = time.perf_counter()
    result = function()
    _wait()
    return time.perf_counter() - start, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget() -> int:
    """Bytes held now; what `_peak` reports starts from here."""
    if not torch.cuda.is_available():
        idle = settle()
        forget_peak()
        return idle
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak()


def _device() -> tuple[torch.device, torch.dtype]:
    cuda = torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a forward pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument(
        "--no-checkpointing", action="store_true", help="no contender computes activations again"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, wherever it runs")
    parser.add_argument(
        "--attention",
        nargs="*",
        choices=list(PATHS),
        help="measure shared rows with these paths too (default: those that training measures; none with --smoke)",
    )
    parser.add_argument("--out", type=Path, help="CSV file to append to (benchmarks/results/...)")
    args = parser.parse_args(arguments)
    if args.attention is None:
        args.attention = () if args.smoke else MEASURED
    return args


if __name__ == "__main__":
    main()
