"""The trainer: one answer whatever the batch layout, exact order, honest failures, TRL's data as it is."""

import copy
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from slimepo.data.batch import StepCollator
from slimepo.data.rows import Row
from slimepo.errors import InputError, NonFiniteLossError
from slimepo.model.adapters import lora_config
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.config import PreferenceConfig, SLIMEConfig
from slimepo.training.metrics import MetricSums
from slimepo.training.steps import StepSampler, shared_out
from slimepo.training.trainer import PreferenceTrainer, SLIMETrainer
from tests.model.test_logps import plain_logps
from tests.tiny import random_rows, tiny_model
from tests.training import rank_worker
from tests.training.rank_worker import JOBS, train

# Runs of two ranks that end otherwise than one rank's, or whose steps are so large that rounding shows.
NOT_COMPARED = (
    "stop", "lower_rate", "raise_anchor", "fails", "poison", "unreduced", "lost", "uncertified",
)  # fmt: skip


def trainer(tmp_path: Path, model: Any = None, rows: Any = None, **options: Any) -> PreferenceTrainer:
    values = dict(
        output_dir=str(tmp_path), learning_rate=1e-3, logging_steps=1, save_strategy="no", max_steps=1
    )
    return PreferenceTrainer(
        model=model or tiny_model(),
        args=PreferenceConfig(**(values | options)),
        train_dataset=rows or random_rows(8),
    )


def with_weights(rows: Sequence[Row]) -> list[Row]:
    """0, 0.5, 1 ... in turn."""
    return [replace(row, values={"weight": i % 4 / 2}) for i, row in enumerate(rows)]


class TestWeights:
    """A row counts as much as its weight says; what a loss is divided by is the sum of the weights."""

    def loss_and_gradient(self, made: PreferenceTrainer) -> tuple[float, torch.Tensor]:
        value = made.training_step(made.model, next(iter(made.get_train_dataloader()))).item()
        return value, torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])

    @pytest.mark.parametrize(("loss", "options"), [("slime", {}), ("sft", {"average": "token"}), ("dpo", {})])
    def test_a_weight_of_two_is_the_row_twice_and_of_zero_is_no_row(
        self, tmp_path: Path, loss: str, options: dict[str, Any]
    ) -> None:
        a, b, c = random_rows(3)
        weighted = [replace(row, values={"weight": w}) for row, w in ((a, 2.0), (b, 1.0), (c, 0.0))]
        found = []
        for rows in (weighted, [a, replace(a, id="again"), b]):
            made = trainer(
                tmp_path, tiny_model(), rows, loss=loss, loss_options=options,
                per_device_train_batch_size=2, gradient_accumulation_steps=2,
            )  # fmt: skip
            _disturb(made.model)
            found.append((*self.loss_and_gradient(made), made.score(rows)["loss"]))
        (value, gradient, scored), (as_rows, gradient_as_rows, scored_as_rows) = found
        assert value == pytest.approx(as_rows, rel=1e-5)
        assert scored == pytest.approx(scored_as_rows, rel=1e-5)
        torch.testing.assert_close(gradient, gradient_as_rows, rtol=1e-4, atol=1e-7)

    def test_a_step_of_weights_of_zero_is_no_nan_and_has_no_gradient(self, tmp_path: Path) -> None:
        rows = [replace(row, values={"weight": 0.0}) for row in random_rows(4)]
        made = trainer(tmp_path, rows=rows)
        assert made.training_step(made.model, next(iter(made.get_train_dataloader()))).item() == 0
        assert all(parameter.grad is None for parameter in made.model.parameters())

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_what_is_no_weight_is_refused_by_the_rows_name(self, tmp_path: Path, weight: float) -> None:
        rows = [replace(row, values={"weight": weight}) for row in random_rows(2)]
        with pytest.raises(InputError, match="row 0 has the weight"):
            trainer(tmp_path, rows=rows)


class TestSideInformation:
    """An objective is given what its signature asks for."""

    OWN = (
        "from slimepo.types import LossOutput\n"
        "def loss(policy, *, weight, advantages, behaviour, scale=1.0):\n"
        "    ratio = (policy.chosen - behaviour.chosen) * policy.chosen_mask\n"
        "    return LossOutput(-scale * weight * advantages[:, 0] * ratio.sum(-1), {})\n"
    )

    def test_a_users_own_objective_gets_the_values_of_its_rows(self, tmp_path: Path) -> None:
        (tmp_path / "own.py").write_text(self.OWN)
        rows = [
            replace(
                row,
                values={
                    "weight": 3.0,
                    "advantages": np.array([i - 1.5, 0.0]),
                    "behaviour": tuple(np.full(len(ids), -2.0, dtype=np.float32) for ids in row.responses),
                },
            )
            for i, row in enumerate(random_rows(4))
        ]
        made = trainer(tmp_path, rows=rows, loss=f"{tmp_path}/own.py:loss", per_device_train_batch_size=4)
        value = made.training_step(made.model, next(iter(made.get_train_dataloader()))).item()
        expected = 0.0
        for i, row in enumerate(rows):
            ratio = plain_logps(made.model, row, 0).sum().item() + 2.0 * len(row.responses[0])
            # Weighted by itself, and by nobody else a second time.
            expected -= 3.0 * (i - 1.5) * ratio / 4
        assert value == pytest.approx(expected, rel=1e-4)

    def test_a_row_that_lacks_what_is_asked_for_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "own.py").write_text(self.OWN)
        with pytest.raises(InputError, match="row 0 has no value 'advantages', and this loss asks for it"):
            trainer(tmp_path, loss=f"{tmp_path}/own.py:loss")


class TestBatchLayout:
    """The loss of a step is its mean over the pairs of the global batch, however it is cut up."""

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize(
        ("loss", "options"),
        [
            ("slime", {}),
            ("slime", {"rejected_mean": "token"}),
            ("sft", {}),
            ("sft", {"average": "token"}),
            ("dpo", {}),
            ("orpo", {}),
            ("kto", {"beta": 0.5}),
        ],
    )
    def test_1x8_2x4_and_8x1_give_the_same_loss_and_gradient(
        self, tmp_path: Path, loss: str, options: dict[str, Any], weighted: bool
    ) -> None:
        start, results = tiny_model(), []
        rows = random_rows(4 if loss == "kto" else 8)
        rows = with_weights(rows) if weighted else rows
        for micro in (1, 2, 3, 8):
            made = trainer(
                tmp_path, copy.deepcopy(start), rows, loss=loss, loss_options=options,
                per_device_train_batch_size=micro, gradient_accumulation_steps=-(-8 // micro),
            )  # fmt: skip
            _disturb(made.model)
            batches = next(iter(made.get_train_dataloader()))
            if micro < 8:
                assert len(batches["batches"]) > 1
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

        rows, model = random_rows(5), tiny_model()
        made = trainer(
            tmp_path, model, rows, loss="sft", per_device_train_batch_size=2, gradient_accumulation_steps=3
        )
        value = made.training_step(made.model, next(iter(made.get_train_dataloader())))
        total = 0.0
        for row in rows:
            logps = plain_logps(model, row, 0).detach()[None]
            mask = torch.ones_like(logps, dtype=torch.bool)
            total += sft(PairLogps(logps, mask, logps[:, :0], mask[:, :0])).loss.item()
        assert value.item() == pytest.approx(total / 5, rel=1e-5)

    @pytest.mark.parametrize(
        "job",
        [job for job in JOBS if job not in NOT_COMPARED],
    )
    def test_two_ranks_take_the_same_steps_as_one(self, job: str, two_ranks: Path) -> None:
        """With rows that do not divide, so that the last step leaves one rank with none."""
        alone, both = train(job, ranks=1), json.loads((two_ranks / f"{job}-0.json").read_text())
        assert len(alone["losses"]) == JOBS[job].get("max_steps", 6)
        for one, two in zip(alone["losses"], both["losses"], strict=True):
            # Whitened advantages of what has just been sampled add up to 0.
            assert two == pytest.approx(one, rel=1e-5, abs=1e-7)
        np.testing.assert_allclose(both["weights"], alone["weights"], rtol=1e-4, atol=1e-6)
        # z0 is a difference of sums of some 50 nats in float32.
        assert both["score"] == pytest.approx(alone["score"], rel=1e-5, abs=1e-5)

    @pytest.mark.parametrize("job", ["lower_rate", "raise_anchor"])
    def test_two_ranks_cure_a_run_behind_the_same_step(self, job: str, two_ranks: Path) -> None:
        """The first one alone has looked. A rank with another rate would have other weights, with another loss another
        loss; steps that are far too large blow rounding up, so that weights are compared between the ranks alone."""
        first, second = (json.loads((two_ranks / f"{job}-{rank}.json").read_text()) for rank in (0, 1))
        alone = train(job, ranks=1)
        assert first["cured"] == alone["cured"] == 1
        # On some processors rounding has become 2e-5 after five such steps; half the rate makes percents.
        assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert first["weights"] == second["weights"]

    def test_two_ranks_certify_their_numbers_and_leave_no_trace(self, two_ranks: Path) -> None:
        """Rank 0 has two micro-batches there and rank 1 has one."""
        with_it, without = (
            json.loads((two_ranks / f"{job}-0.json").read_text()) for job in ("random", "uncertified")
        )
        assert with_it["certificate"]["ranks"] == 2
        assert with_it["certificate"]["rows"] == 5
        assert max(each["error"] for each in with_it["certificate"]["gradients"]) < 1e-5
        assert without["certificate"] is None
        assert with_it["losses"] == without["losses"]
        assert with_it["weights"] == without["weights"]

    @pytest.mark.parametrize("job", ["unreduced", "lost"])
    def test_ranks_whose_engine_is_broken_do_not_start(self, job: str, two_ranks: Path) -> None:
        for rank in (0, 1):
            said = json.loads((two_ranks / f"{job}-{rank}.json").read_text())["error"]
            assert "this run does not compute what it should" in said
            assert "the gradient of" in said

    def test_two_ranks_leave_the_run_together(self, two_ranks: Path) -> None:
        """The main process alone measures, and the other one must not wait for it."""
        for rank in (0, 1):
            assert json.loads((two_ranks / f"stop-{rank}.json").read_text())["steps"] == 2


def _disturb(model: torch.nn.Module) -> None:
    """Move the policy away from its reference, so that log-ratios are not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every job of rank_worker gave on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"]
    launch += [str(20000 + os.getpid() % 20000), rank_worker.__file__, str(folder), *JOBS]
    result = subprocess.run(launch, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


class TestOrder:
    def test_epochs_differ_and_a_new_trainer_repeats_them(self, tmp_path: Path) -> None:
        seen: list[list[str]] = []
        for _ in range(2):
            made = trainer(tmp_path, rows=random_rows(12), max_steps=6, per_device_train_batch_size=4)
            rows: list[str] = []
            step = made.training_step

            def spy(model: Any, inputs: Any, n: Any = None, rows: list[str] = rows, step: Any = step) -> Any:
                rows.extend(i for batch in inputs["batches"] for i in batch["row_ids"])
                return step(model, inputs, n)

            made.training_step = spy  # type: ignore[method-assign]
            made.train()
            seen.append(rows)
        assert seen[0] == seen[1]
        first, second = seen[0][:12], seen[0][12:]
        assert sorted(first) == sorted(second)
        assert first != second

    @pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
    @pytest.mark.parametrize("rows", [5, 16, 21])
    def test_ranks_share_out_the_steps_that_one_rank_takes(self, strategy: str, rows: int) -> None:
        lengths = list(range(rows))
        alone = list(StepSampler(lengths, 8, seed=3, strategy=strategy, epoch=1))
        shares = [list(StepSampler(lengths, 8, 3, strategy, rank=r, ranks=3, epoch=1)) for r in range(3)]
        assert {len(share) for share in shares} == {len(alone)}
        for step, rows_of_step in enumerate(alone):
            assert sorted(i for share in shares for i in share[step]) == sorted(rows_of_step)

    @given(st.lists(st.integers(1, 5000), min_size=1, max_size=70), st.integers(1, 9))
    def test_every_row_goes_to_one_rank_and_ranks_have_as_many(self, lengths: list[int], ranks: int) -> None:
        shares = shared_out(range(len(lengths)), lengths, ranks)
        assert sorted(itertools.chain(*shares)) == list(range(len(lengths)))
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1
        assert [*shares[0]] == sorted(shares[0]), "in the step's order"

    def test_of_unequal_rows_no_rank_has_three_per_cent_more_than_its_share(self) -> None:
        lengths = np.random.default_rng(0).lognormal(6.5, 0.7, 2000).astype(int)
        shares = [list(StepSampler(lengths.tolist(), 64, 0, rank=rank, ranks=8)) for rank in range(8)]
        tokens = np.array([[lengths[rows].sum() for rows in share] for share in shares])[:, :-1]
        assert (tokens.max(axis=0) / tokens.mean(axis=0)).mean() < 1.03

    def test_an_unknown_strategy_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"batch_rebalance.*group_by_length"):
            trainer(tmp_path, train_sampling_strategy="batch_rebalance").train()


class TestFailures:
    def test_a_non_finite_loss_stops_with_step_and_rows(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        with torch.no_grad():
            made.model.get_input_embeddings().weight[3] = float("nan")
        guilty = {r.id for r in random_rows(8) if 3 in [*r.prompt_ids, *r.responses[0], *r.responses[1]]}
        with pytest.raises(NonFiniteLossError, match="step 1; rows: row") as error:
            made.train()
        # The last token of a response is predicted but never read, so not every such row is harmed.
        named = {name.strip() for name in str(error.value).split("rows:")[1].split(".")[0].split(",")}
        assert named
        assert named <= guilty

    def test_a_non_finite_loss_on_one_rank_stops_all_of_them(self, two_ranks: Path) -> None:
        there, here = (
            json.loads((two_ranks / f"poison-{rank}.json").read_text())["error"] for rank in (0, 1)
        )
        # Each names the rows, also those that another rank had.
        assert re.search(r"not finite at step 1; rows: row \d+\.", here)
        assert there == here

    def test_a_non_finite_gradient_stops_before_the_weights_change(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
        head = made.model.get_output_embeddings().weight
        before = head.detach().clone()
        head.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 1"):
            made.train()
        assert torch.equal(head, before)
        assert not list(tmp_path.glob("checkpoint-*"))

    def test_a_reward_that_fails_on_one_rank_stops_all_of_them_with_its_words(self, two_ranks: Path) -> None:
        said = {json.loads((two_ranks / f"fails-{rank}.json").read_text())["error"] for rank in (0, 1)}
        own = (
            "reward 'picky' fails on row p5: ValueError: no such letter; "
            "rollouts: {on_error: skip} leaves such prompts out"
        )
        assert len(said) == 2
        assert said < {own, f"{own} (on rank 0)", f"{own} (on rank 1)"}

    def test_settings_that_would_be_ignored_are_refused(self) -> None:
        with pytest.raises(InputError, match="use PreferenceConfig"):
            SLIMEConfig(loss="sft")
        with pytest.raises(InputError, match="by name"):
            SLIMEConfig(loss_options={"hard_margin": 9})
        with pytest.raises(InputError, match="auto_find_batch_size"):
            SLIMEConfig(auto_find_batch_size=True)

    def test_bad_hyperparameters_are_refused_before_a_model_is_loaded(self) -> None:
        with pytest.raises(InputError, match="exponent"):
            SLIMEConfig(exponent=0.5)
        with pytest.raises(InputError, match="did you mean 'slime'"):
            PreferenceConfig(loss="slme")

    def test_a_model_that_does_not_exist_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no tokenizer can be loaded from .*nowhere"):
            SLIMETrainer(model=str(tmp_path / "nowhere"), args=SLIMEConfig(output_dir=str(tmp_path)))

    def test_a_step_that_is_never_whole_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the 8 rows are fewer than the 64 of one"):
            trainer(tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True)


class TestMetrics:
    def test_a_log_line_has_the_objectives_metrics_and_the_speed(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, max_steps=2)
        made.train()
        line = made.state.log_history[0]
        parts = [line[f"loss/{part}"] for part in ("chosen", "rejected", "distance")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert {"logps/chosen", "margin", "accuracy", "tokens_per_second", "padding_share"} <= line.keys()

    def test_a_look_between_steps_is_no_time_of_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Looks(TrainerCallback):
            seconds = 0.0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.seconds += 100.0

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds += 0.5

        looked: list[float] = []
        monkeypatch.setattr(MetricSums, "speed", lambda self, looking: looked.append(looking) or {})
        made = trainer(tmp_path, max_steps=4, logging_steps=2, monitor=False)
        made.add_callback(Looks())
        made.train()
        assert looked == [1.0, 1.0]

    def test_evaluation_does_not_depend_on_the_batch_size(self, tmp_path: Path) -> None:
        rows, scores = random_rows(7), []
        for size in (1, 3, 7):
            options = {"rejected_mean": "token"}
            made = trainer(tmp_path, tiny_model(), loss_options=options, per_device_eval_batch_size=size)
            scores.append(made.score(rows))
        assert scores[0] == pytest.approx(scores[2], rel=1e-5)
        assert scores[1] == pytest.approx(scores[2], rel=1e-5)

    @pytest.mark.parametrize("loss", ["slime", "kto"])
    def test_evaluation_collates_every_batch_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
    ) -> None:
        """kto has twelve rows then, each with an answer to another prompt."""
        rows = random_rows(6)
        trained = trainer(tmp_path, rows=rows, loss=loss, reference="copy" if loss == "kto" else "auto")
        collated: list[int] = []
        real = StepCollator.batch

        def spy(self: StepCollator, pairs: Any, *positions: Any) -> Any:
            collated.append(len(pairs))
            return real(self, pairs, *positions)

        monkeypatch.setattr(StepCollator, "batch", spy)
        trained.score(rows)
        assert sum(collated) == (12 + 12 if loss == "kto" else 6)


class TestPreparation:
    def test_parameters_that_train_are_float32(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, tiny_model().to(torch.bfloat16), learning_rate=5e-7)
        before = [p.detach().clone() for p in made.model.parameters()]
        made.train()
        moved = [(a != b).float().mean().item() for a, b in zip(before, made.model.parameters(), strict=True)]
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
        assert np.mean(moved) > 0.5, "steps of 5e-7 vanish in bfloat16"

    def test_dropout_of_the_model_goes_and_that_of_the_adapter_stays(self, tmp_path: Path) -> None:
        made = PreferenceTrainer(
            model=tiny_model(attention_dropout=0.2),
            args=PreferenceConfig(output_dir=str(tmp_path)),
            train_dataset=random_rows(4),
            peft_config=lora_config(r=2, dropout=0.3),
        )
        assert {m.p for m in made.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
        assert {m.attention_dropout for m in made.model.modules() if hasattr(m, "attention_dropout")} == {0.0}

    def test_the_same_arguments_serve_twice(self, tmp_path: Path) -> None:
        first = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        again = PreferenceTrainer(model=tiny_model(), args=first.args, train_dataset=random_rows(8))
        assert again.data_collator.micro_batch_size == 2
        assert len(next(iter(again.get_train_dataloader()))["batches"]) == 4

    def test_dropped_rows_are_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = build_tokenizer()
        rows = [{"prompt": "Add 1 and 2.", "chosen": "3", "rejected": str(3 + i % 2)} for i in range(4)]
        PreferenceTrainer(
            model=tiny_model(vocab_size=len(tokenizer)),
            args=PreferenceConfig(output_dir=str(tmp_path)),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=None,
        )
        assert "2 of 4 rows dropped: identical responses" in caplog.text

    def test_progress_is_shown_unless_it_is_switched_off(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer(tmp_path).train()
        assert "1/1 loss" in capsys.readouterr().out
        trainer(tmp_path, disable_tqdm=True).train()
        assert "loss" not in capsys.readouterr().out


class TestAsInTRL:
    ROWS = [  # noqa: RUF012
        {"prompt": f"word {i}", "chosen": "good answer", "rejected": "bad", "score": i} for i in range(6)
    ]

    @pytest.mark.parametrize("kind", ["strings", "messages", "implicit"])
    def test_trl_datasets_train_as_they_are(self, tmp_path: Path, llama_folder: Path, kind: str) -> None:
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
            model=str(llama_folder),
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
        assert made.evaluate(dataset)["eval_loss"] == metrics["eval_a_loss"]
        with pytest.raises(InputError, match="score_pairs"):
            made.predict(dataset)

    def test_a_model_object_and_its_tokenizer(self, tmp_path: Path, llama_folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        made = SLIMETrainer(
            model=AutoModelForCausalLM.from_pretrained(llama_folder),
            args=SLIMEConfig(output_dir=str(tmp_path), hard_margin=2.0),
            train_dataset=Dataset.from_list(self.ROWS),
            processing_class=AutoTokenizer.from_pretrained(llama_folder),
        )
        assert made.args.loss_options["hard_margin"] == 2.0
        assert len(made.train_dataset) == 6

    def test_rows_that_prefer_no_answer_are_counted(
        self, tmp_path: Path, llama_folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [
            {"prompt": f"{i}?", "response_a": "yes", "response_b": "no", "preferred": "ab"[i % 2]}
            for i in range(4)
        ]
        rows[2]["preferred"] = "tie"
        with caplog.at_level(logging.WARNING, "slimepo"):
            made = SLIMETrainer(
                model=str(llama_folder), args=SLIMEConfig(output_dir=str(tmp_path)), train_dataset=rows
            )
        assert len(made.train_dataset) == 3
        assert "1 tie left out, in which neither answer is preferred" in caplog.text

    def test_no_row_left_is_said_with_its_reason(self, tmp_path: Path, llama_folder: Path) -> None:
        rows = Dataset.from_list([{"prompt": "a", "chosen": "same", "rejected": "same"}])
        with pytest.raises(InputError, match=r"no row of the dataset is left.*identical responses"):
            SLIMETrainer(
                model=str(llama_folder), args=SLIMEConfig(output_dir=str(tmp_path)), train_dataset=rows
            )
