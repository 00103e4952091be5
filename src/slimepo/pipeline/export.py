"""Turn a trained model or a checkpoint into a folder that any transformers user can load."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimepo.data.chat import load_tokenizer
from slimepo.errors import InputError
from slimepo.model.adapters import trains_head, untie_head
from slimepo.model.load import load_model
from slimepo.model.logps import causal_lm
from slimepo.model.modes import measuring
from slimepo.pipeline.folder import last_checkpoint, read_json, replace_folder

# Logits before merging and after reloading may differ by rounding, no more; relative to the largest logit above 1.
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    end_token_ids: Collection[int] = (),
    dtype: torch.dtype = torch.float32,
) -> float:
    """Merge adapters, save model and tokenizer to `folder`, and prove it by loading them again.

    Merging happens in float32 and in place: `model` is not to be trained further. A head that was trained on a tied
    model stays untied. `dtype` is that of the saved weights; bfloat16 rounds away most of what a learning rate such as
    5e-7 has changed.

    Returns:
        The largest difference of a logit between the trained model and the one loaded from the folder.

    Raises:
        RuntimeError: the model came back different; the folder is not put in place.
    """
    folder = Path(folder)
    trained = probe_logits(model)
    half = (
        any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()) or dtype != torch.float32
    )
    merged = merge(model.float()).to(dtype)
    merged.generation_config = _generation_config(tokenizer, end_token_ids)
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    reloaded = AutoModelForCausalLM.from_pretrained(temporary, dtype=dtype).to(trained.device)
    difference = (probe_logits(reloaded) - trained).abs().max().item()
    allowed = (HALF_TOLERANCE if half else FLOAT32_TOLERANCE) * max(1.0, trained.abs().max().item())
    if not difference <= allowed:
        raise RuntimeError(
            f"the model saved to {temporary} gives other logits than the trained one (up to {difference:.3g} off)"
        )
    replace_folder(temporary, folder)
    return difference


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


def load_checkpoint(folder: Path, base: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of a checkpoint, an adapter folder or a model folder, and its tokenizer.

    Args:
        folder: holds `adapter_config.json` or `config.json`.
        base: the model an adapter belongs to; read from the adapter where it is not given.

    Raises:
        InputError: nothing to load there, or the adapter names no base model.
    """
    adapter = read_json(folder / "adapter_config.json")
    if adapter is None:
        if not (folder / "config.json").exists():
            raise InputError(
                f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)"
            )
        return load_model(str(folder)), load_tokenizer(str(folder))
    base = base or adapter.get("base_model_name_or_path")
    if not base:
        raise InputError(f"{folder / 'adapter_config.json'} names no base model: give it with --base")
    from peft import PeftConfig, PeftModel

    model = load_model(base)
    config = PeftConfig.from_pretrained(str(folder))
    if trains_head(model, config):
        untie_head(model)
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    return PeftModel.from_pretrained(model, str(folder)), load_tokenizer(
        str(folder) if has_tokenizer else base
    )


def newest(source: Path) -> Path:
    """What to export from `source`: itself, or where it is a stage of a run its newest complete checkpoint.

    Raises:
        InputError: nothing there to export.
    """
    if (source / "adapter_config.json").exists() or (source / "config.json").exists():
        return source
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = last_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise InputError(f"{source}: no checkpoint, adapter or model there")
    return found


def probe_logits(model: nn.Module) -> Tensor:
    """Logits on a fixed short input, float32, in the precision of `measuring`."""
    inner = causal_lm(model)
    vocabulary = inner.config.get_text_config().vocab_size
    ids = (torch.arange(1, 17, device=inner.get_input_embeddings().weight.device) * 7919 % vocabulary)[None]
    with measuring(model) as forward:
        logits: Tensor = forward(input_ids=ids).logits.float()
    return logits


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]
) -> GenerationConfig:
    ends = sorted(
        {*end_token_ids} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
    )
    values: dict[str, Any] = {"eos_token_id": ends or None, "bos_token_id": tokenizer.bos_token_id}
    values["pad_token_id"] = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [None])[0]
    )
    return GenerationConfig(**values)
