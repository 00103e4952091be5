"""Turns are the same whatever way they are written, and what a message holds beside its text is kept or refused."""

import json
from typing import Any

import numpy as np
import pytest

from slimepo.data.messages import (
    MalformedRow,
    as_turns,
    holds_something,
    prompt_turns,
    tool_definitions,
    unread_keys,
)
from slimepo.data.read import rows_from_records

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "value",
    [
        TURNS,
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"role": "user", "value": "q"}, {"from": "assistant", "content": "a"}],
        json.dumps(TURNS),
        np.array(TURNS, dtype=object),
        "\n\nHuman: q\n\nAssistant: a",
        "Human: q\n\nAssistant: a",
        [
            {"role": "user", "content": [{"type": "text", "text": "q"}], "images": []},
            TURNS[1] | {"tool_calls": None},
        ],
    ],
)
def test_every_way_of_writing_turns(value):
    assert as_turns(value, "'messages'") == TURNS


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"a": 1}', '[{"name": "x"}]', "Human nature", '{"role": "x"', "Assistant:"]
)
def test_text_that_only_looks_like_messages_is_text(text):
    assert as_turns(text, "'chosen'", "assistant") == [{"role": "assistant", "content": text}]


def test_reasoning_has_three_names_and_tool_calls_two_ways_of_writing_arguments():
    for key in ("reasoning_content", "thinking", "reasoning"):
        (turn,) = as_turns([TURNS[1] | {key: "because"}], "'chosen'")
        assert turn == TURNS[1] | {"reasoning_content": "because"}
    function = {"name": "add", "arguments": {"a": 2}}
    for written in (
        function,
        {"name": "add", "arguments": '{"a": 2}'},
        {"name": "add", "arguments": {"a": 2, "b": None}},
    ):
        for call in ({"id": "1", "type": "function", "function": written}, {"id": "1", **written}):
            (turn,) = as_turns([{"role": "assistant", "content": None, "tool_calls": [call]}], "'chosen'")
            assert turn == {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": function}],
            }
    # An Arrow table fills in nulls, JSON text means them.
    call = {"name": "add", "arguments": '{"a": null}'}
    (turn,) = as_turns([{"role": "assistant", "content": "", "tool_calls": [call]}], "'chosen'")
    assert turn["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": None}}
    (turn,) = as_turns([{"from": "function_call", "value": json.dumps(function)}], "'conversations'")
    assert turn["tool_calls"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"images": ["x.png"]}, "has 'images', which is not supported: only text is trained on"),
        ({"function_call": {"name": "f"}}, "write it as 'tool_calls'"),
        (
            {"weight": 0},
            "it is the answer, which is trained whole: remove the row, or give the row a 'weight'",
        ),
        ({"loss": False}, "has 'loss' False, and it is the answer"),
        ({"train": "false"}, "has 'train' 'false'"),
        ({"weight": 0.5}, "has 'weight' 0.5"),
        ({"training_detail": [1]}, "an answer is trained whole"),
        ({"tool_calls": [{"function": {"arguments": 1}}]}, "a call without the name of its function"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "'arguments' of a tool call .* is no JSON"),
        ({"content": None}, "is null, not a string"),
        ({"content": [{"type": "image"}, {"type": "text", "text": "a"}]}, "several parts"),
    ],
)
def test_what_changes_a_message_and_cannot_be_kept_is_refused(message, reason):
    with pytest.raises(MalformedRow, match=reason):
        as_turns([TURNS[1] | message], "'chosen'")


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_scale"])
def test_a_turn_before_the_answer_that_asks_to_be_trained_is_said_to_be_unread(key):
    # As in OpenAI's, OpenHermes' and ms-swift's files.
    first = [TURNS[0] | {key: 0}, TURNS[1] | {key: "false"}]
    for silent in (first, [TURNS[0], TURNS[1] | {key: None}]):
        assert as_turns([*silent, TURNS[0] | {key: 0}, TURNS[1] | {key: 1}], "'messages'") == TURNS * 2
        assert unread_keys([*silent, TURNS[0] | {key: 0}, TURNS[1] | {key: 1}]) == []
    asks = [TURNS[0], TURNS[1] | {key: True}, TURNS[0], TURNS[1] | {key: True}]
    assert as_turns(asks, "'messages'") == TURNS * 2
    assert unread_keys(asks) == unread_keys(asks[:3]) == [f"{key} before the answer"]
    with pytest.raises(MalformedRow, match=f"turn 4 of 'messages' has {key!r}"):
        as_turns([*first, TURNS[0], TURNS[1] | {key: 0}], "'messages'")
    # The answer of a tool is no answer.
    tool = [TURNS[0], {"from": "observation", "value": "4", key: 0}]
    assert [turn["role"] for turn in as_turns(tool, "'prompt'")] == ["user", "tool"]
    assert unread_keys(tool) == []


def test_a_table_by_columns_and_messages_as_python_writes_them_are_said():
    with pytest.raises(MalformedRow, match="a table by columns"):
        as_turns(["q1", "q2"], "'prompt'")
    with pytest.raises(MalformedRow, match="as Python writes them"):
        as_turns(str(TURNS), "'chosen'")


def test_tools_and_options_of_a_row_go_to_the_template():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"x": None}}}
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}

    def options(**columns):
        return rows_from_records([row | columns]).preferences[0].template_options

    expected = {"tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]}
    assert options(tools=[tool]) == options(tools=json.dumps(expected["tools"])) == expected
    assert options(tools=json.dumps([tool])) == {"tools": [tool]}
    assert options(tools=[]) == options(tools="[]") == options(tools=None) == {}
    assert options(chat_template_kwargs={"enable_thinking": False, "other": None}) == {
        "enable_thinking": False
    }
    assert options(chat_template_kwargs='{"other": null}') == {"other": None}
    with pytest.raises(MalformedRow, match="a tool without a name"):
        tool_definitions([{"type": "function"}])


def test_what_holds_something():
    assert not any(map(holds_something, [None, "", " ", [], [None], {}, {"a": None}, "[]", "null"]))
    assert all(map(holds_something, [0, False, "x", [0], {"a": False}]))


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("system", "Be brief.", "write it into the prompt, as its first message"),
        ("tools", [{"name": "search"}], "sampled without tools"),
        ("chat_template_kwargs", {"enable_thinking": False}, "template_options"),
    ],
)
def test_what_a_prompt_to_be_answered_has_no_place_for_is_refused(key: str, value: Any, way_out: str) -> None:
    with pytest.raises(MalformedRow, match=f"'{key}' is not read.*{way_out}"):
        prompt_turns({"prompt": "Hi.", key: value})
    # Tables have empty cells.
    assert prompt_turns({"prompt": "Hi.", key: None}) == [{"role": "user", "content": "Hi."}]
