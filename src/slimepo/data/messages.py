"""The turns of a conversation, from the many ways in which data writes them.

A value that holds turns is a list of messages, one message, either of them as JSON text, a `Human: ... Assistant: ...`
transcript, or plain text, which is one turn of the role that its column stands for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from slimepo.files import parse_json
from slimepo.types import Message

RawRow = Mapping[str, Any]
Turns = list[Message]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", **{r: r for r in ROLES}}
_TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")

# What a message may hold beside role and content. Reasoning has three names in the field; they mean one thing.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PASSED_ON = ("tool_call_id", "name")
_READ = ("role", "from", "content", "value", "tool_calls", *_REASONING, *_PASSED_ON)
# Whether, or with what weight, a turn is trained. The last turn of an answer is, whole, and no turn before it.
_TRAINS = ("weight", "train", "training", "loss", "loss_scale")
# Keys that change what the message means or how it is trained, with the way out.
_REFUSED = {
    "images": "only text is trained on",
    "image": "only text is trained on",
    "videos": "only text is trained on",
    "video": "only text is trained on",
    "audios": "only text is trained on",
    "audio": "only text is trained on",
    "function_call": "write it as 'tool_calls'",
    "prefix": "an answer is trained whole",
    "mask": "an answer is trained whole",
    "train_detail": "an answer is trained whole",
    "training_detail": "an answer is trained whole",
}


class MalformedRow(ValueError):
    """One row cannot be read; the message says why in plain words, without the place."""


def holds_something(value: Any) -> bool:
    """Whether a cell tells anything: null, empty text, empty lists and lists of nulls do not."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return any(map(holds_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_something, value))
    return value is not None


def truth(value: Any) -> bool | None:
    """What a cell says of yes or no, in words or numbers; None where it says neither."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return words.get(str(value).strip().lower())


def number(value: Any) -> float | None:
    """The finite number in a cell, also as text, as tables have it; None where there is none."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def as_text(value: Any, what: str) -> str:
    """The value if it is valid text. Raises MalformedRow."""
    if not isinstance(value, str):
        raise MalformedRow(f"{what} is {kind(value)}, not a string")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise MalformedRow(f"{what} holds half a surrogate pair, which is not valid text")
    return value


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {
        str: "a string",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


# What rows that are trained on may have, and prompts that are to be answered may not.
_BESIDE_A_PROMPT = {
    "system": "write it into the prompt, as its first message",
    "tools": "answers are sampled without tools",
    "chat_template_kwargs": "give the recipe's template_options",
}


def prompt_turns(row: Mapping[str, Any]) -> Turns:
    """The turns of a row's `prompt` that is to be answered; nothing stands beside it. Raises MalformedRow."""
    for key, way_out in _BESIDE_A_PROMPT.items():
        if holds_something(row.get(key)):
            raise MalformedRow(f"{key!r} is not read beside a prompt that is to be answered: {way_out}")
    return as_turns(row.get("prompt"), "'prompt'", "user")


def as_turns(value: Any, what: str, role: str | None = None) -> Turns:
    """The turns that a value holds; plain text is one turn of `role`, where there is one. Raises MalformedRow."""
    value = parsed_messages(value, what)
    if isinstance(value, str) and is_transcript(value):
        return transcript_turns(value, what)
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": as_text(value, what)}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise MalformedRow(f"{what} is {kind(value)}, not a list of messages")
    if not value:
        raise MalformedRow(f"{what} is an empty list")
    if len(value) > 1 and all(isinstance(item, str) for item in value):
        raise MalformedRow(
            f"{what} is a list of strings, not of messages (a table by columns? write one object a row)"
        )
    return [
        _message(item, f"turn {index} of {what}", last=index == len(value))
        for index, item in enumerate(value, 1)
    ]


def parsed_messages(value: Any, what: str) -> Any:
    """Messages that a table of text columns holds as JSON, parsed; any other value as it is. Raises MalformedRow."""
    if not isinstance(value, str):
        return value.tolist() if type(value).__name__ == "ndarray" else value
    start = value.lstrip()[:30]
    if re.match(r"\[?\s*\{\s*'(role|content|from|value)'", start):
        raise MalformedRow(f"{what} holds messages as Python writes them; write them as JSON (double quotes)")
    if not re.match(r'\[?\s*\{\s*"', start):
        return value
    try:
        parsed = parse_json(value)
    except ValueError:
        return value
    items = parsed if isinstance(parsed, list) else [parsed]
    return parsed if items and all(map(_is_message, items)) else value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and (
        {"role", "content"} <= value.keys()
        or {"from", "value"} <= value.keys()
        or {"role", "tool_calls"} <= value.keys()
    )


def is_transcript(text: str) -> bool:
    """Whether text is a `Human: ... Assistant: ...` conversation as hh-rlhf writes it, or the answer of one."""
    whole = text.lstrip().startswith("Human:") and "\n\nAssistant:" in text
    return whole or text.startswith("\n\nAssistant:")


def transcript_turns(text: Any, what: str) -> Turns:
    """The turns of a transcript; an open `Assistant:` at its end, which waits for the answer, is none."""
    parts = _TRANSCRIPT_TURN.split(as_text(text, what).lstrip("\n"))
    if len(parts) < 3 or parts[0].strip():
        raise MalformedRow(f"{what} does not start with '\\n\\nHuman:'")
    if parts[-2] == "Assistant" and not parts[-1].strip():
        parts = parts[:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    said = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[who], "content": content.removeprefix(" ")} for who, content in said]


def _message(value: Any, what: str, *, last: bool) -> Message:
    """One turn, as {role, content} or as {from, value}, with reasoning and tool calls where it has them.

    The `last` one, if it is an answer, is trained and may not say otherwise. What others say is in `unread_keys`.
    """
    if not isinstance(value, Mapping):
        raise MalformedRow(f"{what} is {kind(value)}, not a message")
    given = {key: each for key, each in value.items() if holds_something(each)}
    for key, reason in _REFUSED.items():
        if key in given:
            raise MalformedRow(f"{what} has {key!r}, which is not supported: {reason}")
    if "role" not in value and "from" not in value:
        keys = ", ".join(sorted(str(key) for key in value)) or "nothing"
        raise MalformedRow(f"{what} must have 'role' and 'content' (or 'from' and 'value'); it has {keys}")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    calls = _tool_calls(given.get("tool_calls", []), what)
    if role == "function_call":  # LLaMA-Factory's: the content is the call.
        role, content, calls = "assistant", "", _tool_calls(f"[{content}]", what)
    role = _SHAREGPT_ROLES.get(str(role), role)
    if role not in ROLES:
        raise MalformedRow(f"{what} has the unknown role {role!r} (known: {', '.join(ROLES)})")
    for key in _TRAINS:
        if last and role == "assistant" and key in given and truth(given[key]) is not True:
            raise MalformedRow(
                f"{what} has {key!r} {given[key]!r}, and it is the answer, which is trained whole: remove the row, or "
                "give the row a 'weight'"
            )
    if "content" not in value and "value" not in value and not calls:
        keys = ", ".join(sorted(str(key) for key in value))
        raise MalformedRow(f"{what} must have 'role' and 'content' (or 'from' and 'value'); it has {keys}")
    message: Message = {"role": role, "content": "" if content is None and calls else _content(content, what)}
    if calls:
        message["tool_calls"] = calls
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    if reasoning is not None:
        message["reasoning_content"] = as_text(reasoning, f"the reasoning of {what}")
    for key in _PASSED_ON:
        if key in given:
            message[key] = as_text(given[key], f"{key!r} of {what}")  # type: ignore[literal-required]
    return message


def _content(value: Any, what: str) -> str:
    what = f"the content of {what}"
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], dict) and value[0].get("type") == "text":
            return as_text(value[0].get("text"), what)
        raise MalformedRow(f"{what} has several parts or parts that are not text, which is not supported")
    return as_text(value, what)


def _tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Calls as chat templates read them: each with its function's name, and arguments as an object."""
    calls = []
    for call in _objects(value, f"'tool_calls' of {what}"):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MalformedRow(f"'tool_calls' of {what} has a call without the name of its function")
        arguments = without_nulls(function.get("arguments"))
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except ValueError as error:
                raise MalformedRow(
                    f"'arguments' of a tool call of {what} is no JSON: {getattr(error, 'msg', error)}"
                ) from error
        named = {"name": function["name"], "arguments": arguments or {}}
        call_id = {"id": call["id"]} if call.get("id") else {}
        calls.append({**call_id, "type": "function", "function": named})
    return calls


def tool_definitions(value: Any) -> list[dict[str, Any]]:
    """The column `tools`, a list of JSON schemas or its JSON text. Raises MalformedRow."""
    tools = _objects(without_nulls(value), "'tools'")
    for tool in tools:
        if not isinstance(tool.get("function", tool).get("name"), str):
            raise MalformedRow("'tools' has a tool without a name")
    return tools


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise MalformedRow(f"{what} is no JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise MalformedRow(f"{what} is no list of objects")
    return value


def json_object(text: str, what: str) -> dict[str, Any]:
    """An object that a cell holds as JSON text. Raises MalformedRow."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise MalformedRow(f"{what} is no JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(value, dict):
        raise MalformedRow(f"{what} is {kind(value)}, not an object")
    return value


def without_nulls(value: Any) -> Any:
    """A nested value without its nulls: Arrow tables fill in every key that any row has. JSON text is as it is."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def unread_keys(value: Any) -> list[str]:
    """Keys of the messages in a value that tell something and are not read; a turn that asks to be trained and is
    not, for it stands before the answer, among them."""
    items = value if isinstance(value, list) else [value]
    messages = [item for item in items if isinstance(item, Mapping) and ("role" in item or "from" in item)]
    known = (*_READ, *_REFUSED, *_TRAINS)
    keys = [str(key) for item in messages for key in item if key not in known and holds_something(item[key])]
    before = messages if not messages or _asks(messages[-1]) else messages[:-1]
    return keys + [
        f"{key} before the answer"
        for item in before
        for key in _TRAINS
        if holds_something(item.get(key)) and truth(item[key]) is not False
    ]


def _asks(message: Mapping[str, Any]) -> bool:
    return message.get("role", message.get("from")) in ("user", "human", "system", "tool", "observation")
