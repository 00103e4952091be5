"""Models: loaded from a folder or the Hub, or made at random from a few sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import find_adapter_config_file

from slimepo.data.chat import load_tokenizer
from slimepo.errors import RESOURCES, BadFilesError, InputError, failure, one_line
from slimepo.files import read_json
from slimepo.hub import look_for_hub, not_given
from slimepo.model.adapters import refuse_other_kinds, with_adapter
from slimepo.model.quantize import noted_quantization, settle_four_bits
from slimepo.model.sizes import parameters_of, refuse_layers, refuse_numbers, refuse_too_large
from slimepo.words import first_line

# What 'architecture' in a recipe stands for: transformers' model types.
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3_text"}

# Weights that a checkpoint may hold beside those of its language model: towers of other senses, heads that predict
# several tokens or a value, tables and masks that older versions saved.
_BESIDE_THE_TEXT = re.compile(
    r"vision|visual|audio|multi_modal|embed_vision|(^|\.)mtp|v_head|value_head|inv_freq"
    r"|(^|\.)(attn|attention)\.(masked_)?bias$"
)

_SMOKE_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}


def load_model(name: str, base: str | None = None, **kwargs: Any) -> nn.Module:
    """A pretrained causal language model from a folder or a Hub id, in float32 unless `dtype` says otherwise.

    Of an adapter's folder or id the model that it belongs to, with the adapter in peft's wrapper, ready to train on.

    Args:
        base: the model an adapter belongs to; read from the adapter where it is not given.

    Raises:
        InputError: there is no such model, or it cannot be reached.
        BadFilesError: its weights are damaged, or not those that its config asks for.
    """
    kwargs.setdefault("dtype", torch.float32)
    refuse_pickles(name)
    found = adapter_base(name)
    if found is not None:
        return _load_adapter(name, base or found, kwargs)
    return load_whole_weights(AutoModelForCausalLM, name, "model", **kwargs)


def load_whole_weights(kind: Any, name: str, what: str, **kwargs: Any) -> nn.Module:
    """A model of one of transformers' classes, `kind`, with every one of its tensors from its files.

    transformers would fill what is missing with random numbers and go on. What a class itself says that its files may
    lack (a tied head, tables computed from the config) is not missing. `what`: what messages call it.

    Raises:
        InputError: there is no such model, or it cannot be reached.
        BadFilesError: its weights are damaged, or not those that its config asks for.
    """
    # Of what a folder holds nothing is run: neither its code, unless somebody asks for it by name, nor a pickle.
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
    refuse_pickles(name)
    try:
        model, report = kind.from_pretrained(name, output_loading_info=True, **kwargs)
    except Exception as error:
        # Too little memory or disk is no fault of the files; transformers' own OSErrors, of no number, are of the name.
        if failure(error).code == RESOURCES and getattr(error, "errno", 0) is not None:
            raise
        of_files = BadFilesError if not isinstance(error, OSError | ValueError | ImportError) else InputError
        raise of_files(f"{what} {name!r} cannot be loaded: {not_given(first_line(error))}") from error
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not _BESIDE_THE_TEXT.search(key))
    refuse_other_tensors(f"{what} {name!r}", "its config.json", missing, unexpected)
    settle_four_bits(model)
    result: nn.Module = model
    return result


def refuse_pickles(name: str) -> None:
    """Refuse a folder whose weights are pickles, which may run code as they are read.

    Raises:
        BadFilesError: with one of them.
    """
    weights = "*model*"
    found = sorted(
        path.name for end in ("bin", "pt", "pth", "ckpt") for path in Path(name).glob(f"{weights}.{end}")
    )
    if found and not any(Path(name).glob(f"{weights}.safetensors")):
        raise BadFilesError(
            f"model {name!r}: its weights are a pickle ({found[0]}), which may run code as it is read; save them as "
            "safetensors (save_pretrained does)"
        )


def adapter_base(name: str) -> str | None:
    """The model that the adapter of a folder or Hub id belongs to ('' where it does not say); None: no adapter there.

    Raises:
        InputError: the adapter's configuration cannot be read, or it is no change of weights.
    """
    from peft import PeftConfig

    look_for_hub(name, f"model {name!r} cannot be loaded: ")
    try:
        if find_adapter_config_file(name) is None:
            return None
        config = PeftConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {not_given(first_line(error))}") from error
    refuse_other_kinds(config)
    return config.base_model_name_or_path or ""


def _load_adapter(name: str, base: str, kwargs: dict[str, Any]) -> nn.Module:
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    if not base:
        raise InputError(
            f"adapter {name!r} names no base model in its adapter_config.json: give it with --base"
        )
    # An adapter that was trained on a base in four bits means that base.
    noted = noted_quantization(read_json(Path(name) / "slimepo.json"))
    plain: Any = load_model(base, **(noted | kwargs))
    if hasattr(plain, "peft_config"):
        raise InputError(f"adapter {name!r} belongs to {base!r}, an adapter itself: export that one first")
    try:
        weights = load_peft_weights(name, device="cpu")
        # What was resized before the adapter came on was saved with it.
        embeddings = _saved_embeddings(plain, weights)
        rows = {len(embedding) for embedding in embeddings.values()}
        if rows - {len(plain.get_input_embeddings().weight)}:
            plain.resize_token_embeddings(rows.pop(), mean_resizing=False)
        model = PeftModel.from_pretrained(
            plain, name, config=PeftConfig.from_pretrained(name), is_trainable=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BadFilesError(f"adapter {name!r} does not fit {base!r}: {first_line(error)}") from error
    own = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    missing = sorted(own - weights.keys())
    unexpected = sorted(weights.keys() - own - embeddings.keys())
    refuse_other_tensors(f"adapter {name!r}", "its adapter_config.json", missing, unexpected)
    return with_adapter(model)


def _saved_embeddings(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an adapter's weights hold of the input and output embeddings themselves."""
    places = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = "|".join(re.escape(name) for name, module in model.named_modules() if module in places)
    whole = re.compile(rf"\.({names})(\.base_layer|\.modules_to_save|\.original_module)?\.weight$")
    return {key: tensor for key, tensor in weights.items() if whole.search(key)}


def refuse_other_tensors(what: str, config: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Nothing, where no tensor is missing and none is too many; else a BadFilesError that names the first."""
    for how, keys in (("lack", missing), ("also hold", unexpected)):
        if keys:
            raise BadFilesError(
                f"{what}: its weights {how} {len(keys)} tensors, {keys[0]} among them, so they are not "
                f"those of {config}; save the model again with save_pretrained, or mend the config"
            )


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model from a folder or a Hub id, of an adapter that of its model.

    Raises:
        InputError: there is none, or it cannot be reached.
    """
    try:
        config = AutoConfig.from_pretrained(adapter_base(name) or name, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:
        # Of whatever kind: each class looks at its own values.
        kind = BadFilesError if Path(name).is_dir() else InputError
        raise kind(f"model {name!r} cannot be loaded: {not_given(one_line(str(error)))}") from error
    refuse_layers(config, f"model {name!r}")
    return config


def random_config(
    architecture: str, sizes: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """The configuration of a new model; its vocabulary is the tokenizer's unless `sizes` says otherwise.

    Raises:
        InputError: an unknown architecture, or a size that the architecture does not have.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"unknown architecture {architecture!r}; give one of {', '.join(ARCHITECTURES)}")
    model_type = ARCHITECTURES[architecture]
    known = AutoConfig.for_model(model_type).to_dict()
    unknown = [key for key in sizes if key not in known]
    if unknown:
        raise InputError(
            f"model: {architecture} has no size {unknown[0]!r}; it has: {', '.join(sorted(known))}"
        )
    refuse_numbers(sizes, known)
    try:
        config = AutoConfig.for_model(
            model_type, **({"vocab_size": len(tokenizer)} | special_ids(tokenizer) | dict(sizes))
        )
    except Exception as error:
        raise InputError(f"model: no {architecture} of these sizes: {one_line(str(error))}") from error
    parameters_of(config)
    return config


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with random weights, the same for the same seed."""
    refuse_too_large(config)
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def smoke_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture shrunk to two tiny layers, everything else kept."""
    text = config.get_text_config()
    shrunk = type(text)(**(text.to_dict() | _SMOKE_SIZES | _smoke_heads(text)))
    shrunk.architectures = None
    return shrunk


def savable(config: GenerationConfig) -> GenerationConfig:
    """The configuration as transformers saves it: published ones give a temperature and do not say that it is meant."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    return config


def check_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for (new special tokens, say).

    Special tokens for another sense than text are none that rows of text need: Gemma 3's small models are published
    without an embedding for the tokenizer's <image_soft_token>.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if index >= rows and not (
            index in added and added[index].special and token not in named and token not in template
        ):
            raise InputError(
                f"the tokenizer has id {index} ({token!r}) but the model has {rows} embeddings; resize the model's "
                "embeddings before training, or use a chat template that needs no new tokens"
            )


def _smoke_heads(text: PreTrainedConfig) -> dict[str, Any]:
    grouped = getattr(text, "num_key_value_heads", None) != text.num_attention_heads
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2 if grouped else 4}
    if getattr(text, "layer_types", None):
        # Keep one layer of each kind of attention.
        kinds = list(dict.fromkeys(text.layer_types))
        heads["layer_types"] = [kinds[0], kinds[-1]]
    if getattr(text, "sliding_window", None):
        heads["sliding_window"] = min(text.sliding_window, 64)
    return heads


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The tokenizer's special ids, as a configuration has them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def load_checkpoint(folder: Path, base: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of a checkpoint, an adapter folder or a model folder, and its tokenizer.

    Args:
        folder: holds `adapter_config.json` or `config.json`.
        base: the model an adapter belongs to; read from the adapter where it is not given.

    Raises:
        InputError: nothing to load there, the adapter names no base model, or a whole model is given one.
    """
    if not any((folder / f"{kind}config.json").exists() for kind in ("", "adapter_")):
        raise InputError(f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    if base is not None and adapter_base(str(folder)) is None:
        raise InputError(f"{folder} holds a whole model, which belongs to no other: leave --base out")
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    return load_model(str(folder), base), load_tokenizer(str(folder if has_tokenizer or not base else base))
