"""From one raw row to one canonical record: the layouts that preference data comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slimepo.data.columns import leaving_out, listed, refuse_telling, required, scores_of
from slimepo.data.messages import (
    MalformedRow,
    RawRow,
    Turns,
    as_text,
    as_turns,
    holds_something,
    is_transcript,
    json_object,
    kind,
    number,
    parsed_messages,
    tool_definitions,
    transcript_turns,
    truth,
    without_nulls,
)
from slimepo.data.winners import answer_list, sides_of
from slimepo.errors import InputError
from slimepo.types import Message, Preference, Unpaired
from slimepo.words import nearest


@dataclass(frozen=True)
class Format:
    """One row format: the columns that it reads of a row, how a row of it is known, and how a row is converted."""

    reads: Callable[[RawRow], tuple[str, ...]]
    fits: Callable[[RawRow], bool]
    convert: Callable[[RawRow], Preference | Unpaired]


def convert(row: RawRow, name: str, source: str = "") -> Preference | Unpaired:
    """The canonical record of one raw row of the format `name`, under our names (`renamed`).

    In every format a `system` column becomes the system message, `weight` the row's weight, and `tools` and
    `chat_template_kwargs` are given to the chat template. Raises MalformedRow, also for a column that tells something
    and is not read.
    """
    record = FORMATS[name].convert(row)
    single = isinstance(record, Unpaired) or not record.rejected
    refuse_telling(row, FORMATS[name].reads(row), single)
    prompt = _with_system(record.prompt, row.get("system"))
    if not prompt:
        raise MalformedRow("the prompt is empty: the conversation starts with the answer")
    if prompt[-1]["role"] == "assistant":
        raise MalformedRow("the prompt ends in an assistant turn; it must end in the turn that is answered")
    if isinstance(record, Unpaired):
        answers = {"response": record.response}
    else:
        answers = {"chosen": record.chosen, "rejected": record.rejected}
        record = replace(record, scores=scores_of(row))
    for side, turns in answers.items():
        _from_assistant(side, turns)
    return replace(
        record, prompt=prompt, source=source, weight=_weight(row), template_options=_template_options(row)
    )


def recognise(row: RawRow, found: Iterable[str] | None = None) -> str:
    """The name of the format that fits the columns of `row`; InputError says what was found and what is near.

    `found` are the columns under the names that their file gives them.
    """
    for name, format_ in FORMATS.items():
        if format_.fits(row):
            return name
    forms = (
        "a row is a pair (prompt, chosen, rejected), two answers (prompt, response_a, response_b, preferred), several "
        "(prompt, answers) or one (prompt, completion)"
    )
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        forms = (
            "where 'chosen' and 'rejected' are plain strings without a 'prompt' column, the end of the prompt "
            "can only be told in '\\n\\nHuman: ...\\n\\nAssistant: ...' transcripts"
        )
    elif sides := sides_of(row):
        forms = (
            f"which of {sides[0]} and {sides[1]} is better, a column says (preferred=THEIRS), or two scores "
            "(score_a=THEIRS and score_b=THEIRS)"
        )
    elif listed_answers := answer_list(row):
        forms = (
            f"nothing says how good each answer in {listed_answers[0]!r} is: a score, rating, reward, stars or rank in "
            "each, or a list of scores beside them"
        )
    elif isinstance(row.get("text"), str):
        forms = "nothing says what of 'text' is the answer; give prompt and completion, or messages"
    elif "input_ids" in row:
        forms = "rows of your own token ids are given in Python, as slimepo.data.rows.Row"
    raise InputError(
        f"no format fits the columns found ({listed(found or row)}): {forms}. Other names: --column prompt=THEIRS "
        "with data check and eval basics, 'data.columns={prompt: THEIRS, ...}' after other commands; see "
        "docs/guide.md#data-formats"
    )


def known_format(name: str) -> str:
    """`name` if it is a format; InputError with the nearest name otherwise."""
    if name in FORMATS:
        return name
    raise InputError(
        f"unknown data format '{name}'{nearest(name, FORMATS)}; known are auto, {', '.join(FORMATS)}"
    )


# --- the parts that rows are made of -----------------------------------------------------------------


def _side(row: RawRow, key: str, role: str) -> Turns:
    """The column `key` as turns; a plain string is one turn of `role`."""
    return as_turns(required(row, key), f"'{key}'", role)


def _sides(row: RawRow) -> dict[str, Turns]:
    """The two answers, or the two conversations that end in them."""
    sides = {key: _side(row, key, "assistant") for key in ("chosen", "rejected")}
    whole = [key for key, turns in sides.items() if turns[0]["role"] != "assistant"]
    if len(whole) == 1 and isinstance(text := row[whole[0]], str):
        # Beside a plain answer this is one too: somebody asked for messages or a dialogue.
        sides[whole[0]] = [{"role": "assistant", "content": as_text(text, f"'{whole[0]}'")}]
    return sides


def _with_system(prompt: Turns, system: Any) -> Turns:
    if not holds_something(system):
        return prompt
    first: Message = {"role": "system", "content": as_text(system, "'system'")}
    if prompt and prompt[0]["role"] == "system":
        if prompt[0] != first:
            raise MalformedRow("the 'system' column and the system message of the conversation differ")
        return prompt
    return [first, *prompt]


def _weight(row: RawRow) -> float:
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    weight = number(value)
    if weight is None or weight < 0:
        raise MalformedRow(f"'weight' is {value!r}; it must be a finite number, 0 or more")
    return weight


def _template_options(row: RawRow) -> dict[str, Any]:
    """What the chat template is given for this row beside its messages: `chat_template_kwargs`, and `tools`."""
    options: dict[str, Any] = {}
    if holds_something(given := row.get("chat_template_kwargs")):
        given = without_nulls(given)
        given = json_object(given, "'chat_template_kwargs'") if isinstance(given, str) else given
        if not isinstance(given, Mapping):
            raise MalformedRow(f"'chat_template_kwargs' is {kind(given)}, not an object")
        options = dict(given)
        for key in (
            "messages",
            "tokenize",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template",
        ):
            if key in options:
                raise MalformedRow(f"'chat_template_kwargs' may not hold {key!r}, which training sets itself")
    if holds_something(row.get("tools")):
        options["tools"] = tool_definitions(row["tools"])
    return options


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


def _pair(prompt: Turns, chosen: Turns, rejected: Turns) -> Preference:
    """Answers behind a prompt, or whole conversations that start with it."""
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return Preference(prompt, chosen, rejected)
    shared, chosen, rejected = _part(chosen, rejected)
    if not _holds(shared, prompt):
        raise MalformedRow("the conversations in 'chosen' and 'rejected' do not start with the prompt")
    return Preference(shared, chosen, rejected)


def _answered_conversation(row: RawRow, key: str) -> tuple[Turns, Turns]:
    turns = as_turns(required(row, key), f"'{key}'")
    if turns[-1]["role"] != "assistant":
        raise MalformedRow(f"'{key}' ends in a {turns[-1]['role']} turn, not with the assistant's answer")
    return turns[:-1], turns[-1:]


_INSTRUCTION = ("instruction", "input", "history", "output")
_COMPLETION = ("prompt", "completion")


def _layout(row: RawRow) -> tuple[str, ...]:
    """The columns that are read of a row with one answer."""
    whole = row.get("prompt") is None and _whole(row.get("completion"))
    layouts = {
        "completion": ("completion",) if whole else _COMPLETION,
        "conversations": ("conversations",),
        "messages": ("messages",),
        "instruction": _INSTRUCTION,
    }
    # Tables fill in columns that only other rows have. Where none holds anything, the error names one that is there.
    held = [key for key in layouts if holds_something(row.get(key))] or [key for key in layouts if key in row]
    return layouts[held[0]] if held else _COMPLETION


def _answered(row: RawRow) -> tuple[Turns, Turns]:
    """Prompt and answer of a row with one answer."""
    layout = _layout(row)
    if layout == _COMPLETION:
        return _side(row, "prompt", "user"), _side(row, "completion", "assistant")
    if layout == _INSTRUCTION:
        return _instruction(row), _side(row, "output", "assistant")
    return _answered_conversation(row, layout[0])


def _instruction(row: RawRow) -> Turns:
    """Alpaca's prompt: `history`, and `instruction` with its `input`."""
    prompt: Turns = []
    for index, exchange in enumerate(row.get("history") or [], 1):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise MalformedRow(f"item {index} of 'history' is not a [question, answer] pair")
        for role, said in zip(("user", "assistant"), exchange, strict=True):
            prompt.append({"role": role, "content": as_text(said, f"item {index} of 'history'")})
    turns = _side(row, "instruction", "user")
    if holds_something(row.get("input")):
        extra = as_text(row["input"], "'input'")
        turns = [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']}\n{extra}"}]
    return [*prompt, *turns]


# --- one converter a format --------------------------------------------------------------------------


def _explicit(row: RawRow) -> Preference:
    prompt = _side(row, "prompt", "user")
    sides = _sides(row)
    if isinstance(row["prompt"], str) and is_transcript(row["prompt"]):
        # The blank behind the transcript's last `Assistant:` stands at the start of the answer's own column.
        for key, turns in sides.items():
            if isinstance(row[key], str):
                sides[key] = [{**turns[0], "content": turns[0]["content"].removeprefix(" ")}, *turns[1:]]
    return _pair(prompt, sides["chosen"], sides["rejected"])


def _implicit(row: RawRow) -> Preference:
    return Preference(*_part(*(as_turns(required(row, key), f"'{key}'") for key in ("chosen", "rejected"))))


def _hh_rlhf(row: RawRow) -> Preference:
    sides = (transcript_turns(required(row, key), f"'{key}'") for key in ("chosen", "rejected"))
    return Preference(*_part(*sides))


def _alpaca_reads(row: RawRow) -> tuple[str, ...]:
    pair = any(holds_something(row.get(key)) for key in ("chosen", "rejected"))
    answers = ("output",) if "output" in row and not pair else ("chosen", "rejected")
    return ("instruction", "input", "history", *answers)


def _alpaca(row: RawRow) -> Preference:
    answers = {key: row.get(key) for key in ("chosen", "rejected")}
    if "output" in _alpaca_reads(row):
        output = required(row, "output")
        if not isinstance(output, list) or len(output) != 2:
            raise MalformedRow("'output' is not a list of two answers (the preferred one first)")
        answers = dict(zip(answers, output, strict=True))
    return _pair(_instruction(row), *_sides(answers).values())


def _sharegpt_reads(row: RawRow) -> tuple[str, ...]:
    if holds_something(row.get("messages")) and row.get("chosen") is None:
        # ms-swift's messages end in the chosen answer.
        return ("messages", "rejected")
    conversation = "conversations" if holds_something(row.get("conversations")) else "messages"
    return (conversation, "chosen", "rejected")


def _sharegpt(row: RawRow) -> Preference:
    reads = _sharegpt_reads(row)
    rejected = _side(row, "rejected", "assistant")
    if "chosen" in reads:
        return _pair(
            as_turns(required(row, reads[0]), f"'{reads[0]}'"), _side(row, "chosen", "assistant"), rejected
        )
    prompt, chosen = _answered_conversation(row, reads[0])
    whole = rejected[0]["role"] != "assistant"
    return Preference(*_part(prompt + chosen, rejected)) if whole else _pair(prompt, chosen, rejected)


def _kto(row: RawRow) -> Unpaired:
    prompt, response = _answered(row)
    value = required(row, "label")
    if (label := truth(value)) is None:
        raise MalformedRow(
            f"'label' is {value!r}, not true or false; where it is no judgment of the answer: {leaving_out('label')}"
        )
    return Unpaired(prompt, response, label)


def _demonstration(row: RawRow) -> Preference:
    return Preference(*_answered(row), [])


# --- which format a row has --------------------------------------------------------------------------


def _has(*keys: str) -> Callable[[RawRow], bool]:
    return lambda row: all(row.get(key) is not None for key in keys)


def _whole(value: Any) -> bool:
    """Whether a value holds messages that begin with the prompt."""
    try:
        value = parsed_messages(value, "")
    except MalformedRow:
        return False
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) in ("user", "system", "human")


def _is_sharegpt(row: RawRow) -> bool:
    if _has("conversations", "chosen", "rejected")(row):
        return True
    # UltraFeedback's and others' `messages` repeats what `prompt` or the whole conversations say.
    return _has("messages", "rejected")(row) and row.get("prompt") is None and not _whole(row.get("chosen"))


def _is_transcript(row: RawRow) -> bool:
    sides = [row.get("chosen"), row.get("rejected")]
    return all(isinstance(side, str) and is_transcript(side) for side in sides)


def _is_implicit(row: RawRow) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(side, list) or _whole(side) for side in sides)


def _is_alpaca(row: RawRow) -> bool:
    return _has("instruction")(row) and (
        _has("chosen", "rejected")(row) or isinstance(row.get("output"), list)
    )


def _is_answered(row: RawRow) -> bool:
    layouts = (("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"))
    return any(_has(*keys)(row) for keys in layouts) or _whole(row.get("completion"))


def _columns(*names: str) -> Callable[[RawRow], tuple[str, ...]]:
    return lambda row: names


# In the order in which they are tried: the more telling columns first.
FORMATS: dict[str, Format] = {
    "sharegpt": Format(_sharegpt_reads, _is_sharegpt, _sharegpt),
    "alpaca": Format(_alpaca_reads, _is_alpaca, _alpaca),
    "ultrafeedback": Format(
        _columns("prompt", "chosen", "rejected"),
        lambda row: isinstance(row.get("prompt"), str) and _is_implicit(row) and _whole(row.get("chosen")),
        _explicit,
    ),
    "explicit": Format(
        _columns("prompt", "chosen", "rejected"), _has("prompt", "chosen", "rejected"), _explicit
    ),
    "hh-rlhf": Format(_columns("chosen", "rejected"), _is_transcript, _hh_rlhf),
    "implicit": Format(_columns("chosen", "rejected"), _is_implicit, _implicit),
    "kto": Format(
        lambda row: (*_layout(row), "label"), lambda row: _has("label")(row) and _is_answered(row), _kto
    ),
    "demonstration": Format(
        _layout,
        lambda row: not {"chosen", "rejected"} & row.keys() and _is_answered(row),
        _demonstration,
    ),
}
