"""Checkpointed activations, kept or moved: the same gradients, and every way of asking for it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimepo.data.batch import collate, collate_packed
from slimepo.errors import InputError
from slimepo.model.adapters import add_adapter, lora_config
from slimepo.model.attention.interface import install
from slimepo.model.logps import causal_lm, install_logps
from slimepo.pipeline.recipe.arguments import stage_arguments
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.model.attention.test_interface import in_float64, logps_and_gradients
from tests.tiny import random_rows, tiny_model


def model_in_float64(lora: bool, **sizes: Any) -> nn.Module:
    model: Any = tiny_model("qwen3", num_hidden_layers=3, **sizes)
    if lora:
        model = add_adapter(model, lora_config(r=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    model = in_float64(model).train()
    install_logps(model)
    return model


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_same_gradients(lora: bool, layout: str) -> None:
    model: Any = model_in_float64(lora)
    pairs = random_rows(4)
    if layout != "padded":
        install(causal_lm(model))
    batch = collate(pairs) if layout == "padded" else collate_packed(pairs, shared=layout == "shared")
    plain = logps_and_gradients(model, batch)
    model.activation_checkpointing_enable()
    for a, b in zip(plain, logps_and_gradients(model, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({}, (False, False)),
        ({"activation_checkpointing": "none"}, (False, False)),
        ({"activation_checkpointing": "layers"}, (True, False)),
        ({"activation_checkpointing": True}, (True, False)),
        ({"activation_checkpointing": "offload"}, (True, True)),
        ({"activation_offloading": True}, (True, True)),
        ({"gradient_checkpointing": True}, (True, False)),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            (True, False),
        ),
        ({"gradient_checkpointing": False}, (False, False)),
    ],
)
def test_every_way_of_asking_is_understood_without_a_warning(
    given: dict[str, Any], resolved: tuple[bool, bool]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = PreferenceConfig(**given)
    assert (args.activation_checkpointing, args.activation_offloading) == resolved
    assert args.gradient_checkpointing == resolved[0]


def test_a_stage_of_a_recipe_asks_with_the_same_words(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": "m", "data": {"path": "d"}}
    for word, resolved in (("none", (False, False)), ("layers", (True, False)), ("offload", (True, True))):
        recipe = make_recipe(values | {"stages": [{"loss": "slime", "activation_checkpointing": word}]})
        args = stage_arguments(recipe, recipe.stages[0], tmp_path)
        assert (args.activation_checkpointing, args.activation_offloading) == resolved
    # The older names, in a stage's args, are not overruled by the key's default.
    for older, resolved in (
        ("gradient_checkpointing", (True, False)),
        ("activation_offloading", (True, True)),
    ):
        recipe = make_recipe(values | {"stages": [{"loss": "slime", "args": {older: True}}]})
        args = stage_arguments(recipe, recipe.stages[0], tmp_path)
        assert (args.activation_checkpointing, args.activation_offloading) == resolved
    with pytest.raises(InputError, match="activation_checkpointing"):
        make_recipe(values | {"stages": [{"loss": "slime", "activation_checkpointing": "layer"}]})


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(
        InputError, match="activation_checkpointing = 'layer' is unknown: give one of none, layers"
    ):
        PreferenceConfig(activation_checkpointing="layer")
    with pytest.raises(InputError, match="give activation_checkpointing too"):
        PreferenceConfig(activation_checkpointing="none", activation_offloading=True)
    with pytest.raises(InputError, match="gradient_checkpointing asks for what"):
        PreferenceConfig(activation_checkpointing="none", gradient_checkpointing=True)


def losses(tmp_path: Path, how: str, lora: bool) -> tuple[list[float], PreferenceTrainer]:
    args = PreferenceConfig(
        output_dir=str(tmp_path), learning_rate=1e-3, max_steps=3, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=4, report_to="none", activation_checkpointing=how,
    )  # fmt: skip
    adapter = lora_config(r=4) if lora else None
    trainer = PreferenceTrainer(tiny_model("qwen3"), args, random_rows(12), peft_config=adapter)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
@pytest.mark.parametrize("lora", [True, False])
def test_the_trainer_takes_the_same_steps_and_says_what_it_does(tmp_path: Path, lora: bool) -> None:
    plain, trainer = losses(tmp_path, "none", lora)
    assert trainer.activations == "kept"
    for how, words in (
        ("layers", "computed again in the backward pass"),
        ("offload", "computed again in the backward pass (there is no CUDA device to offload from)"),
    ):
        again, trainer = losses(tmp_path, how, lora)
        assert again == pytest.approx(plain, rel=1e-6)
        assert trainer.activations == words
        assert causal_lm(trainer.model).is_activation_checkpointing


def test_on_a_device_transformers_moves_what_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes `offload` among the arguments of checkpointing; without a device it has nowhere to move from."""
    assert PreferenceConfig(activation_checkpointing="offload").activation_checkpointing_kwargs is None
    monkeypatch.setattr(PreferenceConfig, "device", torch.device("cuda"))
    for given in (None, {"use_reentrant": False}):
        args = PreferenceConfig(
            activation_checkpointing="offload", activation_checkpointing_kwargs=given, bf16=False
        )
        assert args.activation_checkpointing_kwargs == {**(given or {}), "offload": True}
        assert args.activations == "computed again, the layers' inputs in CPU memory until then"
    assert PreferenceConfig(activation_checkpointing="layers").activation_checkpointing_kwargs is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_less_is_held_and_the_gradients_are_the_same() -> None:
    sizes = {"num_hidden_layers": 12, "hidden_size": 256, "head_dim": 64, "max_position_embeddings": 8192}

    def run(how: str) -> tuple[int, list[Tensor]]:
        model: Any = tiny_model("llama", **sizes).cuda().train()
        model.activation_checkpointing_enable(offload=how == "offload")
        ids = torch.arange(4 * 4096, device="cuda").view(4, 4096) % 61
        for _ in range(2):  # the second time pinned memory and kernels are warm
            model.zero_grad()
            hidden = model.model(ids, use_cache=False).last_hidden_state
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            hidden.square().mean().backward()
        torch.cuda.synchronize()
        return held, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    kept, plain = run("layers")
    moved, again = run("offload")
    # Twelve inputs of 4 x 4096 x 256 float32 numbers; up to two may still be under way.
    assert kept - moved > 9 * 4 * 4096 * 256 * 4
    # Not bit by bit: the kernels of a backward pass add in no fixed order.
    for a, b in zip(plain, again, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
