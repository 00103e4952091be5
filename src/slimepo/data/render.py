"""From messages to text to token ids, with exact boundaries between prompt and response.

The prompt is rendered by the chat template with the generation prompt, the whole conversation by the same
template; the response is what the whole adds. Both texts are tokenised apart, so that training starts from
exactly the ids that generation is given. The response ends in the template's end-of-turn token; what the
template writes behind that token is never generated and so never trained.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from slimepo.errors import InputError
from slimepo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_PREFIX_SAFE = "template not prefix-safe"
TEMPLATE_REFUSES = "refused by the template"
LEFT_OUT = "left out by the template"
SPECIAL_TOKEN = "special token in the text"
SEVERAL_TURNS = "answer of several turns"
NO_BOUNDARY = "no boundary between the tokens"

_QUESTION = "Probe?"
PROBE: list[Message] = [{"role": "user", "content": _QUESTION}]
_EXCERPT = 120
# Of the processor's time for one conversation, which takes a sound template less than a thousandth of that. (On a
# machine that has too much to do, a clock on the wall would run out.)
SECONDS = 10.0
REWRITTEN = (
    "the template writes the prompt otherwise once it is answered; trained behind the prompt of generation"
)


class RowRefused(Exception):
    """One row cannot be rendered: `reason` is a drop reason, `detail` says more in plain words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with its chat template and what was found out about the two; see `data.chat.chat_format`.

    `template` is the text that is rendered, its clock stopped; None joins contents as plain text. `end_id` is the
    end-of-turn token, the last trained token of a response. `suffix` is what the template writes after an answer;
    `ending` its part before the end token. `specials` are special tokens by their text, `marks` those that only the
    template may write, `harmless` those that no template writes. `prompt_start` are the ids that the tokenizer
    itself puts before plain text (only without a template). `anchors` are texts that are put before a response
    while it is tokenised, for tokenizers that treat the start of a text differently; the first that does not melt
    with the response counts. `refusal` says why no answer at all can be trained, `way_out` which options of the
    template would help a row that it breaks. With `parts` a turn's content is given as a list of one text. `notes`
    are sentences for the user.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    template_options: Mapping[str, Any]
    end_id: int
    suffix: str = ""
    ending: str = ""
    specials: Mapping[str, int] | None = None
    marks: re.Pattern[str] | None = None
    harmless: re.Pattern[str] | None = None
    prompt_start: tuple[int, ...] = ()
    anchors: tuple[str, ...] = ("",)
    refusal: str = ""
    way_out: str = ""
    parts: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Response:
    """The text of a response up to before its end token, that token, and what is worth saying of it."""

    text: str
    end_id: int
    remark: str = ""


def render_prompt(
    chat: ChatFormat, messages: Sequence[Message], options: Mapping[str, Any] | None = None
) -> str:
    """The text that generation starts from (without a begin token in plain mode).

    `options` are a row's own: `tools` and options of the template. Raises RowRefused, also where the template leaves
    out the tools or tool calls that it is given.
    """
    if chat.template is None:
        if options or any(set(turn) - {"role", "content", "name"} for turn in messages):
            raise RowRefused(
                LEFT_OUT, "without a chat template, nothing can be given beside the text of the turns"
            )
        # Text that was rendered before has its begin token, and an answer its end token: one of each is enough.
        begin = str(chat.tokenizer.decode(list(chat.prompt_start)))
        return "\n".join(message["content"] for message in messages).removeprefix(begin)
    for name in options or {}:
        if name not in chat.template:
            raise RowRefused(LEFT_OUT, f"the row gives {name!r}, and the chat template knows no such option")
    text = render(chat, messages, options, generation_prompt=True)
    if "tools" in (options or {}) and text == _without(chat, messages, {**(options or {}), "tools": None}):
        raise RowRefused(LEFT_OUT, "the chat template does not write 'tools'")
    if _called(messages):
        uncalled = [
            cast("Message", {k: v for k, v in turn.items() if k != "tool_calls"}) for turn in messages
        ]
        if text == _without(chat, uncalled, options):
            raise RowRefused(LEFT_OUT, "the chat template does not write 'tool_calls'")
    return text


def render_response(
    chat: ChatFormat,
    messages: Sequence[Message],
    prompt_text: str,
    response: Sequence[Message],
    options: Mapping[str, Any] | None = None,
) -> Response:
    """What the template adds to `prompt_text` for `response`.

    Where the template writes the prompt otherwise once it is answered (a system message that moves), the answer is
    what it writes for it behind another prompt, if the whole ends so too. Raises RowRefused where nothing tells the
    answer from the prompt, or where the template leaves out a part of the answer.
    """
    if [turn["role"] for turn in response] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in response) or "none"
        raise RowRefused(SEVERAL_TURNS, f"a response must be one assistant turn; the turns here are: {roles}")
    (answer,) = response
    if chat.template is None:
        if "reasoning_content" in answer or "tool_calls" in answer:
            raise RowRefused(LEFT_OUT, "without a chat template, reasoning and tool calls cannot be written")
        # With the line break that a template writes behind the end token.
        text, end = answer["content"].rstrip(), str(chat.tokenizer.eos_token)
        return Response(text.removesuffix(end) if text.endswith(end) else answer["content"], chat.end_id)
    whole = render(chat, [*messages, *response], options)
    remark = ""
    if whole.startswith(prompt_text):
        added = whole[len(prompt_text) :]
    elif behind := _behind_the_probe(chat, prompt_text, whole, response, options):
        added, remark = behind, REWRITTEN
    else:
        raise RowRefused(NOT_PREFIX_SAFE, divergence(prompt_text, whole) + chat.way_out)
    # Templates that split thoughts from the answer write both, with other blanks between.
    parts = [
        answer.get("reasoning_content", ""),
        *re.split(r"</?think>", answer["content"]),
    ]
    absent = [part for part in parts if part.strip() not in added]
    if absent := absent + [name for name in _called(response) if not _names(added, name)]:
        raise RowRefused(
            LEFT_OUT, f"the chat template does not write {absent[0].strip()[:_EXCERPT]!r} of the answer"
        )
    return _ended(chat, added, remark)


def _without(chat: ChatFormat, messages: Sequence[Message], options: Mapping[str, Any] | None) -> str | None:
    """The prompt as it would be with something left out; None where the template refuses that."""
    try:
        return render(chat, messages, options, generation_prompt=True)
    except RowRefused:
        return None


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _called(messages: Sequence[Message]) -> list[str]:
    return [str(call["function"]["name"]) for turn in messages for call in turn.get("tool_calls", [])]


def _behind_the_probe(
    chat: ChatFormat, prompt: str, whole: str, response: Sequence[Message], options: Mapping[str, Any] | None
) -> str:
    """What the template writes for an answer to another prompt, where `whole` ends in the same; else nothing."""
    start = render(chat, PROBE, options, generation_prompt=True)
    answered = render(chat, [*PROBE, *response], options)
    opening = start.rpartition(_QUESTION)[2]
    added = answered[len(start) :] if answered.startswith(start) else ""
    return added if added and prompt.endswith(opening) and whole.endswith(opening + added) else ""


def _ended(chat: ChatFormat, added: str, remark: str) -> Response:
    """An answer without what the template writes behind it, and the token that ends it."""
    if added.endswith(chat.suffix):
        return Response(added[: len(added) - len(chat.suffix)] + chat.ending, chat.end_id, remark)
    # A turn that calls a tool may end in another token than one that answers.
    specials, text = chat.specials or {}, added.rstrip()
    ends = [token for token in specials if text.endswith(token)]
    if not ends:
        tail = added[-_EXCERPT:]
        raise RowRefused(NOT_PREFIX_SAFE, f"the whole ends in {tail!r}, where {chat.suffix!r} was expected")
    end = max(ends, key=len)
    return Response(text.removesuffix(end), specials[end], remark)


def refuse_marks(chat: ChatFormat, messages: Sequence[Message], what: str) -> None:
    """RowRefused where the text itself holds a token that only the template may write."""
    for turn in messages:
        text = turn["content"] + turn.get("reasoning_content", "")
        if chat.marks and (found := chat.marks.search(text)):
            raise RowRefused(
                SPECIAL_TOKEN,
                f"{what} holds {found[0]!r}, a special token or a mark of the chat template's own; give "
                "the turns as messages without it",
            )


def render(
    chat: ChatFormat,
    messages: Sequence[Message],
    options: Mapping[str, Any] | None = None,
    *,
    generation_prompt: bool = False,
) -> str:
    """The text of a conversation. Raises RowRefused."""
    try:
        return _applied(chat, messages, options, generation_prompt)
    except TypeError:
        # DeepSeek's templates want the arguments of tool calls as text.
        return _applied(chat, list(map(_with_arguments_as_text, messages)), options, generation_prompt)


def _applied(
    chat: ChatFormat, messages: Sequence[Message], options: Mapping[str, Any] | None, generation_prompt: bool
) -> str:
    calls = any("tool_calls" in turn for turn in messages)
    given: Any = list(messages)
    if chat.parts:
        given = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    try:
        with limited(SECONDS, of_processor=True):
            text = chat.tokenizer.apply_chat_template(
                given,
                chat_template=chat.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **{**chat.template_options, **(options or {})},
            )
    except TimeoutError as error:
        # Not of this row alone: with a limit for each, many rows would take for ever.
        raise InputError(
            f"the chat template was not done with one conversation after {SECONDS} s of work: does it loop?"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # A template is a program, and fails as programs do: a range of too many numbers, a macro that calls itself.
        if isinstance(error, TypeError) and calls and not _arguments_are_text(messages):
            raise
        said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise RowRefused(TEMPLATE_REFUSES, f"the chat template says: {said}") from error
    return str(text)


@contextmanager
def limited(seconds: float, *, of_processor: bool = False) -> Iterator[None]:
    """Inside, a TimeoutError after so many seconds (of_processor: of those that this process has computed); in the main
    thread of a Unix process, where there are alarms."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    timer, alarm = signal.ITIMER_REAL, signal.SIGALRM
    if of_processor:
        timer, alarm = signal.ITIMER_PROF, signal.SIGPROF
    clock = time.process_time if of_processor else time.monotonic
    before = signal.signal(alarm, ring)
    left, again = signal.setitimer(timer, seconds)
    started = clock()
    try:
        yield
    finally:
        # Somebody else's alarm still rings when it was to.
        rest = max(left - (clock() - started), 1e-3) if left else 0.0
        signal.setitimer(timer, rest, again)
        signal.signal(alarm, before)


def _with_arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _arguments_are_text(messages: Sequence[Message]) -> bool:
    calls = [call for turn in messages for call in turn.get("tool_calls", [])]
    return all(isinstance(call["function"]["arguments"], str) for call in calls)


def divergence(prompt: str, whole: str) -> str:
    """Where two texts part that should start alike, with what is around the place."""
    at = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    start = max(0, at - _EXCERPT)
    return f"the prompt reads {prompt[start : at + _EXCERPT]!r}, the whole {whole[start : at + _EXCERPT]!r}"


def encode_prompts(chat: ChatFormat, texts: Sequence[str]) -> list[list[int]]:
    """The ids of rendered prompts, with the one begin token."""
    return [[*chat.prompt_start, *ids] for ids in encode(chat.tokenizer, texts)]


def encode_responses(chat: ChatFormat, responses: Sequence[Response]) -> list[list[int] | None]:
    """The trained ids of rendered responses, the end token last; None where no anchor keeps off the response."""
    done: list[list[int] | None] = [None] * len(responses)
    for anchor in chat.anchors:
        left = [i for i, ids in enumerate(done) if ids is None]
        head, *both = encode(chat.tokenizer, [anchor, *(anchor + responses[i].text for i in left)])
        for i, ids in zip(left, both, strict=True):
            if ids[: len(head)] == head:
                done[i] = [*ids[len(head) :], responses[i].end_id]
    return done


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, without what the tokenizer would put around them."""
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
