"""The balance loss of a mixture of experts is transformers' own, and a part of the step where it is asked for."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from slimepo.data.batch import pair_logps
from slimepo.errors import InputError
from slimepo.kernels.naive import gather_logps
from slimepo.losses import bind
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
}
COEFFICIENT = 0.5
ROWS = {row.id: row for row in random_rows(6)}


def experts(architecture: str, asks: bool = True, coefficient: float = COEFFICIENT) -> Any:
    more = dict(output_router_logits=asks, router_aux_loss_coef=coefficient, initializer_range=0.3)
    return tiny_model(architecture, **(EXPERTS[architecture] | more))


def trainer(tmp_path: Path, model: Any, **settings: Any) -> PreferenceTrainer:
    args = PreferenceConfig(
        output_dir=str(tmp_path), learning_rate=1.0, optim="sgd", max_steps=1, logging_steps=1, save_strategy="no",
        monitor=False, pairs_per_step=6, **settings,
    )  # fmt: skip
    return PreferenceTrainer(model, args, [*ROWS.values()])


def padded(batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sequences of a micro-batch: ids and attention mask `[B, T]`, where targets are predicted, and targets."""
    rows = [ROWS[name] for name in batch["row_ids"]]
    sequences = [[*row.prompt_ids, *row.response(place)] for place in (0, 1) for row in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in sequences])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in sequences])
    answers = [(row, row.response(place)) for place in (0, 1) for row in rows]
    at = [
        line * width + len(row.prompt_ids) + token - 1
        for line, (row, answer) in enumerate(answers)
        for token in range(len(answer))
    ]
    targets = [int(token) for _, answer in answers for token in answer]
    return ids, mask, torch.tensor(at), torch.tensor(targets)


def expected(model: Any, batches: list[Any]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, balance loss and gradients of a step by transformers' own forward and `aux_loss`."""
    shares = [float(padded(batch)[1].sum()) for batch in batches]
    objective, balance = torch.zeros(()), torch.zeros(())
    for batch, share in zip(batches, shares, strict=True):
        ids, mask, at, targets = padded(batch)
        output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        logps = gather_logps(output.logits.flatten(0, 1)[at], targets)
        objective = objective + bind("slime", {})(pair_logps(logps, batch)).loss.sum() / len(ROWS)
        balance = balance + output.aux_loss * share / sum(shares)
    loss = objective + COEFFICIENT * balance
    loss.backward()
    return loss.item(), balance.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("architecture", "layout", "micro", "checkpointing"),
    [
        ("mixtral", "padded", 6, "none"),
        ("mixtral", "packed", 6, "none"),
        ("qwen3_moe", "padded", 2, "none"),
        ("qwen3_moe", "packed", 2, "layers"),
        ("olmoe", "packed", 2, "none"),
    ],
)
def test_a_step_is_that_of_transformers_own_loss(
    tmp_path: Path, architecture: str, layout: str, micro: int, checkpointing: str
) -> None:
    model = experts(architecture)
    plain = copy.deepcopy(model)
    made = trainer(
        tmp_path,
        model,
        layout=layout,
        per_device_train_batch_size=micro,
        activation_checkpointing=checkpointing,
    )
    loss, balance, gradients = expected(plain, next(iter(made.get_train_dataloader()))["batches"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made.train()
    (line,) = (line for line in made.state.log_history if "loss" in line)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["balance_loss"] == pytest.approx(balance, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter, gradients[name], rtol=1e-4, atol=1e-6)


def test_it_is_added_where_the_config_or_the_setting_asks_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "slimepo"):
        assert trainer(tmp_path, experts("mixtral", asks=False)).balance == 0
        assert trainer(tmp_path, experts("mixtral"), router_aux_loss_coef=0.0).balance == 0
        assert "is added" not in caplog.text
        assert trainer(tmp_path, experts("mixtral")).balance == COEFFICIENT
        assert "balance loss of the model's experts is added 0.5 times, by micro-batch" in caplog.text
    assert trainer(tmp_path, experts("mixtral", asks=False), router_aux_loss_coef=0.1).balance == 0.1
    with pytest.raises(
        InputError, match=r"router_aux_loss_coef = 0.1: LlamaForCausalLM is no mixture of experts"
    ):
        trainer(tmp_path, tiny_model(), router_aux_loss_coef=0.1)


def test_one_that_transformers_does_not_have_is_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = experts("mixtral")
    monkeypatch.delattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    with caplog.at_level(logging.WARNING, "slimepo"):
        assert trainer(tmp_path, model).balance == 0
    assert "balance loss of the model's experts (router_aux_loss_coef 0.5) is left out" in caplog.text
