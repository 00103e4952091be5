"""A frozen base in four bits (QLoRA, arXiv 2305.14314): loaded through bitsandbytes, and given plain weights again."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from slimepo.errors import InputError
from slimepo.model.logps import causal_lm

# Of a weight in NF4: four bits, a byte of scale for 64 of them, and four bytes of those scales' scale for 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def four_bits(dtype: torch.dtype) -> Any:
    """transformers' configuration for loading a base in NF4, its scales quantised too, with products in `dtype`.

    The matrices of the layers are quantised; embeddings, head and norms stay in the dtype that they are loaded in.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    refuse_no_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def refuse_no_bitsandbytes() -> None:
    """Raises InputError where bitsandbytes is not installed."""
    if not is_bitsandbytes_available():
        raise InputError("weights in four bits need bitsandbytes: pip install 'slimepo[qlora]'")


def quantization_note(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of its base where that is in four bits, as plain data; nothing of another."""
    if not four_bit_layers(model):
        return {}
    config: Any = causal_lm(model).config
    return {"quantization_config": config.quantization_config.to_dict()}


def noted_quantization(note: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `quantization_note` says, as options for loading the base.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    noted = (note or {}).get("quantization_config")
    if noted is None:
        return {}
    refuse_no_bitsandbytes()
    return {"quantization_config": BitsAndBytesConfig.from_dict(noted)}


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model whose weights are in four bits, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")
    }


def four_bit_weights(model: nn.Module) -> int:
    """How many weights of a model are in four bits; bitsandbytes' tensors hold two in a number."""
    return sum(math.prod(layer.weight.quant_state.shape) for layer in four_bit_layers(model).values())


def four_bit_kind(model: nn.Module) -> str | None:
    """What the four bits of a model's weights are: nf4 or fp4; None where no weights are in four bits."""
    return next((layer.weight.quant_type for layer in four_bit_layers(model).values()), None)


def settle_four_bits(model: nn.Module) -> None:
    """Let a model that was loaded in four bits compute alike in training and in evaluation.

    On CPUs with bfloat16 instructions bitsandbytes would pack the weights anew for the first pass without gradients,
    into a form that computes in bfloat16 and gives no gradients from then on.
    """
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def dequantized(model: nn.Module) -> nn.Module:
    """The same model on the CPU in float32: under its adapter the plain weights that those in four bits stand for.

    Layer by layer and in place; what is given is of no use any more.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    outer: Any = model
    plain: Any = causal_lm(model)
    adapter = None
    if hasattr(outer, "peft_config"):
        # peft's layers for such a base would round what is merged to four bits again: the adapter comes off first.
        (adapter,) = outer.active_adapters
        config = copy.deepcopy(outer.peft_config[adapter])
        weights = {
            name: weight.detach().cpu()
            for name, weight in get_peft_model_state_dict(
                outer, adapter_name=adapter, save_embedding_layers=False
            ).items()
        }
        plain = outer.unload()
    for name, layer in four_bit_layers(plain).items():
        plain.set_submodule(name, _plain_layer(layer))
    plain.hf_quantizer.remove_quantization_config(plain)
    plain.is_loaded_in_4bit = False
    plain = plain.cpu().float()
    if adapter is not None:
        if hasattr(config, "init_lora_weights"):
            # Some ways to begin would change the base's weights once more.
            config.init_lora_weights = True
        plain = get_peft_model(plain, config, adapter_name=adapter)
        set_peft_model_state_dict(plain, weights, adapter_name=adapter)
    result: nn.Module = plain
    return result


def _plain_layer(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    made.weight = nn.Parameter(weight.cpu().float(), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().cpu().float(), requires_grad=False)
    return made
