"""LoRA adapters and trained heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimepo.errors import InputError
from slimepo.model.logps import causal_lm

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
_OTHER_SENSES = r".*(vision|visual|audio|multi_modal).*"


def lora_config(
    r: int = 64,
    alpha: float = 128,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] | list[str] | str = PROJECTIONS,
    train_head: bool = True,
) -> Any:
    """peft's `LoraConfig` with the paper's table as defaults: r 64, alpha 128, no dropout, no bias, head trained."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=["lm_head"] if train_head else None,
        task_type=TaskType.CAUSAL_LM,
    )


def add_adapter(model: PreTrainedModel, peft_config: Any) -> nn.Module:
    """Wrap `model` with an adapter; a head that is to be trained is untied from the embeddings first.

    Trained parameters are kept in float32, because steps of 5e-7 vanish in bfloat16.

    Raises:
        InputError: none of the target modules is in the model.
    """
    from peft import get_peft_model

    if trains_head(model, peft_config):
        untie_head(model)
    if model.config is not model.config.get_text_config() and peft_config.exclude_modules is None:
        # Text alone trains: adapters in a vision tower would never get a gradient.
        peft_config = dataclasses.replace(peft_config, exclude_modules=_OTHER_SENSES)
    try:
        wrapped: nn.Module = get_peft_model(model, peft_config)
    except ValueError as error:
        raise InputError(f"the adapter does not fit {type(model).__name__}: {error}") from error
    keep_trained_in_float32(wrapped)
    return wrapped


def trains_head(model: PreTrainedModel, peft_config: Any) -> bool:
    """Whether the adapter changes the output embedding: trains a copy of it, or puts LoRA on it."""
    from peft.tuners.tuners_utils import check_target_module_exists

    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    saved = peft_config.modules_to_save or ()
    if any(name == kept or name.endswith(f".{kept}") for kept in saved):
        return True
    return peft_config.target_modules != "all-linear" and bool(check_target_module_exists(peft_config, name))


def untie_head(model: PreTrainedModel) -> None:
    """Give the head a weight of its own where it shares the input embedding's, and say so in the config.

    Without this a trained head is silently lost: the config still says 'tied', so that loading the saved or
    merged model puts the embedding back in the head's place.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(
        embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad
    )
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def keep_trained_in_float32(model: nn.Module) -> None:
    """Hold half-precision parameters that train in float32; frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def merge(model: nn.Module) -> PreTrainedModel:
    """The plain transformers model with adapters folded in; `model` itself when it has none."""
    plain: Any = model
    if hasattr(plain, "merge_and_unload"):
        plain = plain.merge_and_unload()
    merged = causal_lm(plain)
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged
