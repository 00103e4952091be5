"""From one raw row to one canonical record: the file formats that preference data comes in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slimepo.errors import InputError
from slimepo.types import Message, Preference, Unpaired
from slimepo.words import nearest

RawRow = Mapping[str, Any]
Turns = list[Message]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", **{r: r for r in ROLES}}
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_LABELS = {"true": True, "1": True, "false": False, "0": False}


class MalformedRow(ValueError):
    """One row cannot be read; the message says why in plain words, without the place."""


@dataclass(frozen=True)
class Format:
    """One row format: what it takes, how its first row is recognised, and how a row is converted."""

    accepts: str
    fits: Callable[[RawRow], bool]
    convert: Callable[[RawRow], Preference | Unpaired]


def convert(row: RawRow, name: str, source: str = "") -> Preference | Unpaired:
    """The canonical record of one raw row of the format `name`.

    A `system` column, where there is one, becomes the system message, and a `weight` column the row's weight. Raises
    MalformedRow.
    """
    if row.get("tools"):
        raise MalformedRow("'tools' is not empty, and tool definitions are not supported")
    record = FORMATS[name].convert(row)
    prompt = _with_system(record.prompt, row.get("system"))
    if not prompt:
        raise MalformedRow("the prompt is empty: the conversation starts with the answer")
    if prompt[-1]["role"] == "assistant":
        raise MalformedRow("the prompt ends in an assistant turn; it must end in the turn that is answered")
    weight = _weight(row)
    if isinstance(record, Unpaired):
        _from_assistant("response", record.response)
        return Unpaired(prompt, record.response, record.label, source, weight)
    for side, turns in (("chosen", record.chosen), ("rejected", record.rejected)):
        _from_assistant(side, turns)
    return Preference(prompt, record.chosen, record.rejected, source, weight)


def recognise(row: RawRow) -> str:
    """The name of the format that fits the columns of `row`; InputError says what would be accepted."""
    for name, format_ in FORMATS.items():
        if format_.fits(row):
            return name
    accepted = "; ".join(f"{name}: {format_.accepts}" for name, format_ in FORMATS.items())
    found = ", ".join(sorted(str(key) for key in row)) or "none"
    hint = ""
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        hint = (
            ": where 'chosen' and 'rejected' are plain strings without a 'prompt' column, the end of the prompt "
            "can only be told in '\\n\\nHuman: ...\\n\\nAssistant: ...' transcripts"
        )
    raise InputError(f"no format fits the columns found ({found}){hint}. Accepted are {accepted}")


def known_format(name: str) -> str:
    """`name` if it is a format; InputError with the nearest name otherwise."""
    if name in FORMATS:
        return name
    raise InputError(
        f"unknown data format '{name}'{nearest(name, FORMATS)}; known are auto, {', '.join(FORMATS)}"
    )


# --- the parts that rows are made of -----------------------------------------------------------------


def _get(row: RawRow, key: str) -> Any:
    if key not in row:
        found = ", ".join(sorted(str(k) for k in row)) or "none"
        raise MalformedRow(f"no '{key}' (columns: {found})")
    if row[key] is None:
        raise MalformedRow(f"'{key}' is null")
    return row[key]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise MalformedRow(f"{what} is {_kind(value)}, not a string")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise MalformedRow(f"{what} holds half a surrogate pair, which is not valid text")
    return value


def _kind(value: Any) -> str:
    names = {
        str: "a string",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _content(value: Any, what: str) -> str:
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], dict) and value[0].get("type") == "text":
            return _text(value[0].get("text"), what)
        raise MalformedRow(f"{what} has several parts or parts that are not text, which is not supported")
    return _text(value, what)


def _message(value: Any, what: str) -> Message:
    """One turn, as {role, content} or as {from, value}."""
    if not isinstance(value, Mapping):
        raise MalformedRow(f"{what} is {_kind(value)}, not a message")
    if value.get("tool_calls"):
        raise MalformedRow(f"{what} has tool calls, which are not supported")
    if "role" in value and "content" in value:
        role, content = value["role"], value["content"]
    elif "from" in value and "value" in value:
        role, content = _SHAREGPT_ROLES.get(str(value["from"]), value["from"]), value["value"]
    else:
        keys = ", ".join(sorted(str(key) for key in value)) or "nothing"
        raise MalformedRow(f"{what} must have 'role' and 'content' (or 'from' and 'value'); it has {keys}")
    if role not in ROLES:
        raise MalformedRow(f"{what} has the unknown role {role!r} (known: {', '.join(ROLES)})")
    return {"role": role, "content": _content(content, f"the content of {what}")}


def _turns(value: Any, what: str) -> Turns:
    if not isinstance(value, list):
        raise MalformedRow(f"{what} is {_kind(value)}, not a list of messages")
    if not value:
        raise MalformedRow(f"{what} is an empty list")
    return [_message(item, f"turn {index} of {what}") for index, item in enumerate(value, 1)]


def _side(row: RawRow, key: str, role: str) -> Turns:
    """The column `key` as turns; a plain string is one turn of `role`, a single message a list of one."""
    value = _get(row, key)
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, f"'{key}'")}]
    return _turns([value] if isinstance(value, Mapping) else value, f"'{key}'")


def _with_system(prompt: Turns, system: Any) -> Turns:
    if system is None or system == "":
        return prompt
    first: Message = {"role": "system", "content": _text(system, "'system'")}
    if prompt and prompt[0]["role"] == "system":
        if prompt[0] != first:
            raise MalformedRow("the 'system' column and the system message of the conversation differ")
        return prompt
    return [first, *prompt]


def _weight(row: RawRow) -> float:
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise MalformedRow(f"'weight' is {value!r}; it must be a finite number, 0 or more")
    return weight


def _from_assistant(side: str, turns: Turns) -> None:
    if turns and turns[0]["role"] != "assistant":
        raise MalformedRow(f"'{side}' starts with a {turns[0]['role']} turn where the answer should be")
    if turns and turns[-1]["role"] != "assistant":
        raise MalformedRow(f"'{side}' ends in a {turns[-1]['role']} turn where the answer should be")


def _part(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Split two whole conversations into the turns they share and the rest, at least one turn each."""
    shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while shared < longest and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise MalformedRow("'chosen' and 'rejected' do not start with the same prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _same_turn(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def _holds(turns: Turns, part: Turns) -> bool:
    """Whether `part` stands in `turns` as a whole (blanks around a turn aside)."""
    starts = range(len(turns) - len(part) + 1)
    return any(all(map(_same_turn, turns[i : i + len(part)], part)) for i in starts)


def _answered(row: RawRow, messages: bool) -> tuple[Turns, Turns]:
    """Prompt and answer: of a whole conversation under `messages`, or in the columns prompt and completion."""
    if not messages:
        return _side(row, "prompt", "user"), _side(row, "completion", "assistant")
    turns = _turns(_get(row, "messages"), "'messages'")
    if turns[-1]["role"] != "assistant":
        raise MalformedRow(f"'messages' ends in a {turns[-1]['role']} turn, not with the assistant's answer")
    return turns[:-1], turns[-1:]


# --- one converter a format --------------------------------------------------------------------------


def _explicit(row: RawRow) -> Preference:
    prompt = _side(row, "prompt", "user")
    chosen, rejected = _side(row, "chosen", "assistant"), _side(row, "rejected", "assistant")
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return Preference(prompt, chosen, rejected)
    shared, chosen, rejected = _part(chosen, rejected)
    if not _holds(shared, prompt):
        raise MalformedRow("the conversations in 'chosen' and 'rejected' do not start with the 'prompt'")
    return Preference(shared, chosen, rejected)


def _implicit(row: RawRow) -> Preference:
    return Preference(*_part(*(_turns(_get(row, key), f"'{key}'") for key in ("chosen", "rejected"))))


def _transcript(text: Any, what: str) -> Turns:
    parts = _TRANSCRIPT_TURN.split(_text(text, what))
    if len(parts) < 3 or parts[0].strip():
        raise MalformedRow(f"{what} does not start with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.removeprefix(" ")}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _hh_rlhf(row: RawRow) -> Preference:
    return Preference(*_part(*(_transcript(_get(row, key), f"'{key}'") for key in ("chosen", "rejected"))))


def _alpaca(row: RawRow) -> Preference:
    question = _text(_get(row, "instruction"), "'instruction'")
    if row.get("input"):
        question += "\n" + _text(row["input"], "'input'")
    prompt: Turns = []
    for index, exchange in enumerate(row.get("history") or [], 1):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise MalformedRow(f"item {index} of 'history' is not a [question, answer] pair")
        for role, said in zip(("user", "assistant"), exchange, strict=True):
            prompt.append({"role": role, "content": _text(said, f"item {index} of 'history'")})
    prompt.append({"role": "user", "content": question})
    answers = (row.get("chosen"), row.get("rejected"))
    if "chosen" not in row and "rejected" not in row:
        output = _get(row, "output")
        if not isinstance(output, list) or len(output) != 2:
            raise MalformedRow("'output' is not a list of two answers (the preferred one first)")
        answers = (output[0], output[1])
    pair = {"chosen": answers[0], "rejected": answers[1]}
    return Preference(prompt, _side(pair, "chosen", "assistant"), _side(pair, "rejected", "assistant"))


def _sharegpt(row: RawRow) -> Preference:
    prompt = _turns(_get(row, "conversations"), "'conversations'")
    return Preference(prompt, _side(row, "chosen", "assistant"), _side(row, "rejected", "assistant"))


def _kto(row: RawRow) -> Unpaired:
    prompt, response = _answered(row, "messages" in row)
    label = _LABELS.get(str(value := _get(row, "label")).strip().lower())
    if label is None:
        raise MalformedRow(f"'label' is {value!r}, not true or false")
    return Unpaired(prompt, response, label)


def _demonstration(row: RawRow) -> Preference:
    return Preference(*_answered(row, "completion" not in row), [])


def _has(*keys: str) -> Callable[[RawRow], bool]:
    return lambda row: all(row.get(key) is not None for key in keys)


def _is_ultrafeedback(row: RawRow) -> bool:
    if not (isinstance(row.get("prompt"), str) and _is_implicit(row) and row["chosen"]):
        return False
    first = row["chosen"][0]
    return isinstance(first, Mapping) and first.get("role") in ("user", "system")


def _is_transcript(row: RawRow) -> bool:
    sides = [row.get("chosen"), row.get("rejected")]
    return all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)


def _is_implicit(row: RawRow) -> bool:
    return isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)


def _is_alpaca(row: RawRow) -> bool:
    return _has("instruction")(row) and (
        _has("chosen", "rejected")(row) or isinstance(row.get("output"), list)
    )


def _is_answered(row: RawRow) -> bool:
    return _has("prompt", "completion")(row) or _has("messages")(row)


# In the order in which they are tried: the more telling columns first.
FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        "conversations (list of {from, value}), chosen, rejected",
        _has("conversations", "chosen", "rejected"),
        _sharegpt,
    ),
    "alpaca": Format(
        "instruction, chosen, rejected (or output = two answers), optional input, system, history",
        _is_alpaca,
        _alpaca,
    ),
    "ultrafeedback": Format(
        "prompt (string), chosen, rejected (lists of messages that start with the prompt)",
        _is_ultrafeedback,
        _explicit,
    ),
    "explicit": Format(
        "prompt, chosen, rejected (strings or lists of messages)",
        _has("prompt", "chosen", "rejected"),
        _explicit,
    ),
    "hh-rlhf": Format("chosen, rejected ('\\n\\nHuman: ...\\n\\nAssistant: ...')", _is_transcript, _hh_rlhf),
    "implicit": Format("chosen, rejected (lists of messages that share the prompt)", _is_implicit, _implicit),
    "kto": Format(
        "prompt, completion, label; or messages, label",
        lambda row: _has("label")(row) and _is_answered(row),
        _kto,
    ),
    "demonstration": Format(
        "prompt, completion; or messages (the answer last)",
        lambda row: not {"chosen", "rejected"} & row.keys() and _is_answered(row),
        _demonstration,
    ),
}
