"""Trains a tiny model for three steps, alone or as one of several ranks under an engine, and tells what came of it.

As a program: FOLDER ENGINE CELL..., writes CELL-RANK.json for each.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import TrainerCallback

from slimepo.errors import CertificateError
from slimepo.files import json_lines
from slimepo.kernels import linear_logps
from slimepo.model import logps
from slimepo.model.adapters import lora_config
from slimepo.parallel.engines import full_weights, held_parameters
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import letter_tokenizer, random_rows, tiny_model
from tests.training.rank_worker import prompts, vowels

ADAPTERS: dict[str, Any] = {"full": None, "lora": {"train_head": False}, "head": {"train_head": True}}
LOSSES: dict[str, dict[str, Any]] = {
    "slime": {"learning_rate": 0.1, "loss_options": {"rejected_mean": "token"}},
    # Clipped, far below what its gradients are, to a level that rises as the rate falls.
    "dpo": {"learning_rate": 0.3, "loss_options": {"beta": 0.5}, "max_grad_norm": "inverse-lr:0.05"},
    "kto": {"learning_rate": 0.3, "loss_options": {"beta": 0.5}},
    "grpo": {
        "learning_rate": 0.3, "loss_options": {"kl": 0.3}, "reference": "copy",
        "rollouts": {"samples": 3, "max_new_tokens": 9},
    },
}  # fmt: skip
# Rows of a step in memory at once: all of them, or so few that ranks differ in their number of micro-batches.
MICRO = {"1": 12, "2": 2}
# The third step is short and leaves ranks with different numbers of rows.
ROWS, STEP, STEPS = 29, 12, 3


class HeadFromOutside(TrainerCallback):
    """Breaks the head as trainers do that read its weight from outside its module: whole, but its gradient is not."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        (head,) = (
            p for name, p in given["model"].named_parameters() if "lm_head" in name and p.requires_grad
        )

        def head_logps(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return linear_logps(hidden, head.full_tensor(), targets)

        logps.head_logps = head_logps


def cells() -> Iterator[str]:
    for adapter in ADAPTERS:
        for tied in ("untied", "tied"):
            for loss in LOSSES:
                for micro in MICRO:
                    yield f"{adapter}-{tied}-{loss}-{micro}"


def train(cell: str, engine: str, ranks: int) -> dict[str, Any]:
    """Losses and what became of each trained weight, held-out figures, the monitor's, and how much a rank held."""
    adapter, tied, loss, micro, *broken = cell.split("-")
    sampled = loss == "grpo"
    lora = ADAPTERS[adapter] and lora_config(r=4, alpha=8, **ADAPTERS[adapter])
    with tempfile.TemporaryDirectory() as folder:
        shared = os.environ.get("WORKER_OUT", folder)
        trainer = PreferenceTrainer(
            model=tiny_model(tied=tied == "tied"),
            args=PreferenceConfig(
                output_dir=f"{shared}/{cell}", logging_steps=1, save_strategy="no", optim="sgd", max_steps=STEPS,
                per_device_train_batch_size=MICRO[micro], pairs_per_step=STEP // ranks, disable_tqdm=True,
                gradient_accumulation_steps=max(1, STEP // ranks // MICRO[micro]),
                loss=loss, parallel=None if engine == "alone" else engine,
                monitor=False if sampled else {"every": 2, "pairs": 8},
                **LOSSES[loss],
            ),
            train_dataset=prompts(ROWS) if sampled else random_rows(ROWS),
            eval_dataset=None if sampled else random_rows(7, seed=5),
            processing_class=letter_tokenizer(),
            peft_config=lora,
            reward=vowels if sampled else None,
        )  # fmt: skip
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        if broken:
            trainer.add_callback(HeadFromOutside())
        try:
            trainer.train()
        except CertificateError as error:
            return {"error": str(error)}
        score = {} if sampled else trainer.score(trainer.eval_dataset)
        model = trainer.accelerator.unwrap_model(trainer.model)
        after = full_weights(model)
        monitor = [] if sampled else json_lines(Path(f"{shared}/{cell}/monitor.jsonl"))
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "moved": {name: (after[name] - was).flatten().tolist() for name, was in start.items()},
        "score": score,
        "monitor": [line for line in monitor if line["kind"] in ("probe", "generation")],
        "held": held_parameters(model),
        "certificate": trainer.certificate,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for cell in sys.argv[3:]:
        done = train(cell, sys.argv[2], int(os.environ["WORLD_SIZE"]))
        Path(sys.argv[1], f"{cell}-{os.environ['RANK']}.json").write_text(json.dumps(done))
