"""The tokenizer of the built-in world, built in code: template words, single characters, and turn markers."""

from __future__ import annotations

import string
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slimepo.playground.tasks import TEMPLATE_WORDS

PAD, UNKNOWN, BOS, END, USER, ASSISTANT = "<pad>", "<unk>", "<bos>", "<end>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BOS, END, USER, ASSISTANT)
CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase + ' .,:?-/+*{}"'

# One BOS; a user turn has no end of its own (the next marker ends it); nothing follows an assistant's <end>,
# so that the text of a prompt is a prefix of the text of prompt and answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the playground knows the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every symbol and its id: special tokens, template words, characters."""
    return {symbol: index for index, symbol in enumerate([*SPECIAL_TOKENS, *TEMPLATE_WORDS, *CHARACTERS])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer, with its chat template.

    A template word is one token together with the space in front of it; all else is spelt in characters, so
    that decoding what was encoded gives the same text. Characters from outside the world become `<unk>`.
    Encoding never adds a BOS: it comes from the chat template only.
    """
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    # A word counts only as a whole: "Additive" is spelt, though it begins as "Add" does.
    spaced = "|".join(word for word in TEMPLATE_WORDS if word.startswith(" "))
    bare = "|".join(word for word in TEMPLATE_WORDS if not word.startswith(" "))
    alphanumeric = "[A-Za-z0-9]"
    words = rf"(?:{spaced}|(?<!{alphanumeric})(?:{bare}))(?!{alphanumeric})"
    pieces = Regex(rf"{words}|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its constructor has no types
    return wrap(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
