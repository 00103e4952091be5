"""Turn a trained model or a checkpoint into a folder that any transformers user can load."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimepo.checkpoints.store import MANIFEST, fault_of, newest_sound
from slimepo.data.batch import StepCollator
from slimepo.data.chat import chat_format
from slimepo.data.rows import Row
from slimepo.errors import BadFilesError, InputError, NonFiniteLossError, one_line
from slimepo.files import replace_folder, write_json
from slimepo.hub import is_hub_id
from slimepo.model.adapters import merge
from slimepo.model.attention.path import HALF
from slimepo.model.chat import instead_of
from slimepo.model.compress import Compression, compress
from slimepo.model.load import load_model, savable
from slimepo.model.logps import causal_lm, install_logps
from slimepo.model.modes import scoring
from slimepo.model.quantize import four_bit_layers
from slimepo.model.score import score_rows
from slimepo.pipeline.console import FIGURES
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import Stage
from slimepo.settings import dump
from slimepo.words import nearest_entry, plural

# Logits before and after merging, and after reloading, may differ by rounding, no more; relative to the largest logit
# above 1. HALF: where one side has to compute in half precision.
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1


class Exported(NamedTuple):
    """How far an exported model is from the trained one: of logits on a fixed input the largest difference; of the
    log-probs of `tokens` response tokens the largest and the mean one, in nats. `compressed` weights have
    fewer bits, or are 0."""

    logits: float
    tokens: int
    largest: float
    mean: float
    compressed: int = 0


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    end_token_ids: Collection[int] | None = None,
    dtype: torch.dtype = torch.float32,
    template_options: Mapping[str, Any] | None = None,
    release: bool = False,
    rows: Sequence[Row] = (),
    compression: Compression | None = None,
) -> Exported:
    """Merge adapters, save model and tokenizer to `folder`, and prove it by loading them again.

    The model moves to the CPU and is merged there, in float32 and in place: it is not to be trained further. A head
    that was trained on a tied model stays untied. What the model says of generation is kept, with further end tokens.

    Args:
        end_token_ids: where generation ends too; that of the tokenizer's chat template unless given.
        dtype: of the saved weights; bfloat16 rounds away most of what a learning rate such as 5e-7 has changed.
        template_options: what the chat template was given in training; `slimepo generate` and `eval` read them there.
        release: the model's weights are given up before the saved ones are loaded, so that one set is in memory.
        rows: whose log-probs by the trained model and by the one loaded from the folder are compared.
        compression: what the merged weights are put through (`slimepo.model.compress`); the folder says so in
            `slimepo.json`.

    Returns:
        How far the model loaded from the folder is from the trained one.

    Raises:
        NonFiniteLossError: the model's own logits are not finite.
        RuntimeError: the merged model, or the one that came back, is another; the folder is not put in place.
    """
    folder = Path(folder)
    trained = probe_logits(model).cpu()
    if not torch.isfinite(trained).all():
        raise NonFiniteLossError("the trained model's logits are not finite. Lower the learning rate")
    four_bit = bool(four_bit_layers(model))
    # A model that was cast whole computes with rounded positions too, which no folder keeps.
    close = HALF_TOLERANCE if four_bit or any(b.dtype in HALF for b in model.buffers()) else FLOAT32_TOLERANCE
    said = _logps(model, rows)
    # What half precision makes of the logits of a model that is far gone, a nat or more, is no fault of merging or
    # saving: from here on the same weights are compared in float32.
    if not four_bit:
        model = model.cpu().float()
    exact = trained if four_bit else probe_logits(model)
    merged, compressed = merge(model), 0
    _hold("the merged model", probe_logits(merged), exact, close)
    facts: dict[str, Any] = {"template_options": dict(template_options or {})}
    if compression is not None:
        compressed = compress(merged, compression)
        facts["compression"] = {**compression._asdict(), "weights": compressed}
    if dtype != torch.float32:
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(dtype).float()
    expected = probe_logits(merged)
    merged = merged.to(dtype)
    if end_token_ids is None:
        with suppress(InputError):  # a tokenizer without an end token has none to add
            end_token_ids = {chat_format(tokenizer, template_options).end_id}
    merged.generation_config = _generation_config(merged, tokenizer, end_token_ids or ())
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    write_json(temporary / "slimepo.json", facts)
    if release:
        model.to("meta")
        merged.to("meta")
    reloaded = load_model(str(temporary), dtype=torch.float32)
    found = probe_logits(reloaded)
    _hold(f"the model saved to {temporary}", found, expected, close)
    off = np.abs(_logps(reloaded, rows) - said)
    replace_folder(temporary, folder)
    largest, mean = (float(off.max()), float(off.mean())) if len(off) else (0.0, 0.0)
    return Exported((found - trained).abs().max().item(), len(off), largest, mean, compressed)


def _hold(what: str, found: Tensor, expected: Tensor, close: float) -> None:
    """Raise RuntimeError where logits differ by more than `close` of the largest of them (of 1, if that is less)."""
    difference = (found.cpu() - expected.cpu()).abs().max().item()
    if not difference <= close * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"{what} gives other logits than the trained one (up to {difference:.3g} off)")


def _logps(model: nn.Module, rows: Sequence[Row]) -> NDArray[np.float32]:
    """Log-probs of all response tokens of rows, in the precision of `scoring`."""
    if not rows:
        return np.zeros(0, dtype=np.float32)
    install_logps(model)
    sides = StepCollator(4, tuple(range(max(len(row.responses) for row in rows))))
    with scoring(model) as forward:
        found = score_rows(forward, rows, sides, causal_lm(model).get_input_embeddings().weight.device)
    return np.concatenate([numbers[0] for of_row in found for numbers in of_row])


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]
) -> GenerationConfig:
    """The model's own, which ends where it ended before and at the tokenizer's and the given end tokens as well."""
    config = copy.deepcopy(model.generation_config or GenerationConfig())
    own, eos, pad = config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = {*end_token_ids, *([own] if isinstance(own, int) else own or ()), *([] if eos is None else [eos])}
    config.eos_token_id = sorted(ends) or None
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    config.pad_token_id = pad if pad is not None else next(iter(config.eos_token_id or ()), None)
    return savable(config)


def newest(source: Path) -> Path:
    """What to export from `source`: itself, or where it is a stage of a run its newest sound checkpoint.

    Raises:
        InputError: nothing there to export.
        BadFilesError: a checkpoint that is damaged, or several that all are.
    """
    if (source / "adapter_config.json").exists() or (source / "config.json").exists():
        fault = fault_of(source) if (source / MANIFEST).exists() else None
        if fault is not None:
            raise BadFilesError(f"{source} is no sound checkpoint: {fault}; export another one")
        return source
    if not source.exists():
        raise InputError(f"{source}: no such folder{nearest_entry(source)}")
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = newest_sound(folder).path
    if found is None:
        raise InputError(f"{source}: no checkpoint, adapter or model there{instead_of(source)}")
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
        f"tags: [slimepo, preference-optimization, {json.dumps(stage.loss)}]",
        # The Hub refuses a card that names a local folder there.
        *(
            [f"base_model: {json.dumps(recipe.model)}"]
            if isinstance(recipe.model, str) and is_hub_id(recipe.model)
            else []
        ),
        "---",
        "",
        f"# {stage.name if re.fullmatch(r'[a-z0-9.=+-]+', stage.name) else quoted(stage.name)}",
        "",
        f"Trained with slimepo: objective {quoted(stage.loss)}, {result['steps']} steps of {stage.batch_size} pairs at "
        f"learning rate {stage.learning_rate:g}, {result['rows']:,} rows of part {quoted(stage.part)}"
        f"{f' of {quoted(recipe.path(recipe.data.path or str()))}' if of_data else ', made from samples'}.",
        "",
        f"Started from {quoted(base) if isinstance(base, str) else 'random weights'}; "
        f"{result['trained_parameters']:,} of {result['parameters']:,} parameters trained.",
        "",
    ]
    if (base_in := result.get("quantized")) is not None:
        merged = result["merged"]
        lines += [
            f"While it trained, {base_in['weights']:,} weights of its base were in four bits ({base_in['kind']}, "
            "bitsandbytes). The adapter is merged onto the plain weights that these stand for; log-probs of "
            f"{merged['tokens']:,} tokens are those of the trained model to {merged['largest']:.2g} nats "
            f"({merged['mean']:.2g} on the mean).",
            "",
        ]
    if heldout is not None:
        before, after = heldout["before"], heldout["after"]
        counts = [
            plural(heldout[f"{what}s"], f"held-out {what}")
            for what in ("pair", "prompt")
            if f"{what}s" in heldout
        ]
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
    text = dump(recipe).rstrip()
    fence = "`" * max(3, 1 + longest_ticks(text))
    return "\n".join([*lines, "## Recipe", "", f"{fence}yaml", text, fence, ""])


def quoted(text: str) -> str:
    """A text as code in a line of Markdown, in which nothing of it is Markdown or HTML."""
    line, ticks = one_line(text), "`" * (1 + longest_ticks(text))
    return f"{ticks}{line}{ticks}" if ticks == "`" else f"{ticks} {line} {ticks}"


def longest_ticks(text: str) -> int:
    """The most backticks that stand in a row."""
    return max(map(len, re.findall("`+", text)), default=0)
