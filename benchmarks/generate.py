"""Greedy generation in left-padded batches, beside one length and one prompt at a time and beside transformers' own.

    python -m benchmarks.generate [--model FOLDER] [--prompts 64] [--new-tokens 64] [--rows 32] [--repeats 3]

Random prompts of 20 to 200 tokens; every answer has the same number of tokens, so that all contenders write as many.
They take turns in one process, on one thread. Without --model a random Llama of 3.6M parameters answers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.record import append_csv, provenance
from slimepo.model.generate import generate

RESULTS = Path(__file__).parent / "results" / "generate-cpu.csv"

Prompts = Sequence[list[int]]


def tiny_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=8, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip


def made_prompts(count: int, vocabulary: int) -> Prompts:
    """Lengths spread evenly over the octaves from 20 to 200."""
    generator = torch.Generator().manual_seed(0)
    lengths = (20 * 10 ** torch.rand(count, generator=generator)).long().tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def contenders(model: Any, new: int, rows: int) -> dict[str, Callable[[Prompts], object]]:
    options: dict[str, Any] = {"end_token_ids": [2**31 - 1], "max_new_tokens": new, "batch_rows": rows}

    def one_length(prompts: Prompts) -> None:
        for _, group in groupby(sorted(prompts, key=len), key=len):
            generate(model, list(group), **options)

    def transformers(prompts: Prompts) -> None:
        left = iter(prompts)
        while batch := list(islice(left, rows)):
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )

    return {
        "like lengths together": lambda prompts: generate(model, prompts, **options),
        "one length at a time": one_length,
        "one prompt at a time": lambda prompts: generate(model, prompts, **options | {"batch_rows": 1}),
        "transformers, as they come": transformers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder (default: a tiny random model)")
    for name, default in (("prompts", 64), ("new-tokens", 64), ("rows", 32), ("repeats", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model).eval() if given.model else tiny_model()
    prompts = made_prompts(given.prompts, model.config.vocab_size)
    running = contenders(model, given.new_tokens, given.rows)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(given.repeats):
        for name in list(running)[:: 1 if turn % 2 == 0 else -1]:
            start = time.process_time()
            running[name](prompts)
            seconds[name].append(time.process_time() - start)
    table = Table(
        "contender", "tokens a second of CPU time", title=f"{len(prompts)} prompts, {given.rows} rows"
    )
    results = []
    for name, took in seconds.items():
        rate = len(prompts) * given.new_tokens / statistics.median(took)
        table.add_row(name, f"{rate:,.0f}")
        results.append({
            "model": Path(given.model).name if given.model else "tiny", "contender": name, "prompts": len(prompts),
            "new_tokens": given.new_tokens, "rows": given.rows, "tokens_per_second": f"{rate:.1f}", **provenance(),
        })  # fmt: skip
    Console().print(table)
    append_csv(RESULTS, results)


if __name__ == "__main__":
    main()
