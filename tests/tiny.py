"""Tiny models, their tokenizer, and rows."""

import string

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from slimepo.data.rows import Row

VOCABULARY = 61
_SPECIAL = ("<bos>", "<end>", "<unk>")


def tiny_model(
    architecture: str = "llama", *, tied: bool = False, seed: int = 0, **sizes: object
) -> PreTrainedModel:
    """A two-layer model of an architecture with random weights."""
    torch.manual_seed(seed)
    values: dict[str, object] = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    config = AutoConfig.for_model(architecture, **(values | sizes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Pairs of unequal lengths."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return random.integers(2, VOCABULARY, random.integers(low, high)).astype(np.int32)

    return [Row(ids(2, 9), (ids(1, 12), ids(1, 12)), id=f"row {i}") for i in range(count)]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A letter a token for `tiny_model`, with a chat template: text says exactly which ids it becomes, and back."""
    symbols = [*_SPECIAL, *string.ascii_letters, *":12345"]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>", pad_token="<end>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
            "{{ ':' + m['content'] + eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}:{% endif %}"
        ),
    )  # fmt: skip
