"""Trains a tiny model for a few steps, alone or on each of two ranks, and tells what came of it.

As a program it takes a folder and names of JOBS, trains them one after the other and writes JOB-RANK.json for each.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from slimepo.data.rows import PAIR, length
from slimepo.errors import InputError, NonFiniteLossError
from slimepo.training.config import PreferenceConfig
from slimepo.training.steps import shared_out
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import letter_tokenizer, random_rows, tiny_model

SLIME = {"loss_options": {"rejected_mean": "token"}, "learning_rate": 1e-2}
JOBS: dict[str, dict[str, Any]] = {
    "random": {"train_sampling_strategy": "random", **SLIME},
    "group_by_length": {"train_sampling_strategy": "group_by_length", **SLIME},
    # It reads a reference and a mean over the whole step.
    "kto": {
        "train_sampling_strategy": "random", "loss": "kto", "loss_options": {"beta": 0.5}, "learning_rate": 0.3,
    },
    # Rows that count by their weights, 0 among them.
    "weights": {"train_sampling_strategy": "random", **SLIME},
    # Towards unlearning, with a monitor that ends the run.
    "stop": {
        "train_sampling_strategy": "random", "loss": "simpo", "loss_options": {"beta": 2.0, "gamma": 40.0},
        "monitor": {"every": 2, "stop_on": ["unlearning"]}, "learning_rate": 100.0,
    },
    # The same, cured by all ranks behind the same step; the first one alone has looked.
    "lower_rate": {
        "train_sampling_strategy": "random", "loss": "simpo", "loss_options": {"beta": 2.0, "gamma": 40.0},
        "monitor": {"every": 2, "on_unlearning": "lower-rate", "prompts": 0}, "learning_rate": 1.0, "max_steps": 5,
    },
    "raise_anchor": {
        "train_sampling_strategy": "random", "loss": "1*simpo+0.1*sft",
        "loss_options": {"simpo": {"beta": 2.0, "gamma": 40.0}},
        "monitor": {"every": 2, "on_unlearning": "raise-anchor", "prompts": 0}, "learning_rate": 1.0, "max_steps": 5,
    },
    # Answers of unequal lengths, whitened over all tokens of a step, with a reference and two steps a rollout.
    "reinforce_pp": {
        "loss": "reinforce_pp", "learning_rate": 0.3,
        "rollouts": {"samples": 3, "max_new_tokens": 9, "kl": 0.1, "steps_per_rollout": 2},
    },
    # The kinds of advantages, ratios and penalties; more than one step on a rollout; a value model.
    "grpo": {
        "loss": "grpo", "loss_options": {"kl": 0.3}, "learning_rate": 0.3, "reference": "copy", "max_steps": 4,
        "rollouts": {"samples": 3, "max_new_tokens": 9, "steps_per_rollout": 2},
    },
    "gspo": {
        "loss": "grpo/gspo", "loss_options": {"clip_low": 0.1, "clip_high": 0.1}, "learning_rate": 0.3,
        "rollouts": {"samples": 3, "max_new_tokens": 9, "epochs": 2, "skip_unfinished": True},
    },
    # A reward fails on one row, which one of the ranks has, and the row is passed over.
    "rloo": {
        "loss": "rloo", "learning_rate": 0.3, "max_steps": 3,
        "rollouts": {"samples": 3, "max_new_tokens": 9, "kl": 0.1, "on_error": "skip"},
    },
    "ppo": {
        "loss": "ppo", "learning_rate": 0.3,
        "rollouts": {"samples": 2, "max_new_tokens": 9, "epochs": 2, "value": {"learning_rate": 1e-3}},
    },
    "online_dpo": {
        "loss": "dpo", "learning_rate": 0.3, "reference": "copy", "max_steps": 4,
        "rollouts": {"samples": 3, "max_new_tokens": 9, "steps_per_rollout": 2, "pairs": "right-wrong"},
    },
    "online_kto": {
        "loss": "kto", "learning_rate": 0.3, "reference": "copy", "loss_options": {"beta": 0.5}, "max_steps": 3,
        "rollouts": {"samples": 3, "max_new_tokens": 9},
    },
    "xpo": {
        "loss": "xpo", "learning_rate": 0.3, "reference": "copy", "loss_options": {"alpha": 0.1}, "max_steps": 3,
        "rollouts": {"samples": 1, "max_new_tokens": 9, "against": "mixture"},
    },
    # A gate of all ranks' costs: without it rank 1 would take another one's.
    "cost": {
        "loss": "rloo", "learning_rate": 0.3, "max_steps": 3,
        "rollouts": {"samples": 3, "max_new_tokens": 9, "cost": {"limit": 8.05, "weight": 0.5, "window": 2}},
    },
    # The same, and the run ends.
    "fails": {"loss": "grpo", "rollouts": {"samples": 2, "max_new_tokens": 4}},
    # Some prompts give no pair.
    "online": {"loss": "slime", "learning_rate": 0.1, "rollouts": {"samples": 2, "max_new_tokens": 9}},
    # One row is spoilt.
    "poison": {"train_sampling_strategy": "sequential", **SLIME},
    # The certificate: what becomes of a run without it, and of engines that are broken.
    "uncertified": {"train_sampling_strategy": "random", "certificate": False, **SLIME},
    "unreduced": {"train_sampling_strategy": "random", **SLIME},
    "lost": {"train_sampling_strategy": "random", **SLIME},
}  # fmt: skip


def prompts(count: int) -> list[dict[str, Any]]:
    """Of unequal lengths."""
    return [{"prompt": "abcdefghij"[: 1 + i % 7] + "ABCDE"[i % 5], "id": f"p{i}"} for i in range(count)]


def vowels(prompt: Any, completions: Sequence[str], row: Any) -> list[float]:
    return [float(sum(letter in "aeiouAEIOU" for letter in text)) for text in completions]


def price(prompt: Any, completions: Sequence[str], row: Any) -> list[float]:
    """The number of the prompt, and a little for each character."""
    return [int(row["id"][1:]) + 0.01 * len(text) for text in completions]


def picky(prompt: Any, completions: Sequence[str], row: Any) -> list[float]:
    if row["id"] == "p5":
        raise ValueError("no such letter")
    return vowels(prompt, completions, row)


def broken(job: str, trainer: PreferenceTrainer) -> Any:
    """Inside, no gradient is averaged over ranks, or what the last rank computes is lost."""
    if job == "unreduced":
        # As within DDP's no_sync, for good.
        never = property(lambda self: False, lambda self, value: None)
        return patch.object(
            torch.nn.parallel.DistributedDataParallel, "require_backward_grad_sync", never, create=True
        )
    if job == "lost" and trainer.accelerator.process_index == 1:
        backward = trainer.accelerator.backward
        return patch.object(trainer.accelerator, "backward", lambda value: backward(0 * value))
    return nullcontext()


def train(job: str, ranks: int) -> dict[str, Any]:
    """Six steps of 8 rows (or the job's own number), the third of them short: losses, weights, the score of held-out
    pairs; or the error that ended it."""
    rows, model = random_rows(17), tiny_model()
    reward = picky if job in ("fails", "rloo") else vowels
    sampled = {"processing_class": letter_tokenizer(), "reward": reward} if "rollouts" in JOBS[job] else {}
    if job == "cost":
        sampled["cost"] = price
    if job == "weights":
        rows = [replace(row, values={"weight": i % 4 / 2}) for i, row in enumerate(rows)]
    if job == "poison":
        # The first row of rank 1's share, and no other row holds the token 60.
        lengths = [length(row, PAIR) for row in rows]
        bad = shared_out(range(8), lengths, 2)[1][0]
        for row in rows:
            for ids in (row.prompt_ids, *row.responses):
                ids[ids == 60] = 59
        rows[bad].prompt_ids[0] = 60
        with torch.no_grad():
            model.get_input_embeddings().weight[60] = float("nan")
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(
            model=model,
            args=PreferenceConfig(
                output_dir=folder, logging_steps=1, save_strategy="no", optim="sgd",
                per_device_train_batch_size=3, pairs_per_step=8 // ranks, disable_tqdm=True,
                **({"max_steps": 6} | JOBS[job]),
            ),
            train_dataset=prompts(17) if sampled else rows,
            eval_dataset=None if sampled else random_rows(7, seed=5),
            **sampled,
        )  # fmt: skip
        try:
            with broken(job, trainer):
                trainer.train()
        except (NonFiniteLossError, InputError) as error:
            return {"error": str(error)}
        score = {} if sampled else trainer.score(trainer.eval_dataset)
    trained = [trainer.accelerator.unwrap_model(trainer.model)]
    if trainer.rollouts and trainer.rollouts.critic:
        trained.append(trainer.rollouts.critic.model)
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "weights": torch.cat(
            [p.detach().flatten() for model in trained for p in model.parameters()]
        ).tolist(),
        "score": score,
        "steps": trainer.state.global_step,
        "certificate": trainer.certificate,
        "cured": trainer.monitor.record.cured if trainer.monitor else 0,
    }


if __name__ == "__main__":
    for name in sys.argv[2:]:
        done = train(name, int(os.environ["WORLD_SIZE"]))
        Path(sys.argv[1], f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(done))
