"""The quickstart's own model takes the same fifty steps in every layout: its sizes, tokenizer, world, and SLIME."""

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from slimepo.data.rows import Row
from slimepo.data.tokenize import tokenize
from slimepo.playground.quickstart import build_world, sft_model
from slimepo.playground.settings import load_quickstart
from slimepo.playground.tasks import slip
from slimepo.playground.world import assistant_turn, user_turn
from slimepo.terminal import make_console
from slimepo.training.config import SLIMEConfig
from slimepo.training.trainer import PreferenceTrainer
from slimepo.types import Preference

STEPS, PAIRS = 50, 8

# The recipe as it is, but for how long SFT goes on and how much of the world there is.
RECIPE = load_quickstart(
    ["sft.steps=30", "world.demonstrations=960", "world.preference_prompts=400", "world.heldout_prompts=11"]
)


@pytest.fixture(scope="module")
def start() -> tuple[PreTrainedModel, list[Row]]:
    """The model after a short SFT, and pairs of a right answer and a likely mistake."""
    world = build_world(RECIPE)
    model, _ = sft_model(RECIPE, world, make_console(quiet=True), cache=None)
    pairs = [
        Preference(
            user_turn(task),
            assistant_turn(task.gold),
            assistant_turn(slip(task, Random(task.key))),
            source="world",
        )
        for task in world.compared
    ]
    return model, tokenize(pairs, world.chat).rows


def losses(folder: Path, start: tuple[PreTrainedModel, list[Row]], layout: str) -> list[float]:
    model, rows = start
    args = SLIMEConfig(
        output_dir=str(folder), learning_rate=max(RECIPE.preference.sweep), max_steps=STEPS,
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
