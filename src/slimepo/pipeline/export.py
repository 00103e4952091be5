"""Turn a trained model or a checkpoint into a folder that any transformers user can load."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from slimepo.errors import InputError, NonFiniteLossError
from slimepo.files import replace_folder
from slimepo.model.adapters import merge
from slimepo.model.logps import causal_lm
from slimepo.model.modes import scoring
from slimepo.pipeline.console import FIGURES
from slimepo.pipeline.folder import last_checkpoint
from slimepo.pipeline.recipe import Recipe, Stage
from slimepo.settings import dump

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
        NonFiniteLossError: the model's own logits are not finite.
        RuntimeError: the model came back different; the folder is not put in place.
    """
    folder = Path(folder)
    trained = probe_logits(model)
    if not torch.isfinite(trained).all():
        raise NonFiniteLossError("the trained model's logits are not finite. Lower the learning rate")
    half = (
        any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()) or dtype != torch.float32
    )
    merged = merge(model.float()).to(dtype)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = sorted({*end_token_ids, *(() if eos is None else (eos,))})
    merged.generation_config = GenerationConfig(
        eos_token_id=ends or None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=pad if pad is not None else next(iter(ends), None),
    )
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
    """Logits on a fixed short input, float32, in the precision of `scoring`."""
    inner = causal_lm(model)
    vocabulary = inner.config.get_text_config().vocab_size
    ids = (torch.arange(1, 17, device=inner.get_input_embeddings().weight.device) * 7919 % vocabulary)[None]
    with scoring(model) as forward:
        logits: Tensor = forward(input_ids=ids).logits.float()
    return logits


def model_card(recipe: Recipe, stage: Stage, result: dict[str, Any]) -> str:
    """What was trained, on what, with which settings and which figures, as Markdown with metadata."""
    base, heldout = result["base"], result.get("heldout")
    of_data = recipe.data.path is not None and stage.part not in recipe.pairs
    lines = [
        "---",
        "library_name: transformers",
        "tags: [slimepo, preference-optimization, " + stage.loss + "]",
        # The Hub wants the id of a published model there, not a local folder or a made-up one.
        *([f"base_model: {recipe.model}"] if isinstance(recipe.model, str) else []),
        "---",
        "",
        f"# {stage.name}",
        "",
        f"Trained with slimepo: objective `{stage.loss}`, {result['steps']} steps of {stage.batch_size} pairs at "
        f"learning rate {stage.learning_rate:g}, {result['rows']:,} rows of part `{stage.part}`"
        f"{f' of `{recipe.path(recipe.data.path or str())}`' if of_data else ', made from samples'}.",
        "",
        f"Started from {f'`{base}`' if isinstance(base, str) else 'random weights'}; "
        f"{result['trained_parameters']:,} of {result['parameters']:,} parameters trained.",
        "",
    ]
    if heldout is not None:
        before, after = heldout["before"], heldout["after"]
        counts = [f"{heldout[what]:,} held-out {what}" for what in ("pairs", "prompts") if what in heldout]
        lines += [f"## {' and '.join(counts)}", "", "| | before | after |", "|---|---|---|"]
        lines += [
            f"| {label} | {form.format(before[key])} | {form.format(after[key])} |"
            for label, key, form in FIGURES
            if key in after
        ]
        lines.append("")
        if "chosen_fell" in heldout:
            fell = 100 * heldout["chosen_fell"]
            lines += [f"The chosen answer became less likely in {fell:.0f} % of the pairs.", ""]
    return "\n".join([*lines, "## Recipe", "", "```yaml", dump(recipe).rstrip(), "```", ""])
