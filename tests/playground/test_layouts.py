"""The quickstart's own model takes the same fifty steps in every layout: its sizes, tokenizer, world, and SLIME."""

import copy
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from slimepo.data.chat import chat_format
from slimepo.data.rows import Row
from slimepo.data.tokenize import tokenize
from slimepo.model.load import random_config, random_model
from slimepo.pipeline.recipe import RandomModel
from slimepo.playground.quickstart import load_quickstart
from slimepo.playground.tasks import slip
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.playground.world import assistant_turn, demonstrations, make_tasks, user_turn
from slimepo.training.config import PreferenceConfig, SLIMEConfig
from slimepo.training.trainer import PreferenceTrainer
from slimepo.types import Preference

STEPS, PAIRS = 50, 8

RECIPE = load_quickstart(Path("out")).recipe


@pytest.fixture(scope="module")
def start() -> tuple[PreTrainedModel, list[Row]]:
    """The quickstart's model after a short SFT, and pairs of a right answer and a likely mistake."""
    tokenizer = build_tokenizer()
    chat = chat_format(tokenizer)
    assert isinstance(RECIPE.model, RandomModel)
    model = random_model(random_config(RECIPE.model.architecture, RECIPE.model.sizes, tokenizer), seed=0)
    tasks = make_tasks(1360, seed=0)
    rows = tokenize(demonstrations(tasks[:960], seed=0), chat, pairs=False).rows
    sft = RECIPE.stages[0]
    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceConfig(
            output_dir=folder, loss="sft", loss_options=sft.loss_options, learning_rate=sft.learning_rate, max_steps=30,
            per_device_train_batch_size=sft.batch_size, save_strategy="no", report_to="none", disable_tqdm=True,
            monitor=False, **sft.args,
        )  # fmt: skip
        PreferenceTrainer(model, args, rows).train()
    pairs = [
        Preference(
            user_turn(task),
            assistant_turn(task.gold),
            assistant_turn(slip(task, Random(task.key))),
            source="world",
        )
        for task in tasks[960:]
    ]
    return model, tokenize(pairs, chat).rows


def losses(folder: Path, start: tuple[PreTrainedModel, list[Row]], layout: str) -> list[float]:
    model, rows = start
    args = SLIMEConfig(
        output_dir=str(folder), learning_rate=RECIPE.stages[-1].learning_rate, max_steps=STEPS,
        logging_steps=1, save_strategy="no",
        per_device_train_batch_size=PAIRS, report_to="none", disable_tqdm=True, layout=layout,
    )  # fmt: skip
    trainer = PreferenceTrainer(copy.deepcopy(model), args, rows)
    trainer.train()
    assert trainer.layout == layout
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_fifty_steps_take_the_same_losses_in_every_layout(tmp_path: Path, start: Any) -> None:
    assert {parameter.dtype for parameter in start[0].parameters()} == {torch.float32}
    padded = losses(tmp_path, start, "padded")
    assert len(padded) == STEPS
    # It learns: fifty steps of a model that stands still would agree too.
    assert sum(padded[-10:]) < 0.9 * sum(padded[:10])
    for layout in ("packed", "shared"):
        assert losses(tmp_path, start, layout) == pytest.approx(padded, rel=1e-5)
