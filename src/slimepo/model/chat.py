"""A model that is ready to answer: loaded with its tokenizer, chat template and end tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError
from slimepo.files import MARKER, read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from slimepo.data.render import ChatFormat
    from slimepo.terminal import Report
    from slimepo.types import Preference


@dataclass(frozen=True)
class ChatModel:
    """A model that is ready to answer: what it says ends in one of `end_ids`."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    end_ids: frozenset[int]


def model_folder(name: str) -> Path:
    """Where the model of a name is: a stage of a run stands for the model in it; a Hub id stays as it is.

    Raises:
        InputError: a folder is there, and no model in it.
    """
    folder = Path(name)
    if (folder / "model" / "config.json").exists():
        return folder / "model"
    if folder.is_dir() and not any((folder / f"{kind}config.json").exists() for kind in ("", "adapter_")):
        raise InputError(
            f"{name} holds neither a model (config.json) nor an adapter (adapter_config.json){instead_of(folder)}"
        )
    return folder


def instead_of(folder: Path) -> str:
    """What to add to an error where a folder holds no model: what else it is, and what to do about it."""
    if stages := sorted(path.parent for path in folder.glob("*/stage.json")):
        return f"; it is a run: give one of its stages, such as {stages[-1]}"
    if (folder / MARKER).exists():
        return "; it is a run, and none of its stages is finished: the command that began it goes on with it"
    begun = any((folder / file).exists() for file in ("data.json", "checkpoints"))
    if begun and (folder.parent / MARKER).exists() and not (folder / "stage.json").exists():
        return f"; stage {folder.name} is not finished: the command that began it goes on with it"
    return ""


def load_chat_model(name: str, dtype: str = "auto") -> ChatModel:
    """Load a folder (a model, an adapter, a stage of a run) or Hub id, on the accelerator where there is one.

    `dtype`: auto (see `answer_dtype`), float32 or bfloat16.

    Raises:
        InputError: there is no such model, or its chat template cannot be used.
    """
    import torch

    from slimepo.data.chat import load_tokenizer
    from slimepo.model.adapters import merge
    from slimepo.model.load import adapter_base, load_model
    from slimepo.model.modes import answer_dtype

    folder = model_folder(name)
    # An adapter is merged in float32: a small update would be rounded away.
    adapter = adapter_base(str(folder)) is not None
    wanted = answer_dtype(dtype)
    model: Any = load_model(str(folder), dtype=torch.float32 if adapter else wanted)
    model = merge(model).to(wanted) if adapter else model
    tokenizer = load_tokenizer(str(folder))
    chat = _chat(folder, tokenizer)
    device = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    )
    return ChatModel(model.to(device), tokenizer, chat, end_tokens(model, chat))


def end_tokens(model: Any, chat: ChatFormat) -> frozenset[int]:
    """The tokens that end an answer: that of the chat template, and those that the model generates to."""
    ends = model.generation_config.eos_token_id
    return frozenset({chat.end_id, *([ends] if isinstance(ends, int) else ends or [])})


def model_chat(name: str) -> ChatFormat:
    """The chat format of a model that can be had, as far as can be seen without loading its weights.

    Raises:
        InputError: there is no such model, a folder has no weights, or its chat template cannot be used.
    """
    from slimepo.data.chat import load_tokenizer
    from slimepo.model.load import load_config

    folder = model_folder(name)
    load_config(str(folder))
    weights = [path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    if folder.is_dir() and not weights:
        raise InputError(f"{name}: no weights in {folder} (*.safetensors, *.bin)")
    return _chat(folder, load_tokenizer(str(folder)))


def _chat(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    from slimepo.data.chat import chat_format

    settings = read_json(folder / "slimepo.json") or {}
    return chat_format(tokenizer, settings.get("template_options"))


def answer_logps(
    name: str, records: Sequence[Preference], max_length: int = sys.maxsize, report: Report | None = None
) -> tuple[NDArray[np.float64], list[str]]:
    """What a model by its name finds of each record's two answers, in its own template: summed log-probs in nats.

    Args:
        records: each with a `source` of its own.
        max_length: tokens of prompt and answer together, of those that are scored.

    Returns:
        `[records, 2]`, NaN where there is no such answer or it could not be scored, and why those could not, in words.
    """
    import numpy as np

    from slimepo.data.batch import StepCollator
    from slimepo.data.tokenize import in_words, tokenize
    from slimepo.model.logps import install_logps
    from slimepo.model.modes import scoring
    from slimepo.model.score import score_rows

    loaded = load_chat_model(name)
    pairs = any(record.rejected for record in records)
    tokens = tokenize(records, loaded.chat, max_length=max_length, pairs=pairs)
    install_logps(loaded.model)
    with scoring(loaded.model) as forward:
        found = score_rows(forward, tokens.rows, StepCollator(8), loaded.model.device, report=report)
    sums = {
        row.id: [each[0].sum(dtype=np.float64) if each.size else np.nan for each in of_row]
        for row, of_row in zip(tokens.rows, found, strict=True)
    }
    return np.array([sums.get(record.source, [np.nan] * 2) for record in records]), in_words(tokens)
