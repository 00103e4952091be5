"""What is done about unlearning, on tiny runs that unlearn: whom it reaches, and that a resumed run goes on with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from slimepo.errors import InputError
from slimepo.files import json_lines
from slimepo.losses.table import find_objective, hyperparameters, with_anchor_times
from slimepo.monitor.cures import ANCHOR_FACTOR, RATE_FACTOR
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model

# Towards unlearning of what is held out, from the second step on.
ANCHORED, RATE = "1*simpo+0.01*sft", 0.1


def run(
    folder: Path, cure: str | None, loss: str = ANCHORED, checkpoint: str | None = None, **options: Any
) -> PreferenceTrainer:
    values: dict[str, Any] = dict(
        output_dir=str(folder), loss=loss, learning_rate=RATE, max_steps=4, per_device_train_batch_size=16,
        logging_steps=1, save_strategy="steps", save_steps=2, report_to="none", disable_tqdm=True, certificate=False,
        loss_options={"simpo": {"gamma": 40.0}} if loss == ANCHORED else {}, lr_scheduler_type="linear",
        verify_model=False, monitor={"every": 2, "prompts": 0, "pairs": 32, "on_unlearning": cure},
    )  # fmt: skip
    args = PreferenceConfig(**(values | options))
    made = PreferenceTrainer(tiny_model(), args, random_rows(48), random_rows(32, seed=5))
    made.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else None)
    return made


def cures(made: PreferenceTrainer) -> list[dict[str, Any]]:
    assert made.monitor is not None
    return [line for line in json_lines(made.monitor.record.path) if line["kind"] == "cure"]


def rates(made: PreferenceTrainer) -> list[float]:
    return [line["learning_rate"] for line in made.state.log_history if "learning_rate" in line]


def same_weights(one: PreferenceTrainer, two: PreferenceTrainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_a_lower_rate_holds_for_all_steps_to_come_and_a_resumed_run_has_it(tmp_path: Path) -> None:
    made = run(tmp_path, "lower-rate")
    # Behind the last step there is nothing left to cure.
    assert [line["step"] for line in cures(made)] == [2]
    whole = [RATE * (1 - step / 4) for step in range(4)]
    assert rates(made) == pytest.approx([*whole[:2], *(rate * RATE_FACTOR for rate in whole[2:])])
    assert made.monitor is not None
    summary = made.monitor.record.summary()
    assert summary is not None
    assert "the learning rate is 0.25 of what it was" in summary["cures"][0]["message"]
    assert same_weights(made, run(tmp_path, "lower-rate", checkpoint="checkpoint-2"))


def test_a_raised_anchor_is_the_loss_that_trains_and_a_resumed_run_has_it(tmp_path: Path) -> None:
    made = run(tmp_path, "raise-anchor")
    (cure,) = cures(made)
    assert cure["step"] == 2
    assert f"{ANCHOR_FACTOR * 0.01!r}*sft" in cure["message"]
    other = find_objective(*with_anchor_times(ANCHORED, {"simpo": {"gamma": 40.0}}, ANCHOR_FACTOR))
    assert hyperparameters(made.loss_function) == hyperparameters(other.function)
    again = run(tmp_path, "raise-anchor", checkpoint="checkpoint-2")
    assert same_weights(made, again)
    assert cures(again) == [cure]
    (tmp_path / "monitor.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"monitor\.jsonl is not there, and it alone says how far the anchor was raised"
    ):
        run(tmp_path, "raise-anchor", checkpoint="checkpoint-2")


def test_stop_ends_the_run_where_stop_on_does(tmp_path: Path) -> None:
    made = run(tmp_path, "stop")
    assert made.state.global_step == 2
    assert made.monitor is not None
    assert made.monitor.record.stopped is not None


def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    made = run(tmp_path, "lower-rate", loss="sft", max_steps=2, learning_rate=1e-3)
    assert cures(made) == []


class TestAnchors:
    @pytest.mark.parametrize(
        ("loss", "options", "raised"),
        [
            ("slime", {}, ("slime", {"chosen_weight": 0.4})),
            ("rpo", {"eta": 1.0}, ("rpo", {"eta": 4.0})),
            ("simpo", {"nll_weight": 0.5, "beta": 3.0}, ("simpo", {"nll_weight": 2.0, "beta": 3.0})),
            ("1*dpo+0.5*sft", {"dpo": {"beta": 0.2}}, ("1.0*dpo+2.0*sft", {"dpo": {"beta": 0.2}})),
        ],
    )
    def test_what_is_raised(self, loss: str, options: dict[str, Any], raised: Any) -> None:
        assert with_anchor_times(loss, copy.deepcopy(options), 4) == raised

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            ("dpo", r"loss 'dpo' has no anchor .*; these have: slime \(chosen_weight\), .*rpo \(eta\)"),
            ("simpo", r"loss 'simpo': its anchor nll_weight is 0"),
            ("slime/without-chosen", r"its anchor chosen_weight is 0"),
            ("1*dpo+1*hinge", r"has no anchor"),
        ],
    )
    def test_what_is_refused_before_a_model_is_loaded(self, tmp_path: Path, loss: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            PreferenceConfig(output_dir=str(tmp_path), loss=loss, monitor={"on_unlearning": "raise-anchor"})
