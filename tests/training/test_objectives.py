"""Objectives that want more than pairs, through the trainer: sums, scores as rewards, a third answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimepo.errors import InputError
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import letter_tokenizer, random_rows, tiny_model


def logged(tmp_path: Path, rows: Any, **options: Any) -> dict[str, float]:
    """The log line of one step, which the certificate has found to be the plain computation's."""
    args = PreferenceConfig(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to="none", monitor=False, logging_steps=1,
        disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    trainer = PreferenceTrainer(tiny_model(), args, rows, processing_class=letter_tokenizer())
    trainer.train()
    assert trainer.certificate is not None
    assert trainer.certificate["agrees"]
    line: dict[str, float] = trainer.state.log_history[0]
    return line


def test_a_sum_is_the_sum(tmp_path: Path) -> None:
    rows = random_rows(4)
    alone = {name: logged(tmp_path, rows, loss=name)["loss"] for name in ("hinge", "slime", "sft")}
    both = logged(tmp_path, rows, loss={"hinge": 0.5, "slime": 2, "sft": 1.0})
    assert both["loss"] == pytest.approx(0.5 * alone["hinge"] + 2 * alone["slime"] + alone["sft"], rel=1e-5)
    assert both["loss/slime"] == pytest.approx(alone["slime"], rel=1e-5)
    options = {"sft": {"average": "token"}, "hinge": {"beta": 0.2}}
    assert logged(tmp_path, rows, loss="1*hinge+1*sft", loss_options=options)["loss"] != both["loss"]


def test_scores_of_pairs_are_rewards(tmp_path: Path) -> None:
    texts = [
        {"prompt": "ab", "chosen": "cd" * i, "rejected": "ef", "score_chosen": 3.0, "score_rejected": 1.0}
        for i in range(1, 5)
    ]
    line = logged(tmp_path, texts, loss="reward_aware_rpo", loss_options={"scale": 0.25})
    assert line["reward_gap"] == 0.5
    with pytest.raises(InputError, match="has no value 'rewards', and this loss asks for it"):
        logged(tmp_path, [{**texts[0], "score_chosen": None}] * 4, loss="reward_aware_rpo")


def test_a_gold_answer_is_the_third_of_a_row(tmp_path: Path) -> None:
    rows = [
        replace(row, responses=(*row.responses, np.array([3 + i, 4, 5], dtype=np.int32)))
        for i, row in enumerate(random_rows(4))
    ]
    line = logged(tmp_path, rows, loss="tpo")
    assert line["logps/gold"] < 0
    assert line["loss"] == pytest.approx(np.log(2) - line["logps/gold"], rel=0.1)
    with pytest.raises(InputError, match="row 0 has no gold answer, and this loss reads it"):
        logged(tmp_path, random_rows(4), loss="tpo")


def test_the_weight_of_a_row_is_bopos_alone(tmp_path: Path) -> None:
    rows = [replace(row, values={"weight": 2.0}) for row in random_rows(4)]
    doubled = logged(tmp_path, rows, loss="bopo")["loss"]
    as_simpo = logged(tmp_path, random_rows(4), loss="simpo", loss_options={"beta": 2.0, "gamma": 0.0})[
        "loss"
    ]
    assert doubled == pytest.approx(as_simpo, rel=1e-6)


def test_bopo_without_any_weight_is_refused(tmp_path: Path) -> None:
    texts = [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * 4
    for rows in (random_rows(4), texts):
        with pytest.raises(
            InputError, match="loss 'bopo' weighs pairs by their costs, and no row has a weight"
        ):
            logged(tmp_path, rows, loss="bopo")
    assert logged(tmp_path, [{**texts[0], "weight": 1.5}, *texts[1:]], loss="bopo")["loss"] > 0
    with pytest.raises(InputError, match="rollouts: loss 'bopo' weighs pairs by their costs"):
        PreferenceConfig(output_dir=str(tmp_path), loss="bopo", rollouts={"samples": 2})
