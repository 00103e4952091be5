"""The trainer: one answer whatever the batch layout, exact order, honest failures, TRL's data as it is."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from slimepo.errors import InputError, NonFiniteLossError
from slimepo.training.adapters import lora_config
from slimepo.training.config import PreferenceConfig, SLIMEConfig
from slimepo.training.trainer import PreferenceTrainer, SLIMETrainer
from tests.training.conftest import random_rows, tiny_model


def trainer(tmp_path: Path, model: Any = None, rows: Any = None, **options: Any) -> PreferenceTrainer:
    values = dict(
        output_dir=str(tmp_path), learning_rate=1e-3, logging_steps=1, save_strategy="no", max_steps=1
    )
    return PreferenceTrainer(
        model=model or tiny_model(),
        args=PreferenceConfig(**(values | options)),
        train_dataset=rows or random_rows(8),
    )


class TestBatchLayout:
    """The loss of a step is its mean over the pairs of the global batch, however it is cut up."""

    @pytest.mark.parametrize(
        ("loss", "options"),
        [("slime", {}), ("slime", {"rejected_mean": "token"}), ("sft", {}), ("sft", {"average": "token"})],
    )
    def test_1x8_2x4_and_8x1_give_the_same_loss_and_gradient(
        self, tmp_path: Path, loss: str, options: dict[str, Any]
    ) -> None:
        start, results = tiny_model(), []
        for micro in (1, 2, 3, 8):
            made = trainer(
                tmp_path, copy.deepcopy(start), loss=loss, loss_options=options,
                per_device_train_batch_size=micro, gradient_accumulation_steps=-(-8 // micro),
            )  # fmt: skip
            batches = next(iter(made.get_train_dataloader()))
            if micro < 8:
                assert len(batches) > 1
            value = made.training_step(made.model, batches)
            results.append((value, [p.grad for p in made.model.parameters()]))
        whole_loss, whole_gradient = results[-1]
        for value, gradient in results[:-1]:
            torch.testing.assert_close(value, whole_loss, rtol=1e-5, atol=0)
            for a, b in zip(gradient, whole_gradient, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    def test_the_loss_is_the_objective_over_plain_log_probs(self, tmp_path: Path) -> None:
        from slimepo.losses import sft
        from slimepo.types import PairLogps
        from tests.training.test_logps import plain_logps

        rows, model = random_rows(5), tiny_model()
        made = trainer(
            tmp_path, model, rows, loss="sft", per_device_train_batch_size=2, gradient_accumulation_steps=3
        )
        value = made.training_step(made.model, next(iter(made.get_train_dataloader())))
        total = 0.0
        for row in rows:
            logps = plain_logps(model, row, "chosen").detach()[None]
            mask = torch.ones_like(logps, dtype=torch.bool)
            total += sft(PairLogps(logps, mask, logps[:, :0], mask[:, :0])).loss.item()
        assert value.item() == pytest.approx(total / 5, rel=1e-5)

    def test_two_ranks_take_the_same_steps_as_one(self, tmp_path: Path) -> None:
        weights = []
        for ranks in (1, 2):
            out = tmp_path / f"{ranks}.json"
            command = [
                sys.executable,
                str(Path(__file__).with_name("rank_worker.py")),
                str(out),
                str(8 // ranks),
            ]
            if ranks > 1:
                port = str(20000 + os.getpid() % 20000)
                launch = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc_per_node=2",
                    "--master_port",
                    port,
                ]
                command = launch + command[1:]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
            weights.append(json.loads(out.read_text()))
        for one, two in zip(weights[0]["losses"], weights[1]["losses"], strict=True):
            assert two == pytest.approx(one, rel=1e-5)
        np.testing.assert_allclose(weights[1]["weights"], weights[0]["weights"], rtol=1e-4, atol=1e-6)
        assert weights[1]["score"] == pytest.approx(weights[0]["score"], rel=1e-5)


class TestOrder:
    def test_epochs_differ_and_a_new_trainer_repeats_them(self, tmp_path: Path) -> None:
        seen: list[list[str]] = []
        for _ in range(2):
            made = trainer(tmp_path, rows=random_rows(12), max_steps=6, per_device_train_batch_size=4)
            rows: list[str] = []
            step = made.training_step

            def spy(model: Any, inputs: Any, n: Any = None, rows: list[str] = rows, step: Any = step) -> Any:
                rows.extend(i for batch in inputs for i in batch["row_ids"])
                return step(model, inputs, n)

            made.training_step = spy  # type: ignore[method-assign]
            made.train()
            seen.append(rows)
        assert seen[0] == seen[1]
        first, second = seen[0][:12], seen[0][12:]
        assert sorted(first) == sorted(second)
        assert first != second

    def test_an_unknown_strategy_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"batch_rebalance.*group_by_length"):
            trainer(tmp_path, train_sampling_strategy="batch_rebalance")


class TestFailures:
    def test_a_non_finite_loss_stops_with_step_and_rows(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        with torch.no_grad():
            made.model.get_input_embeddings().weight[3] = float("nan")
        guilty = {r.row_id for r in random_rows(8) if 3 in [*r.prompt, *r.chosen, *r.rejected]}
        with pytest.raises(NonFiniteLossError, match="step 1; rows: row") as error:
            made.train()
        # The last token of a response is predicted but never read, so not every such row is harmed.
        named = {name.strip() for name in str(error.value).split("rows:")[1].split(".")[0].split(",")}
        assert named
        assert named <= guilty

    def test_bad_hyperparameters_are_refused_before_a_model_is_loaded(self) -> None:
        with pytest.raises(InputError, match="exponent"):
            SLIMEConfig(exponent=0.5)
        with pytest.raises(InputError, match="did you mean 'slime'"):
            PreferenceConfig(loss="slme")

    def test_a_model_that_does_not_exist_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no tokenizer can be loaded from .*nowhere"):
            SLIMETrainer(model=str(tmp_path / "nowhere"), args=SLIMEConfig(output_dir=str(tmp_path)))

    def test_a_streaming_dataset_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no length"):
            trainer(tmp_path, rows=iter(random_rows(2)))


class TestMetrics:
    def test_a_log_line_has_the_objectives_metrics_and_the_speed(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, max_steps=2)
        made.train()
        line = made.state.log_history[0]
        parts = [line[f"loss/{part}"] for part in ("chosen", "rejected", "distance")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert {"logps/chosen", "margin", "accuracy", "tokens_per_second", "padding_share"} <= line.keys()

    def test_evaluation_does_not_depend_on_the_batch_size(self, tmp_path: Path) -> None:
        rows, scores = random_rows(7), []
        for size in (1, 3, 7):
            options = {"rejected_mean": "token"}
            made = trainer(tmp_path, tiny_model(), loss_options=options, per_device_eval_batch_size=size)
            scores.append(made.evaluate(rows))
        assert scores[0] == pytest.approx(scores[2], rel=1e-5)
        assert scores[1] == pytest.approx(scores[2], rel=1e-5)


class TestAsInTRL:
    ROWS = [  # noqa: RUF012
        {"prompt": f"word {i}", "chosen": "good answer", "rejected": "bad", "score": i} for i in range(6)
    ]

    @pytest.fixture
    def babyllama(self, shared_data: Path) -> str:
        return str(shared_data / "models" / "babyllama-105")

    @pytest.mark.parametrize("kind", ["strings", "messages", "implicit"])
    def test_trl_datasets_train_as_they_are(self, tmp_path: Path, babyllama: str, kind: str) -> None:
        def turn(role: str, text: str) -> dict[str, str]:
            return {"role": role, "content": text}

        rows: list[dict[str, Any]] = self.ROWS
        if kind != "strings":
            rows = [
                {"prompt": [turn("user", r["prompt"])]}
                | {side: [turn("assistant", r[side])] for side in ("chosen", "rejected")}
                for r in rows
            ]
        if kind == "implicit":
            rows = [{side: r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in rows]
        dataset = Dataset.from_list(rows)
        made = SLIMETrainer(
            model=babyllama,
            args=SLIMEConfig(
                output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, save_strategy="no"
            ),
            train_dataset=dataset,
            eval_dataset={"a": dataset, "b": dataset},
            peft_config=lora_config(r=4),
        )
        made.train()
        metrics = made.evaluate()
        assert metrics["eval_a_loss"] == metrics["eval_b_loss"]

    def test_a_model_object_and_its_tokenizer(self, tmp_path: Path, babyllama: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        made = SLIMETrainer(
            model=AutoModelForCausalLM.from_pretrained(babyllama),
            args=SLIMEConfig(output_dir=str(tmp_path), hard_margin=2.0),
            train_dataset=Dataset.from_list(self.ROWS),
            processing_class=AutoTokenizer.from_pretrained(babyllama),
        )
        assert made.args.loss_options["hard_margin"] == 2.0
        assert len(made.train_dataset) == 6

    def test_no_row_left_is_said_with_its_reason(self, tmp_path: Path, babyllama: str) -> None:
        rows = Dataset.from_list([{"prompt": "a", "chosen": "same", "rejected": "same"}])
        with pytest.raises(InputError, match=r"no row of the dataset is left.*identical responses"):
            SLIMETrainer(model=babyllama, args=SLIMEConfig(output_dir=str(tmp_path)), train_dataset=rows)
