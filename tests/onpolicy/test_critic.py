"""The value model: what it says, what a step of it does, and that a checkpoint holds all of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.onpolicy.critic import Critic
from slimepo.onpolicy.settings import ValueModel
from tests.tiny import tiny_model

ALONE: Any = SimpleNamespace(reduce=lambda value, how: value)


@pytest.fixture
def critic() -> Critic:
    return made()


def made() -> Critic:
    return Critic(tiny_model(), ValueModel(learning_rate=1e-2), 2, torch.device("cpu"))


def groups() -> list[Row]:
    random = np.random.default_rng(0)
    lengths = ((5, 3, 0, 4), (3, 1, 0, 4), (7, 5, 0, 4))
    rows = [[random.integers(3, 40, n, dtype=np.int32) for n in each] for each in lengths]
    return [Row(prompt, tuple(responses), {}, str(i)) for i, (prompt, *responses) in enumerate(rows)]


def with_targets(critic: Critic, rows: list[Row], target: float) -> list[Row]:
    values = critic.values(rows)
    return [
        Row(
            row.prompt_ids,
            row.responses,
            {
                "values": tuple(of_row),
                "returns": tuple(np.full(len(v), target, dtype=np.float32) for v in of_row),
            },
            row.id,
        )
        for row, of_row in zip(rows, values, strict=True)
    ]


def test_a_value_is_of_the_state_before_its_token(critic: Critic) -> None:
    nn.init.normal_(critic.model.score.weight)
    rows = groups()
    for row, of_row in zip(rows, critic.values(rows), strict=True):
        assert [len(v) for v in of_row] == [len(r) for r in row.responses]
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.responses[0]]).astype(np.int64))[None]
        with torch.no_grad():
            alone = critic.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1, 0]
        np.testing.assert_allclose(of_row[0], alone, atol=1e-5)


def test_a_step_takes_half_the_squared_error_a_token(critic: Critic) -> None:
    # At the start every value is 0, and what is aimed at is 3 for all tokens.
    figures = critic.learn(with_targets(critic, groups(), 3.0), ALONE)
    assert figures == pytest.approx({"value/loss": 4.5, "value/error": 3.0, "value/return": 3.0})


def test_steps_come_nearer_to_the_returns(critic: Critic) -> None:
    rows = groups()
    for _ in range(30):
        figures = critic.learn(with_targets(critic, rows, 1.0), ALONE)
    assert abs(figures["value/error"]) < 0.2


def test_the_loss_does_not_depend_on_the_micro_batches() -> None:
    weights = []
    for size in (1, 3):
        critic = made()
        critic.micro_batch_size = size
        for _ in range(3):
            critic.learn(with_targets(critic, groups(), 1.0), ALONE)
        weights.append(critic.model.score.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_a_step_without_any_token_leaves_it_as_it_is(critic: Critic) -> None:
    critic.learn(with_targets(critic, groups(), 1.0), ALONE)
    before = critic.model.score.weight.detach().clone()
    # The optimizer has momentum by now.
    critic.learn([], ALONE)
    assert torch.equal(critic.model.score.weight, before)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_it_starts_at_0_whatever_transformers_calls_its_head(architecture: str) -> None:
    critic = Critic(tiny_model(architecture), ValueModel.model_validate({}), 2, torch.device("cpu"))
    assert all(not of_response.any() for of_row in critic.values(groups()) for of_response in of_row)


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ],
)
def test_it_starts_from_the_backbone_without_the_adapters(adapter: Any) -> None:
    untouched = tiny_model().base_model
    critic = Critic(
        get_peft_model(tiny_model(), adapter), ValueModel.model_validate({}), 2, torch.device("cpu")
    )
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        ours, theirs = (model(ids).last_hidden_state for model in (critic.model.base_model, untouched))
    assert torch.equal(ours, theirs)


def test_what_a_checkpoint_holds_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    straight, other = made(), made()
    rows = groups()
    straight.learn(with_targets(straight, rows, 1.0), ALONE)
    straight.save(tmp_path)
    other.load(tmp_path)
    for critic in (straight, other):
        critic.learn(with_targets(critic, rows, 1.0), ALONE)
    assert torch.equal(straight.model.score.weight, other.model.score.weight)
    with pytest.raises(InputError, match="has no value model"):
        other.load(tmp_path / "elsewhere")
