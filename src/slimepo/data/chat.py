"""From messages to text to token ids, with exact boundaries between prompt and response.

The prompt is rendered by the chat template with the generation prompt, the whole conversation by the same
template; the response is what the whole adds. Both texts are tokenised apart, so that training starts from
exactly the ids that generation is given. The response ends in the template's end-of-turn token; what the
template writes behind that token is never generated and so never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from slimepo.errors import InputError
from slimepo.files import read_json
from slimepo.types import Message
from slimepo.words import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_PREFIX_SAFE = "template not prefix-safe"
MALFORMED_ROW = "malformed row"

# What the Llama 3 templates themselves fall back to where they have no clock.
PINNED_DATE = "26 Jul 2024"

_SENTINEL = "Sentinel7answer"
_PROBE_PROMPT: list[Message] = [{"role": "user", "content": "Probe?"}]
_EXCERPT = 120


class RowRefused(Exception):
    """One row cannot be rendered: `reason` is a drop reason, `detail` says more in plain words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with its chat template and what was found out about the two; see `chat_format`.

    `end_id` is the end-of-turn token, the last trained token of every response. `suffix` is what the
    template writes after an answer; `ending` its part before the end token. `prompt_start` are the ids that
    the tokenizer itself puts before plain text (only without a template). `anchor` is text that is put
    before a response while it is tokenised, for tokenizers that treat the start of a text differently.
    `notes` are sentences for the user.
    """

    tokenizer: PreTrainedTokenizerBase
    template_options: Mapping[str, Any]
    plain: bool
    end_id: int
    suffix: str = ""
    ending: str = ""
    prompt_start: tuple[int, ...] = ()
    anchor: str = ""
    notes: tuple[str, ...] = field(default=())


def load_tokenizer(
    name_or_path: str | Path, chat_template: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with another model's chat template where `chat_template` names one.

    `chat_template` is a .jinja file, a folder or a Hub id. Special tokens that another model's template
    writes and this tokenizer lacks are added to it, so compare `len(tokenizer)` with the embedding's rows.
    Raises InputError.
    """
    tokenizer = _load(str(name_or_path), "tokenizer")
    if chat_template is None:
        return tokenizer
    path = Path(chat_template).expanduser()
    if path.suffix in (".jinja", ".jinja2") or path.is_file():
        tokenizer.chat_template = _template_file(path)
        return tokenizer
    if (path / "chat_template.jinja").is_file() and not (path / "tokenizer_config.json").is_file():
        tokenizer.chat_template = _template_file(path / "chat_template.jinja")
        return tokenizer
    other = _load(str(chat_template), "chat template")
    if other.chat_template is None:
        raise InputError(f"{chat_template} has no chat template; name a model that has one or a .jinja file")
    tokenizer.chat_template = other.chat_template
    _add_missing_specials(tokenizer, other)
    return tokenizer


def _load(name: str, what: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    # An adapter saved by itself reads the tokens of its model.
    adapter = read_json(Path(name) / "adapter_config.json")
    if adapter and not any(Path(name).glob("tokenizer*")):
        name = str(adapter.get("base_model_name_or_path") or name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise InputError(f"no {what} can be loaded from '{name}': {first_line(error)}") from error
    return tokenizer


def _template_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template {path} cannot be read: {error}") from error


def _add_missing_specials(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    from tokenizers import AddedToken

    written = _template_text(other) or ""
    known = tokenizer.get_vocab()
    for token in _special_tokens(other).values():
        if token in written and token not in known:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)


def chat_format(
    tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any] | None = None
) -> ChatFormat:
    """Find out how `tokenizer` and its template write a conversation; InputError where they cannot.

    `template_options` are variables for the template, such as {"enable_thinking": False} for Qwen3. Without
    a template, contents are joined as plain text and the end-of-sequence token ends a response.
    """
    template = _template_text(tokenizer)
    if template is None:
        return _plain_format(tokenizer, dict(template_options or {}))
    for name in template_options or {}:
        if name not in template:
            raise InputError(f"the chat template knows no option {name!r}: it is nowhere in its text")
    options, notes = _pinned_options(template, dict(template_options or {}))
    chat = ChatFormat(tokenizer, options, plain=False, end_id=-1)
    try:
        prompt = render_prompt(chat, _PROBE_PROMPT)
        whole = _render(chat, [*_PROBE_PROMPT, {"role": "assistant", "content": _SENTINEL}], False)
    except RowRefused as refused:
        raise InputError(f"the chat template fails on a one-turn conversation: {refused.detail}") from refused
    if _SENTINEL not in whole or not whole.startswith(prompt):
        raise InputError(
            "the chat template cannot be used for training: the rendered prompt is not the beginning of the "
            f"rendered conversation ({_divergence(prompt, whole)})"
        )
    start, _, suffix = whole[len(prompt) :].rpartition(_SENTINEL)
    end_id, ending, more = _end_of_turn(tokenizer, suffix)
    anchor, anchor_notes = _find_anchor(tokenizer, prompt, start + _SENTINEL + ending)
    notes += [*more, *anchor_notes, *_start_notes(tokenizer, prompt, start)]
    return ChatFormat(tokenizer, options, False, end_id, suffix, ending, (), anchor, tuple(notes))


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # Several named templates and none called default.
        raise InputError(f"the tokenizer's chat template cannot be chosen: {first_line(error)}") from error


def _plain_format(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> ChatFormat:
    note = "there is no chat template: prompts and responses are plain text, and {} ends a response"
    end_id, end = _eos(tokenizer)
    bare = _encode(tokenizer, ["a"])[0]
    alone: list[int] = list(tokenizer("a", add_special_tokens=True, return_attention_mask=False)["input_ids"])
    at = next((i for i in range(len(alone)) if alone[i : i + len(bare)] == bare), 0)
    anchor, notes = _find_anchor(tokenizer, "Probe\n", _SENTINEL)
    return ChatFormat(
        tokenizer, options, True, end_id, "", "", tuple(alone[:at]), anchor, (note.format(end), *notes)
    )


def _pinned_options(template: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keep a template that reads the clock from writing another prompt every day."""
    if "strftime_now" not in template or "date_string" in options:
        return options, []
    if "date_string" in template:
        note = (
            f'the template writes today\'s date; date_string is fixed at "{PINNED_DATE}" so that runs repeat'
        )
        return {**options, "date_string": PINNED_DATE}, [note]
    return options, ["the template reads the clock, so prompts may change from day to day"]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**special, **dict(named)}


def _eos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "nothing can end a response: the chat template writes no end token and there is no eos_token"
        )
    return int(tokenizer.eos_token_id), str(tokenizer.eos_token)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, suffix: str) -> tuple[int, str, list[str]]:
    """The end-of-turn token in what the template writes after an answer, the text before it, and notes."""
    special = _special_tokens(tokenizer)
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    ids = _encode(tokenizer, [suffix])[0]
    for known in (special, added):
        found = next((i for i in ids if i in known), None)
        if found is not None:
            return found, suffix[: suffix.index(known[found])], []
    end_id, end = _eos(tokenizer)
    writes = (
        f"writes {suffix!r} after an answer, which holds no end token" if suffix else "writes no end token"
    )
    return end_id, "", [f"the template {writes}: {end} is put there instead"]


def _find_anchor(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[str, list[str]]:
    """Text to put before a response so that it is tokenised as it is behind the prompt.

    SentencePiece-like tokenizers write a space before the first word of any text, which a response that is
    tokenised by itself would wrongly get. Most tokenizers need no anchor.
    """
    start, apart, whole = _encode(tokenizer, [prompt, response, prompt + response])
    if start + apart == whole or whole[: len(start)] != start:
        return "", []
    for size in (1, *range(2, min(len(prompt), 64) + 1)):
        anchor = prompt[-size:]
        head, both = _encode(tokenizer, [anchor, anchor + response])
        if both[: len(head)] == head and both[len(head) :] == whole[len(start) :]:
            return anchor, []
    return "", ["a response tokenised by itself differs from the same text behind a prompt"]


def _start_notes(tokenizer: PreTrainedTokenizerBase, prompt: str, start: str) -> list[str]:
    notes = []
    if start.strip():
        count = len(_encode(tokenizer, [start])[0])
        thinking = (
            "; template_options enable_thinking: false moves it into the prompt" if "<think>" in start else ""
        )
        notes.append(
            f"the template writes {start!r} before an answer but not in the generation prompt, so its {count} "
            f"tokens are trained in every response{thinking}"
        )
    bos = tokenizer.bos_token
    alone = tokenizer("a", add_special_tokens=True, return_attention_mask=False)["input_ids"]
    if bos and list(alone[:1]) == [tokenizer.bos_token_id] and not prompt.startswith(str(bos)):
        notes.append(
            f"the tokenizer begins plain text with {bos}, but the template does not write it: no begin token"
        )
    return notes


# --- rows --------------------------------------------------------------------------------------------


def render_prompt(chat: ChatFormat, messages: Sequence[Message]) -> str:
    """The text that generation starts from (without a begin token in plain mode). Raises RowRefused."""
    if chat.plain:
        return "\n".join(message["content"] for message in messages)
    return _render(chat, messages, True)


def render_response(
    chat: ChatFormat, messages: Sequence[Message], prompt_text: str, response: Sequence[Message]
) -> str:
    """What the template adds to `prompt_text` for `response`, up to before the end-of-turn token.

    Raises RowRefused where the rendered prompt is not a prefix of the rendered whole.
    """
    if [turn["role"] for turn in response] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in response) or "none"
        raise RowRefused(MALFORMED_ROW, f"a response must be one assistant turn; the turns here are: {roles}")
    if chat.plain:
        return response[0]["content"]
    whole = _render(chat, [*messages, *response], False)
    if not whole.startswith(prompt_text):
        raise RowRefused(NOT_PREFIX_SAFE, _divergence(prompt_text, whole))
    added = whole[len(prompt_text) :]
    if not added.endswith(chat.suffix):
        tail = added[-_EXCERPT:]
        raise RowRefused(NOT_PREFIX_SAFE, f"the whole ends in {tail!r}, where {chat.suffix!r} was expected")
    return added[: len(added) - len(chat.suffix)] + chat.ending


def _render(chat: ChatFormat, messages: Sequence[Message], generation_prompt: bool) -> str:
    try:
        text = chat.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **chat.template_options,
        )
    except (TemplateError, TypeError) as error:
        raise RowRefused(MALFORMED_ROW, f"the chat template refuses it: {error}") from error
    return str(text)


def _divergence(prompt: str, whole: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    start = max(0, at - _EXCERPT)
    return f"the prompt reads {prompt[start : at + _EXCERPT]!r}, the whole {whole[start : at + _EXCERPT]!r}"


def encode_prompts(chat: ChatFormat, texts: Sequence[str]) -> list[list[int]]:
    """The ids of rendered prompts, with the one begin token."""
    return [[*chat.prompt_start, *ids] for ids in _encode(chat.tokenizer, texts)]


def encode_responses(chat: ChatFormat, texts: Sequence[str]) -> list[list[int]]:
    """The trained ids of rendered responses, the end-of-turn token last."""
    if not chat.anchor:
        return [[*ids, chat.end_id] for ids in _encode(chat.tokenizer, texts)]
    head, *both = _encode(chat.tokenizer, [chat.anchor, *(chat.anchor + text for text in texts)])
    # Where the anchor melts into the response, the response by itself is the best there is.
    whole = [ids[len(head) :] if ids[: len(head)] == head else None for ids in both]
    alone = iter(
        _encode(chat.tokenizer, [text for text, ids in zip(texts, whole, strict=True) if ids is None])
    )
    return [[*(next(alone) if ids is None else ids), chat.end_id] for ids in whole]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def encode_prompt(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """The ids that generation starts from: one prompt, with the generation prompt. Raises RowRefused."""
    return encode_prompts(chat, [render_prompt(chat, messages)])[0]
