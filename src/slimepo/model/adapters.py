"""Adapters and trained heads: what a model with an adapter is, what it trains, and how it becomes a plain model."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimepo.errors import InputError
from slimepo.model.logps import causal_lm
from slimepo.model.quantize import dequantized, four_bit_layers
from slimepo.words import first_line, nearest

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
# What can become of an adapter that a model comes with.
GIVEN = ("continue", "merge")
# In the names of the parameters that peft adds: LoRA's, IA3's, and copies of modules that train whole.
OF_ADAPTERS = ("lora_", "ia3_", "modules_to_save")
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


def with_adapter(model: nn.Module, peft_config: Any = None, wanted: str | None = None) -> nn.Module:
    """The model as it is to train: with the adapter that it has, or with a new one.

    Args:
        model: a transformers model, or one in peft's wrapper, whose adapter is then part of what it computes.
        peft_config: a new adapter to train.
        wanted: what becomes of an adapter that is there: "continue" trains it on, "merge" folds it into the weights
            first. None: on, unless there is a new one, which would leave open what becomes of the old.

    Raises:
        InputError: a kind of adapter that is no change of weights, a new adapter upon another without a word, or a
            state of the given adapter that would not train or not be saved.
    """
    if wanted not in (None, *GIVEN):
        raise InputError(f"adapter = {wanted!r} is unknown: give one of {', '.join(GIVEN)}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "the model's adapter was loaded by transformers, beside it: load it with peft "
            "(PeftModel.from_pretrained(model, folder, is_trainable=True)), or give the adapter's folder as model"
        )
    given = getattr(model, "peft_config", None)
    if given is None and wanted is not None:
        raise InputError(f"adapter = {wanted!r}, but the model has no adapter")
    for config in [*(given or {}).values(), *([peft_config] if peft_config is not None else [])]:
        refuse_other_kinds(config)
    if given is not None and wanted == "merge":
        refuse_quantized(model)
        model, given = merge(model), None
    if given is None:
        return model if peft_config is None else add_adapter(causal_lm(model), peft_config)
    if peft_config is not None:
        raise InputError(
            "the model has an adapter already, and peft_config asks for a new one: leave peft_config out to train it "
            "on, or give adapter = 'merge' to fold it into the weights first"
        )
    _refuse_states(model)
    if any(_parts_head_and_embedding(causal_lm(model), config) for config in given.values()):
        untie_head(model)
    return model


def add_adapter(model: PreTrainedModel, peft_config: Any) -> nn.Module:
    """Wrap `model` with a new adapter; a head that is to be trained is untied from the embeddings first.

    Trained parameters are kept in float32, because steps of 5e-7 vanish in bfloat16.

    Raises:
        InputError: one of the target modules is not in the model (of our own default, all of them), or nothing of it
            says which they are.
    """
    from peft import get_peft_model

    _refuse_unknown_targets(model, peft_config)
    if _parts_head_and_embedding(model, peft_config):
        untie_head(model)
    if model.config is not model.config.get_text_config() and peft_config.exclude_modules is None:
        # Text alone trains: adapters in a vision tower would never get a gradient.
        peft_config = dataclasses.replace(peft_config, exclude_modules=_OTHER_SENSES)
    try:
        wrapped: nn.Module = get_peft_model(model, peft_config)
    except ValueError as error:
        raise InputError(f"the adapter does not fit {type(model).__name__}: {first_line(error)}") from error
    keep_trained_in_float32(wrapped)
    return wrapped


def _refuse_unknown_targets(model: PreTrainedModel, peft_config: Any) -> None:
    """Refuse a name that no module has; peft leaves it out as long as another one is there."""
    asked = getattr(peft_config, "target_modules", None)
    # Our own default names the projections of many architectures.
    if not isinstance(asked, list | set | tuple) or set(asked) == set(PROJECTIONS):
        return
    there = [f".{name}" for name, _ in model.named_modules()]
    for target in sorted(asked):
        if not any(name.endswith(f".{target}") for name in there):
            known = sorted({name.rpartition(".")[2] for name in there})
            raise InputError(
                f"adapter: target_modules: no module of {type(model).__name__} is called "
                f"{target!r}{nearest(target, known)}"
            )


def refuse_other_kinds(peft_config: Any) -> None:
    """Refuse an adapter that is no change of the model's weights, such as prompt and prefix tuning."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = peft_config.peft_type
    if peft_config.is_prompt_learning or not issubclass(PEFT_TYPE_TO_TUNER_MAPPING[kind], BaseTuner):
        raise InputError(
            f"adapters of the kind {getattr(kind, 'value', kind)} are not supported, because they are no change of "
            "the model's weights: use LoRA or its kin (slimepo.lora_config)"
        )


def refuse_quantized(model: nn.Module) -> None:
    """Refuse weights that are quantised, into which no adapter can be folded."""
    if (method := getattr(causal_lm(model), "quantization_method", None)) is not None:
        raise InputError(
            f"the model's weights are quantised ({getattr(method, 'value', method)}), and an adapter cannot be folded "
            "into such: start from the model that is not, or use PreferenceTrainer and save_model"
        )


def refuse_unmergeable(model: nn.Module) -> None:
    """Refuse, before it trains, an adapter that cannot be folded into its model afterwards.

    Weights in four bits are given plain weights again first (`slimepo.model.quantize.dequantized`).
    """
    if not four_bit_layers(model):
        refuse_quantized(model)
    tuner: Any = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
    try:
        if tuner is not None:
            tuner._check_merge_allowed()
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"the adapter could not be merged for the export: {first_line(error)}") from error


def adapter_state(model: nn.Module) -> list[Any]:
    """What an adapter computes with beside its weights: which of them are on, and their scales, layer by layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        [
            name,
            layer.active_adapters,
            layer.disable_adapters,
            layer.merged_adapters,
            getattr(layer, "scaling", None),
        ]
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]


def _refuse_states(model: Any) -> None:
    """Refuse what would not train, or be saved as something else than what was trained."""
    if len(model.active_adapters) > 1:
        raise InputError(
            f"{len(model.active_adapters)} adapters are on at once ({', '.join(model.active_adapters)}), and one "
            "can train: choose it with model.set_adapter(name), or give adapter = 'merge'"
        )
    for name, active, disabled, merged, scaling in adapter_state(model):
        if disabled:
            raise InputError(
                f"the adapter is switched off ({name}): call model.base_model.enable_adapter_layers()"
            )
        if merged:
            raise InputError(
                f"the adapter is merged for the time being ({name}): call model.unmerge_adapter()"
            )
        layer = model.get_submodule(name)
        for adapter in active:
            if not hasattr(layer, "lora_alpha") or adapter not in (scaling or {}):
                continue
            rank = layer.r[adapter]
            own = layer.lora_alpha[adapter] / (math.sqrt(rank) if layer.use_rslora.get(adapter) else rank)
            if not math.isclose(scaling[adapter], own, rel_tol=1e-6):
                raise InputError(
                    f"the adapter {adapter!r} is scaled by {scaling[adapter] / own:g} ({name}), which is not saved "
                    "with it: set the scale back (unscale_layer), or give adapter = 'merge'"
                )


def _parts_head_and_embedding(model: PreTrainedModel, peft_config: Any) -> bool:
    """Whether the adapter changes the output and the input embedding unlike: trains one of them, or puts LoRA on it."""
    from peft.tuners.tuners_utils import check_target_module_exists

    # These tie what they add themselves.
    if getattr(peft_config, "ensure_weight_tying", False) or peft_config.peft_type == "TRAINABLE_TOKENS":
        return False
    embeddings = [_bare(model.get_output_embeddings()), _bare(model.get_input_embeddings())]
    names = [name for name, module in model.named_modules() if any(module is each for each in embeddings)]
    names = [re.sub(r"\.(base_layer|original_module)$", "", name) for name in names]
    saved = getattr(peft_config, "modules_to_save", None) or ()
    if any(name == kept or name.endswith(f".{kept}") for name in names for kept in saved):
        return True
    targets = getattr(peft_config, "target_modules", None)
    # peft's own choices, and "all-linear", leave both alone.
    return targets not in (None, "all-linear") and any(
        check_target_module_exists(peft_config, name) for name in names
    )


def _bare(module: Any) -> Any:
    """The module that peft has put its own around."""
    while (inner := getattr(module, "base_layer", getattr(module, "original_module", None))) is not None:
        module = inner
    return module


def untie_head(model: nn.Module) -> None:
    """Give the head a weight of its own where it shares the input embedding's, and say so in the config.

    Without this a trained head is silently lost: the config still says 'tied', so that loading the saved or
    merged model puts the embedding back in the head's place. A trained embedding would change the head.
    """
    inner: Any = causal_lm(model)
    head, embedding = _bare(inner.get_output_embeddings()), _bare(inner.get_input_embeddings())
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(
        embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad
    )
    for config in (inner.config, inner.config.get_text_config()):
        config.tie_word_embeddings = False
    inner.all_tied_weights_keys = inner.get_expanded_tied_weights_keys(all_submodels=True)


def keep_trained_in_float32(model: nn.Module) -> None:
    """Hold half-precision parameters that train in float32; frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def merge(model: nn.Module) -> PreTrainedModel:
    """The plain transformers model with its active adapters folded in; `model` itself when it has none.

    A base in four bits is given plain weights first, in float32 on the CPU.
    """
    plain: Any = dequantized(model) if four_bit_layers(model) else model
    if hasattr(plain, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        inner = causal_lm(plain)
        ends = (inner.get_output_embeddings(), inner.get_input_embeddings())
        if any(isinstance(end, BaseTunerLayer) for end in ends):
            # What is added to one of them, or to each, must not be added to the weight that both share.
            untie_head(plain)
        off = any(disabled for _, _, disabled, *_ in adapter_state(plain))
        # What is switched off is no part of what the model computes.
        plain = plain.unload() if off else plain.merge_and_unload()
    merged = causal_lm(plain)
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


def checkpoint_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names that a checkpoint of this kind of model has, adapters folded in.

    `model` trains on as it was: adapters are merged in a copy, and without any these are its own tensors. Tied weights
    are there by each of their names.

    Raises:
        InputError: they are quantised, and no checkpoint has them like that.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if getattr(causal_lm(model), "hf_quantizer", None) is not None:
        raise InputError(
            "weights that are quantised cannot be handed to vLLM: use rollouts: {engine: transformers}"
        )
    merged = merge(copy.deepcopy(model) if hasattr(model, "peft_config") else model)
    weights: dict[str, torch.Tensor] = revert_weight_conversion(merged, merged.state_dict())
    return weights
