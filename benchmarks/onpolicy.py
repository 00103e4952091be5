"""On-policy steps beside TRL's GRPOTrainer, and what sharing a prompt over its samples saves.

    python -m benchmarks.onpolicy [--steps 6] [--repeats 3] [--prompt 60] [--response 48]
    python -m benchmarks.onpolicy --sharing

Both trainers sample from the same random Llama in float32, answer the same prompts with as many samples of as many
tokens (a random model says no end), are rewarded by the length of the text, and train with GRPO's loss. Each run has a
process of its own; they take turns. Times are seconds a step: the trainer's `train` as a whole, in it writing answers
with their texts (sample) and the reward's calls (reward), and all the rest (train): log-probs, gradients, optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import append_csv, provenance

RESULTS = Path(__file__).parent / "results"
SAMPLES = 8
CONTENDERS = ("slimepo", "TRL")
PARTS = ("seconds", "sample", "reward", "train")


def model_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    """A random Llama of 3.6M parameters over a byte-level tokenizer that it shares with both trainers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<end>", *alphabet, *(f"<unused{i}>" for i in range(4096 - 2 - len(alphabet)))]
    bare = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<end>")
    end = "{% if m['role'] == 'assistant' %}<end>{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def prompts(count: int, length: int) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"{i:03d} ".ljust(length, "x")}]} for i in range(count)]


def run_ours(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    from slimepo.training.config import PreferenceConfig
    from slimepo.training.trainer import PreferenceTrainer

    model, tokenizer = model_and_tokenizer(folder)
    config = PreferenceConfig(
        output_dir=str(folder), loss="grpo", rollouts={"samples": SAMPLES, "max_new_tokens": args.response},
        per_device_train_batch_size=args.prompts, max_steps=args.steps, learning_rate=1e-6, max_grad_norm=1.0,
        logging_steps=1000, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, use_cpu=True,
    )  # fmt: skip

    def reward(prompt: Any, completions: list[str], row: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    rows = prompts(args.prompts * args.steps, args.prompt)
    trainer = PreferenceTrainer(model, config, rows, processing_class=tokenizer, reward=reward)
    whole = timed(trainer.train) / args.steps
    logged = trainer.state.log_history[0]
    return split(whole, logged["time/sample"], logged["time/reward"])


def run_trl(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = model_and_tokenizer(folder)
    config = GRPOConfig(
        output_dir=str(folder), num_generations=SAMPLES, max_completion_length=args.response, loss_type="grpo",
        per_device_train_batch_size=args.prompts * SAMPLES, max_steps=args.steps, learning_rate=1e-6, beta=0.0,
        gradient_accumulation_steps=1, gradient_checkpointing=False, logging_steps=1000, save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=False, use_cpu=True,
    )  # fmt: skip

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(turns[0]["content"])) for turns in completions]

    rows = Dataset.from_list(prompts(args.prompts * args.steps, args.prompt))
    trainer = GRPOTrainer(model, reward, args=config, train_dataset=rows, processing_class=tokenizer)
    spent = dict.fromkeys(("_generate", "_calculate_rewards"), 0.0)

    def watch(name: str, method: Any) -> None:
        def watched(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            value = method(*given, **named)
            spent[name] += time.perf_counter() - started
            return value

        setattr(trainer, name, watched)

    for name in spent:
        watch(name, getattr(trainer, name))
    whole = timed(trainer.train) / args.steps
    return split(whole, *(seconds / args.steps for seconds in spent.values()))


def timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def split(whole: float, sample: float, reward: float) -> dict[str, float]:
    return dict(zip(PARTS, (whole, sample, reward, whole - sample - reward), strict=True))


def compare(args: argparse.Namespace, console: Console) -> None:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(args.repeats):
        for name in CONTENDERS if turn % 2 == 0 else CONTENDERS[::-1]:
            command = [sys.executable, "-m", "benchmarks.onpolicy", "--one", name]
            for key in ("steps", "prompts", "prompt", "response"):
                command += [f"--{key}", str(getattr(args, key))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            console.print(f"{name}: {runs[name][-1]['seconds']:.3f} s a step")
    table = Table("", "seconds a step", "sample", "reward", "train", "samples a second")
    rows = []
    for name, found in runs.items():
        middle = {part: statistics.median(run[part] for run in found) for part in PARTS}
        speed = args.prompts * SAMPLES / middle["seconds"]
        table.add_row(name, *(f"{value:.3f}" for value in middle.values()), f"{speed:.1f}")
        setting = {key: getattr(args, key) for key in ("prompts", "prompt", "response", "steps", "repeats")}
        times = {part: round(value, 4) for part, value in middle.items()}
        rows.append(provenance() | {"contender": name, **setting, "samples": SAMPLES, **times})
    console.print(table)
    append_csv(RESULTS / "onpolicy-cpu.csv", rows)


def sharing(args: argparse.Namespace, console: Console) -> None:
    """Tokens computed and seconds of a training step on groups of samples, by layout and length of the prompt."""
    import numpy as np
    import torch

    from slimepo.data.batch import StepCollator
    from slimepo.data.rows import Row
    from slimepo.losses import count, find_objective, step_loss
    from slimepo.losses.table import bind
    from slimepo.model.logps import install_logps, response_logps
    from slimepo.model.tryout import choose_layout
    from slimepo.training.step import output_of

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = model_and_tokenizer(Path(folder))
    install_logps(model)
    objective, loss = find_objective("grpo"), bind("grpo", {})
    random = np.random.default_rng(0)
    table = Table("prompt", "layout", "tokens computed", "seconds a step")
    rows = []
    for length in (100, 1000):
        groups = [
            Row(
                random.integers(2, 4096, length, dtype=np.int32),
                tuple(random.integers(2, 4096, 100, dtype=np.int32) for _ in range(SAMPLES)),
                {"advantages": random.normal(size=SAMPLES).astype(np.float32)},
                str(number),
            )
            for number in range(2)
        ]
        for layout in ("padded", "packed", "shared"):
            choose_layout(model, layout, tuple(range(SAMPLES)))
            batch = StepCollator(2, tuple(range(SAMPLES)), layout=layout).batch(groups)
            times = []
            for _ in range(args.repeats + 1):
                started = time.perf_counter()
                output = output_of(objective, loss, response_logps(model, batch), batch, None, None)
                step_loss(output, count(_all_there(batch))).backward()
                times.append(time.perf_counter() - started)
            middle, tokens = statistics.median(times[1:]), batch["input_ids"].numel()
            table.add_row(f"{length:,}", layout, f"{tokens:,}", f"{middle:.3f}")
            rows.append(
                provenance()
                | {"prompt": length, "response": 100, "samples": SAMPLES, "groups": 2, "layout": layout}
                | {"tokens": tokens, "seconds": round(middle, 4)}
            )
    console.print(table)
    append_csv(RESULTS / "onpolicy-sharing-cpu.csv", rows)


def _all_there(batch: Any) -> Any:
    import torch

    from slimepo.data.batch import sample_logps

    return sample_logps(torch.zeros(len(batch["targets"])), batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--prompt", type=int, default=60, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=48, help="tokens of a sample")
    parser.add_argument(
        "--sharing", action="store_true", help="measure the layouts of a training step instead"
    )
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps((run_ours if args.one == "slimepo" else run_trl)(args, Path(folder))))
    elif args.sharing:
        sharing(args, Console())
    else:
        compare(args, Console())


if __name__ == "__main__":
    main()
