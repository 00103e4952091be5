"""Clipping for heavy tails: a level that rises as the rate falls, and clipped-SSTM."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from slimepo import PreferenceConfig, PreferenceTrainer
from slimepo.errors import InputError
from slimepo.training.optimizers.clipped_sstm import ClippedSSTM
from tests.tiny import letter_tokenizer, random_rows, tiny_model


def config(folder: Path, **settings: Any) -> PreferenceConfig:
    usual: dict[str, Any] = dict(
        per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, save_strategy="no", report_to="none",
        disable_tqdm=True, monitor=False, certificate=False, logging_steps=1,
    )  # fmt: skip
    return PreferenceConfig(str(folder), **usual | settings)


class Norms(TrainerCallback):
    """The norm of the gradient that the optimizer is given, at each step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.norms = model, list[float]()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        parts = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.linalg.vector_norm(torch.stack(parts))))


def train(folder: Path, **settings: Any) -> tuple[list[float], list[dict[str, Any]]]:
    model = tiny_model()
    trainer = PreferenceTrainer(
        model,
        args=config(folder, **settings),
        train_dataset=random_rows(8),
        processing_class=letter_tokenizer(),
    )
    seen = Norms(model)
    trainer.add_callback(seen)
    trainer.train()
    return seen.norms, [line for line in trainer.state.log_history if "grad_norm" in line]


class TestInverseRate:
    def test_the_level_rises_as_the_rate_falls(self, tmp_path: Path) -> None:
        """Linear to zero over four steps the rate is 1, 3/4, 1/2, 1/4 of what it was."""
        norms, logged = train(tmp_path, max_grad_norm="inverse-lr:0.001")
        assert norms == pytest.approx([0.001, 0.001 / 0.75, 0.002, 0.004], rel=1e-3)
        # What is logged is the norm before it was clipped.
        assert min(line["grad_norm"] for line in logged) > 0.01

    def test_a_small_gradient_is_left_alone(self, tmp_path: Path) -> None:
        assert train(tmp_path, max_grad_norm="inverse-lr:1e6")[0] == train(tmp_path)[0]

    def test_in_warm_up_nothing_is_clipped_at_a_rate_of_nothing(self, tmp_path: Path) -> None:
        norms, logged = train(tmp_path, max_grad_norm="inverse-lr:0.001", warmup_steps=2)
        assert norms[0] == pytest.approx(logged[0]["grad_norm"], rel=1e-4)
        assert norms[1] == pytest.approx(0.002, rel=1e-3)

    @pytest.mark.parametrize(
        ("given", "level", "inverse"),
        [("inverse-lr", 1.0, True), ("inverse-lr:0.5", 0.5, True), ("0.5", 0.5, False), (2, 2.0, False)],
    )
    def test_what_may_be_given(self, given: Any, level: float, inverse: bool, tmp_path: Path) -> None:
        args = config(tmp_path, max_grad_norm=given)
        assert (args.max_grad_norm, args.clip_inverse_lr) == (level, inverse)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                {"max_grad_norm": "inverse"},
                "'inverse' is unknown: give a number, inverse-lr, or inverse-lr:0.5",
            ),
            ({"max_grad_norm": "inverse-lr:x"}, "'inverse-lr:x' is unknown"),
            ({"max_grad_norm": "inverse-lr:-1"}, "max_grad_norm = -1.0 is out of range.*>= 0"),
            ({"max_grad_norm": "inverse-lr:inf"}, "max_grad_norm = inf is out of range"),
            ({"max_grad_norm": "inverse-lr:0"}, "needs a level above 0"),
            ({"clip_inverse_lr": True}, "needs a level above 0"),
        ],
    )
    def test_what_is_refused(self, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=words):
            config(tmp_path, **settings)


def quadratic(optimizer: Any, noise: np.ndarray, point: torch.Tensor) -> float:
    """|x|^2 / 2 at the last point of as many steps as there is noise `[steps, size]` on the gradient x."""
    for each in noise:
        point.grad = point.detach() + torch.from_numpy(each)
        optimizer.step()
    return float(point.detach().square().sum() / 2)


class TestClippedSSTM:
    def test_worked_numbers(self) -> None:
        """nu = 1, a = L = 1, so lr = 1/2: alpha 0.5, 1, 1.5; with B = 1 levels 2, 1, 2/3."""
        x = torch.tensor([0.0], requires_grad=True)
        optimizer = ClippedSSTM([x], lr=0.5)
        moved, alphas = [], []
        for _ in range(3):
            before = optimizer.state[x]["z"].item() if optimizer.state[x] else 0.0
            alphas.append(optimizer.param_groups[0]["alpha"])
            x.grad = torch.tensor([-100.0])
            optimizer.step()
            moved.append(optimizer.state[x]["z"].item() - before)
        assert alphas == [0.5, 1.0, 1.5]
        # alpha_k times its level is B, whatever the gradient.
        assert moved == pytest.approx([1.0, 1.0, 1.0])
        # y: 1, then (0.5 * 1 + 1 * 2) / 1.5, then (1.5 * 5/3 + 1.5 * 3) / 3; x ahead: (3 * 7/3 + 2 * 3) / 5.
        assert optimizer.state[x]["y"].item() == pytest.approx(7 / 3)
        assert x.item() == pytest.approx(13 / 5)

    def test_in_a_warm_up_the_first_step_is_taken_at_the_rate_that_it_has(self) -> None:
        x = torch.tensor([0.0], requires_grad=True)
        optimizer = ClippedSSTM([x], lr=1.0)
        for rate in (0.0, 0.0, 0.1):
            optimizer.param_groups[0]["lr"] = rate
            x.grad = torch.tensor([-100.0])
            optimizer.step()
            assert x.item() == 0.0
        x.grad = torch.tensor([-100.0])
        optimizer.step()
        assert x.item() > 0.0

    def test_without_clipping_it_is_the_similar_triangles_method(self) -> None:
        x = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = ClippedSSTM([x], lr=0.1, level=1e9)
        y = z = point = np.array([3.0, -1.0])
        total = 0.0
        for k in range(1, 20):
            alpha = 0.1 * k
            z = z - alpha * point
            y = (total * y + alpha * z) / (total + alpha)
            total += alpha
            x.grad = x.detach().clone()
            optimizer.step()
            ahead = 0.1 * (k + 1)
            point = (total * y + ahead * z) / (total + ahead)
            np.testing.assert_allclose(x.detach().numpy(), point, rtol=1e-12)

    def test_nu_of_nothing_takes_equal_steps(self) -> None:
        x = torch.tensor([0.0], requires_grad=True)
        optimizer = ClippedSSTM([x], lr=0.5, nu=0.0)
        x.grad = torch.tensor([1.0])
        optimizer.step()
        assert optimizer.param_groups[0]["alpha"] == 0.5

    def test_under_student_noise_the_worst_runs_are_better_than_unclipped_ones(self) -> None:
        """A quadratic with noise of 1.5 degrees of freedom (infinite variance), 200 seeds side by side."""
        random, size, steps = np.random.default_rng(0), 4, 40
        noise = random.standard_t(1.5, size=(200, steps, size))

        def percentile(level: float) -> float:
            ends = []
            for of_seed in noise:
                x = torch.full((size,), 3.0, dtype=torch.float64, requires_grad=True)
                ends.append(quadratic(ClippedSSTM([x], lr=0.05, level=level), of_seed, x))
            return float(np.percentile(ends, 95))

        clipped, plain = percentile(0.3), percentile(1e9)
        assert clipped < 2.0 < plain
        assert plain > 5 * clipped

    def test_it_trains_by_its_name_and_resumes_where_it_was(self, tmp_path: Path) -> None:
        rows, tokenizer = random_rows(8), letter_tokenizer()
        settings: dict[str, Any] = dict(
            optim="clipped_sstm", optim_args="level=0.5, nu=1", lr_scheduler_type="constant", save_strategy="steps",
            save_steps=2,
        )  # fmt: skip

        def run(folder: Path, resume: str | None = None) -> list[torch.Tensor]:
            trainer = PreferenceTrainer(
                tiny_model(), args=config(folder, **settings), train_dataset=rows, processing_class=tokenizer
            )
            trainer.train(resume_from_checkpoint=resume)
            kind = (
                trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
            )
            assert isinstance(kind, ClippedSSTM)
            assert kind.param_groups[0]["level"] == 0.5
            return [p.detach().clone() for p in trainer.model.parameters()]

        whole = run(tmp_path / "a")
        again = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
        state = json.loads((tmp_path / "a" / "checkpoint-4" / "trainer_state.json").read_text())
        assert all(math.isfinite(line["grad_norm"]) for line in state["log_history"] if "grad_norm" in line)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"optim_args": "nu=2"}, "nu = 2.0 is out of range.*<= 1"),
            ({"optim_args": "level=0"}, "level = 0.0 is out of range.*> 0"),
            (
                {"optim_args": "beta=1"},
                "optim = 'clipped_sstm': optim_args: it has no 'beta'; it takes nu and level",
            ),
            ({"optim_args": "level=x"}, "'level=x' is not KEY=NUMBER"),
            ({"weight_decay": 0.1}, "weight_decay = 0.1, and it has none: leave it out"),
            ({"max_grad_norm": 1.0}, "max_grad_norm = 1.0, and it clips by optim_args: level=1"),
            ({"parallel": "fsdp2"}, "parallel = 'fsdp2' cuts them: use ddp"),
        ],
    )
    def test_what_is_refused(self, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=words):
            config(tmp_path, optim="clipped_sstm", **settings)
