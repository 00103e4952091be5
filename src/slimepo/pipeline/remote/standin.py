"""A smoke run where the Hub cannot be reached: small things made here in the place of what the Hub alone has."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimepo.data.read import read_rows
from slimepo.errors import InputError
from slimepo.files import cache_folder, write_json_lines
from slimepo.hub import offline
from slimepo.model.load import special_ids
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import Data

if TYPE_CHECKING:
    from rich.console import Console

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_END, _PAD, _START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOPICS = ("rivers", "bread", "the moon", "chess", "old trains", "bees", "glass", "winter", "maps", "salt")
PAIRS, HELD_OUT = 200, 20


def with_stand_ins(recipe: Recipe, console: Console) -> Recipe:
    """The recipe of a smoke run with stand-ins for what it names on the Hub, where that cannot be reached.

    Any other recipe as it is, and whatever lies on this machine already. Each stand-in is told in a line. A model whose
    name does not say its architecture has none: loading it fails as ever.
    """
    if not recipe.smoke:
        return recipe
    named = [recipe.model, recipe.tokenizer, recipe.chat_template]
    missing = [name for name in named if isinstance(name, str) and _out_of_reach(name)]
    family = family_of(recipe.model) if isinstance(recipe.model, str) else "llama"
    if missing and family is not None:
        tokenizer = byte_tokenizer()
        folder = str(_kept(tokenizer, _config(family, tokenizer)))
        console.print(
            f"smoke: {', '.join(missing)} cannot be reached: "
            f"{f'a tiny {family} and ' if recipe.model in missing else ''}a tokenizer of bytes stand in"
        )
        model = folder if isinstance(recipe.model, str) else recipe.model
        own: dict[str, Any] = {
            "model": model,
            "tokenizer": folder,
            "chat_template": None,
            "template_options": {},
        }
        recipe = recipe.model_copy(update=own)
    return recipe.model_copy(update={"data": _data(recipe, console)})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so that there are some for any text, and a chat template in the manner of ChatML."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (_PAD, _START, _END)]
    tokenizer.add_special_tokens(special)
    wrap: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_PAD, chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return made


def made_up_pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    """Pairs of short texts of unequal lengths, all of them different."""
    rows = []
    for number in range(first, first + count):
        topic = _TOPICS[number % len(_TOPICS)]
        good = " ".join(f"Fact {fact} about {topic} is worth {number}." for fact in range(1, 2 + number % 4))
        rows.append(
            {
                "prompt": f"Tell me {1 + number % 4} facts about {topic}, please. This is request {number}.",
                "chosen": good,
                "rejected": f"I would rather not say what {topic} are worth{'!' * (number % 7)}",
            }
        )
    return rows


def _out_of_reach(name: str) -> bool:
    """Whether a name is one of the Hub's that is not on this machine, when the Hub cannot be asked."""
    if not _HUB_ID.fullmatch(name) or Path(name).exists() or Path(name).parent.exists() or not offline():
        return False
    files = ("config.json", "tokenizer_config.json")
    return not any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def family_of(name: str) -> str | None:
    """transformers' model type that a model's name begins with, or a word in it: qwen3 for Qwen/Qwen3-4B-Base."""
    words = re.split(r"[-_.]", name.rpartition("/")[2].lower())
    starts = ["".join(words[place:]) for place in range(len(words))]
    known = [
        kind
        for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if any(start.startswith(kind.replace("_", "").replace("-", "")) for start in starts)
    ]
    return max(known, key=len, default=None)


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """An ordinary configuration of the family, for text and for this tokenizer; `smoke_config` makes it small."""
    text = AutoConfig.for_model(family).get_text_config()
    return type(text)(**(text.to_dict() | special_ids(tokenizer) | {"vocab_size": len(tokenizer)}))


def _kept(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> Path:
    """A folder with both, by what is in it, so that every rank and a resumed run find the same."""
    text = config.to_json_string() + tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    folder = cache_folder("stand-ins") / f"{config.model_type}-{_digest(text)}"

    def write(new: Path) -> None:
        config.save_pretrained(new)
        tokenizer.save_pretrained(new)

    return _written_once(folder, write)


def _data(recipe: Recipe, console: Console) -> Data:
    """The recipe's data, made-up pairs in the place of what cannot be reached."""
    data = recipe.data
    stood_in: dict[str, Any] = {}
    for key, rows in (("path", made_up_pairs(PAIRS)), ("heldout", made_up_pairs(HELD_OUT, PAIRS))):
        name = getattr(data, key)
        if name is None or not _HUB_ID.fullmatch(name) or Path(name).exists() or not offline():
            continue
        split = data.split if key == "path" else data.heldout_split
        try:
            read_rows(name, format=data.format, split=split, limit=1)
        except InputError:
            folder = cache_folder("stand-ins") / f"{key}-{_digest(repr(rows))}"
            _written_once(folder, lambda new, rows=rows: write_json_lines(new / "pairs.jsonl", rows))
            of_file = {"path": ("split", "columns"), "heldout": ("heldout_split", "heldout_columns")}[key]
            plain: dict[str, Any] = {"format": "auto", of_file[0]: None, of_file[1]: {}}
            stood_in |= {key: str(folder / "pairs.jsonl"), **plain}
            console.print(f"smoke: {name} cannot be reached: {len(rows)} made-up pairs stand in")
    return data.model_copy(update=stood_in)


def _written_once(folder: Path, write: Any) -> Path:
    """The folder, written whole where it is not there yet; another process may be as fast."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent))
        write(new)
        try:
            os.rename(new, folder)
        except OSError:
            shutil.rmtree(new)
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
