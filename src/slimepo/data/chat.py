"""What a tokenizer and its chat template do to a conversation, found out before any row is rendered."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.data.render import PROBE, ChatFormat, RowRefused, divergence, encode, render, render_prompt
from slimepo.errors import BadFilesError, InputError, one_line
from slimepo.files import read_json
from slimepo.hub import look_for_hub, not_given
from slimepo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the Llama 3 templates themselves fall back to where they have no clock.
PINNED_DATE = "26 Jul 2024"
# Templates that read the clock would write another prompt every day: they find this clock in its place.
_DIRECTIVES = {
    "%d": "26", "%-d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24",
    "%A": "Friday", "%a": "Fri",
    "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM", "%j": "208", "%F": "2024-07-26", "%T": "12:00:00",
}  # fmt: skip
_STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{directive}', '{value}')" for directive, value in _DIRECTIVES.items())
    + " }}{%- endmacro +%}"
)

_SENTINEL = "Sentinel7answer"
_THOUGHT = "Sentinel7thought"
# An answer as most data has it, and two ways of writing one that was thought about.
_PROBE_ANSWERS: dict[str, Message] = {
    "plain": {"role": "assistant", "content": _SENTINEL},
    "with a <think> block": {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_SENTINEL}"},
    "with reasoning_content": {"role": "assistant", "content": _SENTINEL, "reasoning_content": _THOUGHT},
}
# Options by which templates of the field say where thoughts go.
_THINKING_OPTIONS = [
    (name, value)
    for name in ("enable_thinking", "thinking", "truncate_history_thinking", "clear_thinking")
    for value in (False, True)
]
# Mistral's and Phi's marks are plain text to some of their tokenizers.
_MARK = re.compile(r"\[/?[A-Z_]{3,}\]|<\|[^|<>\s]+\|>|<<?/?SYS>>")
# Thoughts and calls stand in answers as text where a template does not write them.
_ANSWERS_MAY_HOLD = re.compile(r"think|thought|tool", re.IGNORECASE)


def load_tokenizer(
    name_or_path: str | Path, chat_template: str | Path | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with another model's chat template where `chat_template` names one.

    `chat_template` is a .jinja file, a folder or a Hub id. Special tokens that another model's template
    writes and this tokenizer lacks are added to it, so compare `len(tokenizer)` with the embedding's rows.
    `options` are transformers' for loading it, such as `revision`.
    Raises InputError.
    """
    tokenizer = _load(str(name_or_path), "tokenizer", **options)
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


def _load(name: str, what: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    # An adapter saved by itself reads the tokens of its model.
    folder = Path(name)
    has_one = any(any(folder.glob(f"{file}*")) for file in ("tokenizer", "vocab", "spiece", "sentencepiece"))
    if folder.is_dir() and not has_one:
        adapter = read_json(folder / "adapter_config.json") or {}
        if not (base := str(adapter.get("base_model_name_or_path") or "")):
            # transformers would make an empty one for some architectures.
            raise InputError(f"no {what} can be loaded from '{name}': there is none in the folder")
        name = base
    look_for_hub(name, f"no {what} can be loaded from '{name}': ")
    try:
        # Unless somebody asks for it by name, no code of a folder's runs: transformers would ask on standard input.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, **{"trust_remote_code": False, **options}
        )
    except Exception as error:
        # Of whatever kind: tokenizers of different makes read different files.
        kind = BadFilesError if Path(name).is_dir() else InputError
        raise kind(f"no {what} can be loaded from '{name}': {not_given(one_line(str(error)))}") from error
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
    a template, contents are joined as plain text and the end-of-sequence token ends a response. A template that no
    answer can be trained with still renders prompts; `refusal` says why.
    """
    template, options = _template_text(tokenizer), dict(template_options or {})
    if template is None:
        return _plain_format(tokenizer, options)
    for name in options:
        if name not in template:
            raise InputError(f"the chat template knows no option {name!r}: it is nowhere in its text")
    notes = []
    if "strftime_now" in template and "date_string" not in options:
        template = _STOPPED_CLOCK + template
        notes = [f'the template writes today\'s date; it is fixed at "{PINNED_DATE}" so that runs repeat']
    specials = {token: i for i, token in _special_tokens(tokenizer).items()}
    chat = ChatFormat(tokenizer, template, options, -1, specials=specials)
    prompt, plain, refused = _probed(chat)
    if _SENTINEL not in plain:
        # Templates of models that see want the content of a turn in parts.
        chat = replace(chat, parts=True)
        prompt, plain, _ = _probed(chat)
    if refused and not plain:
        raise InputError(f"the chat template fails on a one-turn conversation: {refused}")
    added = _added(chat)
    way_out = _way_out(chat, added)
    marks, harmless = _marks(tokenizer, plain, specials)
    chat = replace(chat, marks=marks, harmless=harmless, way_out=way_out)
    if not added:
        refusal = (
            "the chat template cannot be used for training: the rendered prompt is not the beginning of the rendered "
            f"conversation ({divergence(prompt, plain)}){way_out}"
        )
        return replace(chat, end_id=_eos(tokenizer)[0], refusal=refusal, notes=tuple(notes))
    if "plain" not in added:
        notes.append(f"only answers {' or '.join(added)} can be trained with this template as it is{way_out}")
    start, _, suffix = next(iter(added.values())).rpartition(_SENTINEL)
    end_id, ending, more = _end_of_turn(tokenizer, suffix)
    anchors, anchor_notes = _find_anchors(tokenizer, prompt, start + _SENTINEL + ending)
    notes += [*more, *anchor_notes, *_start_notes(chat, prompt, start if "plain" in added else "")]
    return replace(chat, end_id=end_id, suffix=suffix, ending=ending, anchors=anchors, notes=tuple(notes))


def _probed(chat: ChatFormat) -> tuple[str, str, str]:
    """The probe's prompt, the whole with a plain answer, and why there are none."""
    try:
        return render_prompt(chat, PROBE), render(chat, [*PROBE, _PROBE_ANSWERS["plain"]]), ""
    except RowRefused as refused:
        return "", "", refused.detail


def _added(chat: ChatFormat) -> dict[str, str]:
    """What the template adds to the probe's prompt for each kind of answer that it leaves the prompt as it was for."""
    try:
        prompt = render_prompt(chat, PROBE)
        wholes = {name: render(chat, [*PROBE, answer]) for name, answer in _PROBE_ANSWERS.items()}
    except RowRefused:
        return {}
    return {
        name: whole[len(prompt) :]
        for name, whole in wholes.items()
        if whole.startswith(prompt) and _SENTINEL in whole[len(prompt) :]
    }


def _way_out(chat: ChatFormat, added: Mapping[str, str]) -> str:
    """Options of the template that were tried, and what they help; where nothing can be trained, another template."""

    def behind_the_prompt(added: Mapping[str, str]) -> bool:
        return added.get("plain", "").startswith(_SENTINEL)

    def thought_kept(added: Mapping[str, str]) -> bool:
        return "with a <think> block" in added

    aims = {
        "puts a plain answer right behind the prompt": behind_the_prompt,
        "keeps an answer with a <think> block": thought_kept,
    }
    cures = ""
    for aim, reached in aims.items():
        for name, value in _THINKING_OPTIONS:
            if reached(added) or name not in str(chat.template):
                continue
            if reached(_added(replace(chat, template_options={**chat.template_options, name: value}))):
                cures += f"; template_options {name}: {str(value).lower()} {aim}"
                break
    return cures or (
        "" if "plain" in added else "; give another model's template (chat_template), or your own"
    )


def _marks(
    tokenizer: PreTrainedTokenizerBase, rendered: str, specials: Mapping[str, int]
) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """What no text may hold, the limits of turns and texts; and other special tokens, such as <unk>."""
    begin_and_end = (tokenizer.bos_token, tokenizer.eos_token)
    written = {token for token in specials if token in rendered or _MARK.fullmatch(token)}
    limits = {*_MARK.findall(rendered), *map(str, filter(None, begin_and_end)), *written}

    def pattern(tokens: set[str]) -> re.Pattern[str] | None:
        found = sorted(
            (each for each in tokens if each and not _ANSWERS_MAY_HOLD.search(each)), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, found))) if found else None

    return pattern(limits), pattern({*specials} - limits)


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # Several named templates and none called default.
        raise InputError(f"the tokenizer's chat template cannot be chosen: {one_line(str(error))}") from error


def _plain_format(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> ChatFormat:
    note = "there is no chat template: prompts and responses are plain text, and {} ends a response"
    end_id, end = _eos(tokenizer)
    bare = encode(tokenizer, ["a"])[0]
    alone: list[int] = list(tokenizer("a", add_special_tokens=True, return_attention_mask=False)["input_ids"])
    at = next((i for i in range(len(alone)) if alone[i : i + len(bare)] == bare), 0)
    anchors, notes = _find_anchors(tokenizer, "Probe\n", _SENTINEL)
    start = tuple(alone[:at])
    return ChatFormat(
        tokenizer,
        None,
        options,
        end_id,
        prompt_start=start,
        anchors=anchors,
        notes=(note.format(end), *notes),
    )


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
    ids = encode(tokenizer, [suffix])[0]
    for known in (special, added):
        first = next((at for at, i in enumerate(ids) if i in known), None)
        if first is not None:
            # The end-of-text token where it stands right behind another: Cohere's end an answer with both.
            run = list(itertools.takewhile(known.__contains__, ids[first:]))
            last = run.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in run else 0
            before = suffix[: suffix.index(known[run[0]])]
            return run[last], before + "".join(known[i] for i in run[:last]), []
    end_id, end = _eos(tokenizer)
    writes = (
        f"writes {suffix!r} after an answer, which holds no end token" if suffix else "writes no end token"
    )
    return end_id, "", [f"the template {writes}: {end} is put there instead"]


def _find_anchors(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str
) -> tuple[tuple[str, ...], list[str]]:
    """Texts to put before a response so that it is tokenised as it is behind the prompt.

    SentencePiece-like tokenizers write a space before the first word of any text, which a response that is
    tokenised by itself would wrongly get. Most tokenizers need no anchor. An answer may melt with one ("]" before
    "[1, 2]"), so there are several; what follows a line break is tokenised by itself in all of them.
    """
    start, whole = encode(tokenizer, [prompt, prompt + response])
    read = tokenizer.decode(whole)

    def right(anchor: str) -> bool:
        head, both = encode(tokenizer, [anchor, anchor + response])
        ids = both[len(head) :]
        if both[: len(head)] != head:
            return False
        if whole[: len(start)] == start:
            return bool(whole[len(start) :] == ids)
        return bool(
            tokenizer.decode([*start, *ids]) == read
        )  # The prompt's last token melts with the answer's first.

    if right(""):
        return ("",), []
    tails = (prompt[-size:] for size in range(1, min(len(prompt), 64) + 1))
    found = list(dict.fromkeys(anchor for anchor in [*tails, "\n", "\n\n"] if right(anchor)))
    if found:
        return tuple(dict.fromkeys([*found[:2], *found[-2:]])), []
    return ("",), ["a response tokenised by itself differs from the same text behind a prompt"]


def _start_notes(chat: ChatFormat, prompt: str, start: str) -> list[str]:
    tokenizer, notes = chat.tokenizer, []
    if start.strip():
        count = len(encode(tokenizer, [start])[0])
        notes.append(
            f"the template writes {start!r} before an answer but not in the generation prompt, so its {count} "
            f"tokens are trained in every response{chat.way_out}"
        )
    bos = tokenizer.bos_token
    alone = tokenizer("a", add_special_tokens=True, return_attention_mask=False)["input_ids"]
    if bos and list(alone[:1]) == [tokenizer.bos_token_id] and not prompt.startswith(str(bos)):
        notes.append(
            f"the tokenizer begins plain text with {bos}, but the template does not write it: no begin token"
        )
    return notes
