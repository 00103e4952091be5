"""The certificate: right runs pass and are not changed by it, wrong ones do not start."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimepo.data.batch import StepCollator
from slimepo.data.rows import length
from slimepo.errors import CertificateError
from slimepo.model.adapters import lora_config
from slimepo.training import step
from slimepo.training.certificate import beside, certify, chosen_rows, compared, in_words
from slimepo.training.config import PreferenceConfig
from slimepo.training.step import OutOfMemory
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model


def made(
    tmp_path: Path,
    *,
    peft: Any = None,
    architecture: str = "llama",
    model: Any = None,
    train_dataset: Any = None,
    **options: Any,
) -> PreferenceTrainer:
    values = dict(
        output_dir=str(tmp_path), learning_rate=1e-2, logging_steps=1, save_strategy="no", max_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, monitor=False, disable_tqdm=True,
    )  # fmt: skip
    return PreferenceTrainer(
        model=model or tiny_model(architecture),
        args=PreferenceConfig(**(values | options)),
        train_dataset=train_dataset or random_rows(9),
        peft_config=peft,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "shared", "activation_checkpointing": "layers"},
        {"loss": "dpo", "reference": "copy", "layout": "packed"},
        {"loss": "dpo", "reference": "cache"},
        {"loss": "kto"},
        {"loss": "wpo(dpo)", "layout": "shared"},
        {"loss": "sft", "architecture": "gemma2", "layout": "padded"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_right_run_agrees_in_loss_and_gradients(tmp_path: Path, options: dict[str, Any]) -> None:
    found = made(tmp_path, **options).certify()
    assert found["agrees"]
    assert found["loss"]["error"] < 1e-6
    assert max(each["error"] for each in found["gradients"]) < 1e-5
    assert min(each["plain"] for each in found["gradients"]) > 0
    assert (found["rows"], found["ranks"]) == (3, 1)


def test_an_adapter_and_its_head_are_among_the_tensors(tmp_path: Path) -> None:
    found = made(tmp_path, peft=lora_config(r=2, alpha=4)).certify()
    moved = [each["name"] for each in found["gradients"] if each["plain"] > 0]
    assert any("lora_B" in name for name in moved)
    assert any("lm_head.modules_to_save" in name for name in moved)


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    """Dropout and noise are drawn as they would have been, and nothing is added to a gradient."""
    weights, losses = [], []
    for certificate in (True, False):
        run = made(
            tmp_path,
            peft=lora_config(r=2, alpha=4, dropout=0.3),
            neftune_noise_alpha=5,
            certificate=certificate,
        )
        run.train()
        assert (run.certificate is not None) == certificate
        weights.append([p.detach().clone() for p in run.model.parameters()])
        losses.append([line["loss"] for line in run.state.log_history if "loss" in line])
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda logps: -logps + 2 * logps.detach(), "is off by 2 of the plain one's"),
        (lambda logps: logps * 1.01, "against"),
    ],
    ids=["gradients of the wrong sign", "log-probs a little off"],
)
def test_a_wrong_run_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, words: str
) -> None:
    right = step.policy_tokens
    monkeypatch.setattr(step, "policy_tokens", lambda *given: wrong(right(*given)))
    run = made(tmp_path)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(CertificateError, match=words):
        run.train()
    assert run.certificate is not None
    assert not run.certificate["agrees"]
    assert all(torch.equal(one, other) for one, other in zip(before, run.model.parameters(), strict=True))


def test_ranks_whose_gradients_are_not_alike_are_found() -> None:
    gradient = torch.tensor([[3.0, 4.0]])
    found = compared((1.0, {"w": gradient}), (1.0, {"w": gradient}), [{"w": 5.0}, {"w": 2.5}], "float32")
    assert not found["agrees"]
    assert found["gradients"][0]["error"] == 0.5


def test_a_number_that_is_none_is_no_agreement() -> None:
    nan = torch.tensor([[float("nan")]])
    assert not compared((1.0, {"w": nan}), (1.0, {"w": torch.ones(1, 1)}), [{"w": float("nan")}], "half")[
        "agrees"
    ]


def test_the_rows_are_the_shortest_and_the_last_rank_has_a_micro_batch_less() -> None:
    rows, collator = random_rows(8), StepCollator(2)
    first, last = chosen_rows(rows, collator, 0, 2), chosen_rows(rows, collator, 1, 2)
    assert [length(row) for row in first] == sorted(map(length, rows))[:3]
    assert [len(collator(chosen)["batches"]) for chosen in (first, last)] == [2, 1]


def test_what_cannot_be_compared_is_said() -> None:
    fp16: Any = SimpleNamespace(mixed_precision="fp16")
    found = certify(*[None] * 8, fp16)  # type: ignore[arg-type]
    assert (
        in_words(found) == "certificate: left out, for the scale of an fp16 loss is found by training alone"
    )


def test_a_run_that_goes_on_is_compared_with_the_reference_it_began_with(tmp_path: Path) -> None:
    """The cache holds log-probs of a policy that has changed since."""
    made(tmp_path, loss="dpo", reference="cache", save_strategy="steps", save_steps=1, max_steps=1).train()
    again = made(tmp_path, loss="dpo", reference="cache")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.certificate is not None
    assert again.certificate["loss"]["plain"] != pytest.approx(0.6931, abs=1e-4), (
        "policy and reference were one"
    )


def test_a_gradient_that_is_rounding_is_no_fault_and_hides_none() -> None:
    plain = {"sure": torch.tensor([3.0]), "rounding": torch.tensor([0.2])}
    for of_run, agrees in ((3.0, True), (2.9, False)):
        run = {"sure": torch.tensor([of_run]), "rounding": torch.tensor([0.14])}
        norms = [{name: float(gradient.norm()) for name, gradient in run.items()}]
        found = compared((1.0, run), (1.0, plain), norms, "float32", {"sure": 0.0, "rounding": 0.9})
        assert (found["agrees"], found["rounding"]) == (agrees, ["rounding"])


def test_a_gradient_may_be_off_by_three_times_what_the_precision_makes_of_the_plain_one() -> None:
    plain = {"w": torch.tensor([1.0])}
    for of_run, agrees in ((1.2, True), (1.3, False)):
        run = {"w": torch.tensor([of_run])}
        assert compared((1.0, run), (1.0, plain), [{"w": of_run}], "half", {"w": 0.08})["agrees"] == agrees
        assert not compared((1.0, run), (1.0, plain), [{"w": of_run}], "half")["agrees"], "not looked at"


@pytest.mark.parametrize("loss", ["slime", "dpo", "simpo"])
def test_in_bfloat16_a_right_run_agrees_however_uneven_its_model(tmp_path: Path, loss: str) -> None:
    """At 25 times the usual weights, bfloat16 alone is more than a tenth off in the gradients of attention."""
    for seed in range(4):
        model = tiny_model(initializer_range=0.5, seed=seed)
        found = made(tmp_path, loss=loss, model=model, bf16=True).certify()
        assert found["precision"] == "half"
        assert found["agrees"], in_words(found)


@pytest.mark.parametrize("spread", [0.02, 0.5])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda logps: -logps + 2 * logps.detach(),
        lambda logps: 0.5 * logps + 0.5 * logps.detach(),
        lambda logps: torch.cat([logps[: len(logps) // 2].detach(), logps[len(logps) // 2 :]]),
    ],
    ids=["gradients of the wrong sign", "half the gradient", "half of the tokens have none"],
)
def test_in_bfloat16_a_wrong_run_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, spread: float
) -> None:
    right = step.policy_tokens
    monkeypatch.setattr(step, "policy_tokens", lambda *given: wrong(right(*given)))
    for seed in range(2):
        model = tiny_model(initializer_range=spread, seed=seed)
        with pytest.raises(CertificateError, match="does not compute what it should"):
            made(tmp_path, model=model, bf16=True).certify()


def test_where_every_gradient_is_rounding_nothing_is_said_of_the_run() -> None:
    plain, run = {"w": torch.ones(1)}, {"w": torch.full((1,), 2.0)}
    found = compared((1.0, run), (1.0, plain), [{"w": 2.0}], "half", {"w": 0.8})
    assert "all 1 gradients that are compared are rounding" in in_words(found)
    # What is no number is not rounding.
    run["w"] = torch.tensor([float("nan")])
    assert not compared((1.0, run), (1.0, plain), [{"w": 2.0}], "half", {"w": float("nan")})["agrees"]


def test_a_loss_may_be_off_by_three_times_what_the_precision_makes_of_it() -> None:
    same = {"w": torch.ones(1)}
    for loss, agrees in ((1.08, True), (1.1, False)):
        found = compared((loss, same), (1.0, same), [{"w": 1.0}], "half", {"w": 0.0}, 0.03)
        assert found["agrees"] == agrees


def test_errors_of_rows_that_cancel_by_chance_still_say_how_coarse_a_precision_is() -> None:
    """Of a run whose three rows are off alike, as it happens in one of several bfloat16 runs with SimPO."""
    model, same = tiny_model(), {"w": torch.ones(1, 1)}
    for of_rows, agrees in (([0.72, 0.68, 0.7], True), ([0.7, 0.7, 0.7], False)):
        plain = iter([([0.7, 0.7, 0.7], same), ([0.7, 0.7, 0.7], same), (of_rows, same)])
        found = beside(
            plain.__next__, model, (2.2, same), [{"w": 1.0}], "half", torch.device("cpu"), torch.bfloat16
        )
        assert found["agrees"] is agrees


def test_rows_without_weight_are_looked_at_last_and_of_nothing_else_nothing_is_said(tmp_path: Path) -> None:
    some = [replace(row, values={"weight": float(i % 3 > 0)}) for i, row in enumerate(random_rows(9))]
    found = made(tmp_path, train_dataset=some).certify()
    assert found["agrees"]
    assert min(each["plain"] for each in found["gradients"]) > 0
    none = [replace(row, values={"weight": 0.0}) for row in random_rows(9)]
    found = made(tmp_path / "none", train_dataset=none).certify()
    assert in_words(found) == "certificate: left out, for no row has anything to learn from"


def test_without_room_for_it_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutOfMemory("no room")

    monkeypatch.setattr("slimepo.training.certificate.train_step", full)
    run = made(tmp_path, certificate=True)
    run.train()
    assert run.state.global_step == 2
    assert run.certificate == {"left_out": "there is no room for two rows at once"}
