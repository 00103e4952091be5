"""What a stage starts from: its base model and adapter, and where the stage before has left them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from slimepo.errors import InputError
from slimepo.files import write_json
from slimepo.model.adapters import PROJECTIONS, lora_config
from slimepo.model.load import (
    adapter_base,
    load_config,
    load_model,
    random_config,
    random_model,
    smoke_config,
)
from slimepo.model.logps import causal_lm
from slimepo.model.modes import computes_in_bf16
from slimepo.model.quantize import four_bit_layers, four_bits, quantization_note
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import RandomModel, Stage


def stage_base(recipe: Recipe, stage: Stage, out: Path) -> str | RandomModel:
    """What a stage starts from: the recipe's model, or what the stage before it has left in the run folder `out`."""
    start = recipe.start_of(stage)
    if start is None:
        return recipe.model
    goes_on = recipe.between_stages == "continue"
    return str((exported_adapter if goes_on else exported_model)(out / start))


def exported_model(folder: Path) -> Path:
    """Where a stage with this folder leaves its model; absolute, as adapters name their base."""
    return (folder / "model").resolve()


def exported_adapter(folder: Path) -> Path:
    """Where a stage with this folder leaves its adapter, for a stage that goes on with it."""
    return (folder / "adapter").resolve()


def save_adapter(recipe: Recipe, model: Any, folder: Path) -> None:
    """Keep a stage's adapter as it is, not merged, with what says how its base was loaded."""
    model.save_pretrained(folder)
    write_json(
        folder / "slimepo.json", {"template_options": recipe.template_options, **quantization_note(model)}
    )


def stage_model(recipe: Recipe, base: str | RandomModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The model a stage starts from: loaded, or random, or shrunk for a smoke run; in four bits where that is asked.

    Raises:
        InputError: it cannot be loaded, or has nothing to quantise.
    """
    dtype = base_dtype(recipe)
    loading: dict[str, Any] = {"dtype": dtype}
    if recipe.quantize is not None:
        loading["quantization_config"] = four_bits(dtype)
    model: nn.Module
    if not is_made(recipe, base):
        model = load_model(str(base), **loading)
    else:
        config = (
            random_config(base.architecture, base.sizes, tokenizer)
            if isinstance(base, RandomModel)
            else load_config(base)
        )
        made = random_model(smoke_config(config) if recipe.smoke else config, recipe.seed)
        model = made
        if recipe.quantize is not None:
            # transformers quantises what it loads, and saves on the first of several ranks alone.
            with TemporaryDirectory(prefix="slimepo-base-") as folder:
                made.config.save_pretrained(folder)
                save_model(made, str(Path(folder) / "model.safetensors"), {"format": "pt"})
                model = load_model(folder, **loading)
    if recipe.quantize is not None and not four_bit_layers(model):
        raise InputError(
            f"quantize: {recipe.quantize} finds no layer to quantise in {type(causal_lm(model)).__name__}: leave it out"
        )
    return model


def is_made(recipe: Recipe, base: str | RandomModel) -> bool:
    """Whether a base is made here, at random, so that nobody else has it."""
    return isinstance(base, RandomModel) or (recipe.smoke and base == recipe.model)


def given_adapter(recipe: Recipe, stage: Stage) -> str | None:
    """What becomes of the adapter that a stage starts from; None where it starts from a plain model.

    Raises:
        InputError: the model is an adapter and `adapter` does not say, or says it of a model that is none.
    """
    if recipe.start_of(stage) is not None:
        return "continue" if recipe.between_stages == "continue" else None
    if not isinstance(recipe.model, str):
        return None
    adapter = recipe.adapter
    wanted = (
        "continue" if adapter == "continue" else "merge" if adapter is not None and adapter.merge else None
    )
    if (wanted is None) == (adapter_base(recipe.model) is not None):
        raise InputError(
            f"model {recipe.model!r} is an adapter: give adapter: continue to train it on, or adapter: merge to fold "
            "it into its model first"
            if wanted is None
            else f"adapter: {wanted} is for a model that is an adapter, and {recipe.model!r} is none"
        )
    return None if recipe.smoke else wanted


def lora(recipe: Recipe) -> Any:
    """peft's configuration of the adapters that the recipe makes; None where its models train whole."""
    adapter = recipe.adapter
    if adapter == "continue":
        from peft import PeftConfig

        given = PeftConfig.from_pretrained(recipe.model)
        given.inference_mode, given.base_model_name_or_path = False, None
        return given
    return adapter and lora_config(
        adapter.r, adapter.alpha, adapter.dropout, adapter.target_modules or PROJECTIONS, adapter.train_head
    )


def base_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that weights are loaded in."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)  # type: ignore[no-any-return]
    # A model that trains whole keeps float32 weights: steps of 5e-7 vanish in bfloat16.
    return torch.bfloat16 if recipe.adapter is not None and computes_in_bf16() else torch.float32
