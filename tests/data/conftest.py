"""Small tokenizers, one character a token, for tests that must run without any downloaded model."""

import re
import string
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slimepo.data.render import encode_responses, render_prompt, render_response

SPECIALS = ("<unk>", "<s>", "</s>", "<end>")

# Writes <s>, then a line per turn; the turn ends in <end> and a line break that is never generated.
SIMPLE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def build_tokenizer(
    chat_template: str | None = SIMPLE_TEMPLATE,
    *,
    adds_bos: bool = False,
    space_first: bool = False,
    merged: tuple[str, ...] = (),
    **names: str,
) -> PreTrainedTokenizerFast:
    """A character tokenizer; `space_first` writes a space before any text, as SentencePiece does.

    `merged` are texts of more than one character that are one token.
    """
    symbols = [*SPECIALS, *string.printable, "▁", *merged]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join([*map(re.escape, merged), r"[\s\S]"])), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    if space_first:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **names}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def encode_response(chat, prompt, response):
    """The ids that are trained on when `response` stands behind `prompt`."""
    return encode_responses(chat, [render_response(chat, prompt, render_prompt(chat, prompt), response)])[0]
