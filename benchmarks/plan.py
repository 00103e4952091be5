"""`slimepo plan` beside what training really takes: estimate and measured peak for recipes of many shapes.

    python -m benchmarks.plan [--only NAME ...] [--allocator exact]

Every recipe trains some steps through slimepo's own trainer, optimizer included, in a process of its own. On a CPU
measured is the most that is resident while it trains over what the process held before the model was made; `exact` lets
glibc give every freed tensor back at once, so that the figure is that of the tensors, and `default` leaves glibc as
users have it. On a CUDA device the recipes have the shapes of real models; measured is the most that its tensors took,
`reserved` what the allocator held for them, and `context` what the driver held beside that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.record import append_csv, provenance

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
STEPS = 2

ALLOCATORS = {
    "exact": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    "default": {},
}


@dataclass(frozen=True)
class Case:
    """A model's shape and a recipe's keys; one stage."""

    model: dict[str, Any]
    stage: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    max_length: int = 256


def _llama(vocabulary: int, hidden: int, layers: int, tied: bool, **more: Any) -> dict[str, Any]:
    sizes = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }
    return sizes | more


_QWEN = {"model_type": "qwen3"}
_GEMMA = {"model_type": "gemma3_text", "sliding_window": 128, "query_pre_attn_scalar": 64}
_LORA, _FROZEN_HEAD = {"r": 16}, {"r": 16, "train_head": False}
_CHECKPOINTED = {"activation_checkpointing": True}

CASES = {
    "whole, tied, 4k, shared": Case(_llama(4096, 512, 8, True)),
    "whole, untied, 32k, padded": Case(_llama(32768, 256, 8, False), {"args": {"layout": "padded"}}),
    "whole, tied, 150k, shared": Case(_llama(151936, 256, 4, True, **_QWEN)),
    "whole, tied, 32k, checkpointed": Case(
        _llama(32768, 256, 12, True),
        {"args": _CHECKPOINTED, "batch_size": 16, "micro_batch_size": 8},
        max_length=384,
    ),
    "whole, tied, 32k, one micro-batch": Case(
        _llama(32768, 256, 8, True), {"batch_size": 4, "micro_batch_size": 4}
    ),
    "LoRA, trained head, 32k, shared": Case(_llama(32768, 384, 8, True, **_QWEN), adapter=_LORA),
    "LoRA, frozen head, 150k, shared": Case(_llama(151936, 256, 8, True, **_QWEN), adapter=_FROZEN_HEAD),
    "LoRA, frozen head, 4k, long rows": Case(
        _llama(4096, 384, 8, False), {"micro_batch_size": 1}, _FROZEN_HEAD, max_length=1024
    ),
    "LoRA, trained head, 150k, checkpointed": Case(
        _llama(151936, 256, 8, True), {"args": _CHECKPOINTED}, _LORA, max_length=512
    ),
    "LoRA, trained head, 32k, padded": Case(
        _llama(32768, 256, 8, True, **_QWEN), {"args": {"layout": "padded"}}, _LORA
    ),
    # Budgets that pairs of 511 tokens fill.
    "LoRA, windows of 128, budget 1,022": Case(
        _llama(32768, 256, 12, True, **_GEMMA), {"args": {"max_tokens_per_batch": 1022}}, _LORA
    ),
    "LoRA, windows of 128, budget 2,555": Case(
        _llama(32768, 256, 12, True, **_GEMMA), {"args": {"max_tokens_per_batch": 2555}}, _LORA
    ),
    "whole, sft, tied, 32k, packed": Case(
        _llama(32768, 384, 8, True), {"loss": "sft", "batch_size": 16, "micro_batch_size": 8}
    ),
}

_LLAMA_3B, _QWEN_4B, _GEMMA_4B = (gpu.MODELS[name] for name in ("llama-3.2-3b", "qwen3-4b", "gemma-3-4b"))
_PAPER, _PAPER_FROZEN = {"r": 64}, {"r": 64, "train_head": False}
# Two micro-batches a step.
_TWO = {"batch_size": 4, "micro_batch_size": 2}
_BIG = {"batch_size": 8, "micro_batch_size": 4}

# Rows of 2,048 tokens, both answers as long as they may be.
GPU_CASES = {
    "llama-3.2-3b, LoRA, trained head": Case(_LLAMA_3B, _TWO, _PAPER, 2048),
    "llama-3.2-3b, LoRA, frozen head": Case(_LLAMA_3B, _TWO, _PAPER_FROZEN, 2048),
    "llama-3.2-3b, LoRA, checkpointed": Case(_LLAMA_3B, _BIG | {"args": _CHECKPOINTED}, _PAPER, 2048),
    "llama-3.2-3b, LoRA, side by side": Case(
        _LLAMA_3B, _TWO | {"args": {"attention": "side_by_side"}}, _PAPER, 2048
    ),
    "llama-3.2-3b, LoRA, padded": Case(_LLAMA_3B, _TWO | {"args": {"layout": "padded"}}, _PAPER, 2048),
    "llama-3.2-3b, whole": Case(_LLAMA_3B, _BIG | {"args": _CHECKPOINTED}, None, 1024),
    "qwen3-4b, LoRA, trained head": Case(_QWEN_4B, _TWO, _PAPER, 2048),
    "qwen3-4b, LoRA, budget 8,192": Case(
        _QWEN_4B, _TWO | {"args": {"max_tokens_per_batch": 8192}}, _PAPER, 2048
    ),
    "gemma-3-4b, LoRA, trained head": Case(_GEMMA_4B, _TWO, _PAPER, 2048),
    "gemma-3-4b, LoRA, offloaded": Case(
        _GEMMA_4B, _BIG | {"args": {"activation_checkpointing": "offload"}}, _PAPER_FROZEN, 2048
    ),
}


def recipe_values(case: Case, model: Path) -> dict[str, Any]:
    """The case as a recipe's keys, its model's configuration in a folder."""
    stage = {"loss": "slime", "batch_size": 8, "micro_batch_size": 4, "max_steps": STEPS, "epochs": 100}
    stage |= case.stage
    # A plan is of the training steps.
    alone = {"logging_strategy": "no", "save_strategy": "no", "certificate": False}
    stage["args"] = alone | stage.get("args", {})
    return {
        "model": str(model),
        "adapter": case.adapter or "none",
        "data": {"path": "none", "max_length": case.max_length},
        "stages": [stage],
    }


def compare(case: Case, allocator: str = "exact") -> dict[str, int]:
    """Estimated bytes by part and together, and what was measured, in a process of its own."""
    from slimepo.pipeline.recipe.read import make_recipe
    from slimepo.plan.plan import PARTS, find_device, plan_recipe

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        values = recipe_values(case, path)
        (path / "config.json").write_text(json.dumps(case.model))
        (path / "recipe.json").write_text(json.dumps(values))
        (plan,) = plan_recipe(make_recipe(values), find_device(None))
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | ALLOCATORS[allocator]
        command = [sys.executable, "-m", "benchmarks.plan", "--worker", folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the measuring process failed:\n{done.stderr}")
        estimate = {part: getattr(plan, part) for part in ("tokens", *PARTS, "total")}
        measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return estimate | measured


def _measure(folder: Path) -> dict[str, int]:
    """Bytes while the folder's recipe trains: `measured`, and on a CUDA device `reserved` and `context`."""
    from benchmarks.memory import forget_peak, peak, settle

    values = json.loads((folder / "recipe.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    # Once with a tiny model, so that libraries and threads are there before anything is measured.
    width = 16 * config["num_attention_heads"]
    tiny = config | {"vocab_size": 128, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2}
    _trainer(values | {"data": values["data"] | {"max_length": 16}}, tiny, folder).train()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        free, size = torch.cuda.mem_get_info()
        context = size - free - torch.cuda.memory_reserved()
        trainer = _trainer(values, config, folder)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return {
            "measured": torch.cuda.max_memory_allocated() - before,
            "reserved": torch.cuda.max_memory_reserved() - before,
            "context": context,
        }
    before = settle()
    trainer = _trainer(values, config, folder)
    settle()
    forget_peak()
    trainer.train()
    return {"measured": peak() - before}


def _trainer(values: dict[str, Any], config: dict[str, Any], folder: Path) -> Any:
    import numpy as np
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.worker import be_quiet
    from slimepo.data.rows import Row
    from slimepo.pipeline.recipe.arguments import stage_arguments
    from slimepo.pipeline.recipe.read import make_recipe
    from slimepo.pipeline.start import base_dtype, lora
    from slimepo.training.trainer import PreferenceTrainer

    be_quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = make_recipe(values)
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return random.integers(2, config["vocab_size"], count).astype(np.int32)

    longest = recipe.data.max_length - 1
    rows = [
        Row(ids(1), (ids(longest), ids(longest)), id=f"row {i}")
        for i in range(recipe.stages[0].batch_size * STEPS)
    ]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=base_dtype(recipe))
    return PreferenceTrainer(
        model,
        stage_arguments(recipe, recipe.stages[0], folder),
        train_dataset=rows,
        peft_config=lora(recipe) if recipe.adapter else None,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and append to the CSV file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=(__doc__ or "").split("\n")[0]
    )
    cases, file = (GPU_CASES, "plan-gpu.csv") if torch.cuda.is_available() else (CASES, "plan-cpu.csv")
    parser.add_argument("--only", nargs="+", choices=list(cases), default=list(cases), metavar="NAME")
    parser.add_argument("--allocator", choices=list(ALLOCATORS), default="exact")
    parser.add_argument("--out", type=Path, default=RESULTS / file)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        print(json.dumps(_measure(args.worker)))
        return
    for name in args.only:
        answers = compare(cases[name], args.allocator)
        ratio = round(answers["total"] / answers["measured"], 4)
        row = {"case": name, "allocator": args.allocator} | answers | {"ratio": ratio}
        append_csv(args.out, [provenance() | row])
        sizes = "  ".join(f"{k} {v / MIB:.0f}" for k, v in answers.items() if k != "tokens")
        print(f"{name}: tokens {answers['tokens']}  {sizes}  estimate / measured {ratio}", flush=True)


if __name__ == "__main__":
    main()
