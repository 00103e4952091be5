"""Small things that stand in for real ones: tokenizers trained here, a Llama, preference rows of many shapes.

The tokenizers are byte-level BPE with the split rule, the special tokens and the chat template of the family they are
named after, so that what a family does at the borders of a text happens here too.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she "
    "went to the park with her mother and saw a big box on the ground. Who is Lily? Tell me a story, please: what "
    "was in the box, and why did she want to open it? There were 12 red apples, 7 green pears and 1,024 nuts.\n"
    "Write a short answer. The answer is yes, because the first of the two is better than the second one."
)

# Without a line break or a suffix: the end of a turn is the end-of-text token, which is the padding too.
STORY_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def _trained(digits: str, normalize: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalize:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS + digits + _REST), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def bpe_tokenizer(
    specials: tuple[str, ...],
    chat_template: str,
    *,
    digits: str = r"\p{N}{1,3}",
    normalize: bool = False,
    adds_bos: bool = False,
    **names: str | None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `specials` behind its 400 pieces; `names` are bos_token and so on."""
    tokenizer = Tokenizer.from_str(_trained(digits, normalize).to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if adds_bos:
        bos = str(names["bos_token"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, clean_up_tokenization_spaces=False, **names
    )


def trl_template(name: str) -> str:
    """The chat template of a model family, as the trl package ships it."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3.2's: it adds the begin token to plain text by itself, and so does its template."""
    header = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    names = {"bos_token": header[0], "eos_token": "<|eot_id|>"}
    return bpe_tokenizer(header, trl_template("llama3_2"), adds_bos=True, **names)


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen3's: no begin token, text in NFC, a line break behind every turn, empty thoughts."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return bpe_tokenizer(specials, trl_template("qwen3"), digits=r"\p{N}", normalize=True, **names)


def gemma3_tokenizer() -> PreTrainedTokenizerFast:
    """With Gemma 3's template: a turn ends in a token of its own, which is not the end-of-text token."""
    specials = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return bpe_tokenizer(specials, trl_template("gemma3"), adds_bos=True, **names)


def story_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `save_llama`: padding and end token are the same."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return bpe_tokenizer(
        ("<unk>", "<s>", "</s>"), STORY_TEMPLATE, adds_bos=True, model_max_length=CONTEXT, **names
    )


def save_llama(folder: Path) -> Path:
    """Writes a Llama of 60,000 random parameters, context 256, tied head, with `story_tokenizer`."""
    tokenizer = story_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def preference_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of explicit strings with what real ones have: line breaks, other scripts, code, spaces at the ends.

    The last row's answers are identical.
    """
    random = np.random.default_rng(seed)
    pieces = [
        *TEXT.split(), "\n\n", "\n- ", "```python\nx = {'a': [1]}\n```", "naïve", "cafe\u0301", "日本語", "Здравствуй",
        "🙂",
        "  ", "\t", "<b>bold</b>", "1. ", "don't", "https://example.org/?q=a&b=%20", "\u200b", "\r\n", "∑ x² ≤ 3",
    ]  # fmt: skip

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(pieces, size=random.integers(low, high)))

    rows = [
        {"prompt": f"{i}: {text(1, 30)}", "chosen": f"{text(1, 40)} +", "rejected": f"{text(1, 40)} -"}
        for i in range(count)
    ]
    rows[-1]["rejected"] = rows[-1]["chosen"]
    return rows
