"""Trains a tiny model for a few steps and writes what came of it; run by test_trainer on one and on two ranks.

Arguments: where to write, pairs of a step on each rank, the order of rows, and "poison" to spoil one row, "kto"
to train with an objective that reads a reference and a mean over the whole step, or "stop" to train towards unlearning
with a monitor that ends the run.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model

out, share, strategy = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rows, model = random_rows(17), tiny_model()
if "poison" in sys.argv:
    # Row 1 is rank 1's, and no other row holds the token 60.
    for row in rows:
        for ids in (row.prompt_ids, *row.responses):
            ids[ids == 60] = 59
    rows[1].prompt_ids[0] = 60
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
objective = (
    {"loss": "kto", "loss_options": {"beta": 0.5}, "learning_rate": 0.3}
    if "kto" in sys.argv
    else {"loss_options": {"rejected_mean": "token"}, "learning_rate": 1e-2}
)
if "stop" in sys.argv:
    objective = {
        "loss": "simpo",
        "loss_options": {"beta": 2.0, "gamma": 40.0},
        "monitor": {"every": 2, "stop_on": ["unlearning"]},
        "learning_rate": 100.0,
    }
with tempfile.TemporaryDirectory() as folder:
    trainer = PreferenceTrainer(
        model=model,
        args=PreferenceConfig(
            output_dir=folder, max_steps=6, logging_steps=1, save_strategy="no", optim="sgd",
            per_device_train_batch_size=3, pairs_per_step=share, train_sampling_strategy=strategy,
            disable_tqdm=True, **objective,
        ),
        train_dataset=rows,
        eval_dataset=random_rows(7, seed=5),
    )  # fmt: skip
    trainer.train()
    score = trainer.score(trainer.eval_dataset)
if trainer.is_world_process_zero():
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    weights = torch.cat([p.detach().flatten() for p in unwrapped.parameters()])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    out.write_text(
        json.dumps(
            {
                "losses": losses,
                "weights": weights.tolist(),
                "score": score,
                "steps": trainer.state.global_step,
            }
        )
    )
