"""Trains a tiny model for a few steps and writes what came of it; run by test_trainer on one and on two ranks."""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.training.conftest import random_rows, tiny_model

out, micro = Path(sys.argv[1]), int(sys.argv[2])
with tempfile.TemporaryDirectory() as folder:
    trainer = PreferenceTrainer(
        model=tiny_model(),
        args=PreferenceConfig(
            output_dir=folder, learning_rate=1e-2, max_steps=3, logging_steps=1, save_strategy="no", use_cpu=True,
            per_device_train_batch_size=micro // 2, gradient_accumulation_steps=2, optim="sgd",
            train_sampling_strategy="sequential", loss_options={"rejected_mean": "token"},
        ),
        train_dataset=random_rows(24),
    )  # fmt: skip
    trainer.train()
    score = trainer.score(random_rows(7, seed=5))
if trainer.is_world_process_zero():
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    out.write_text(json.dumps({"losses": losses, "weights": weights.tolist(), "score": score}))
