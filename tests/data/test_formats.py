"""Every row format becomes the same canonical record, and a bad row says what is wrong with it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.data.columns import renamed
from slimepo.data.formats import convert, known_format, recognise
from slimepo.data.messages import MalformedRow
from slimepo.errors import InputError
from slimepo.types import Preference, Unpaired


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def read(row, **columns):
    row = renamed(row, columns)
    return convert(row, recognise(row), "here:1")


PLAIN = Preference([user("2+2?")], [assistant("4")], [assistant("5")])

SAME_PAIR = {
    "explicit, strings": ("explicit", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
    "explicit, messages": (
        "explicit",
        {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    "explicit, prompt repeated": (
        "explicit",
        {
            "prompt": [user("2+2?")],
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
        },
    ),
    "implicit": (
        "implicit",
        {"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
    ),
    "ultrafeedback": (
        "ultrafeedback",
        {
            "prompt": "2+2?",
            "prompt_id": "f00",
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
            "messages": [user("2+2?"), assistant("4")],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
    ),
    "hh-rlhf": (
        "hh-rlhf",
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    ),
    "alpaca": ("alpaca", {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}),
    "alpaca, output of two": ("alpaca", {"instruction": "2+2?", "output": ["4", "5"]}),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ),
}


@pytest.mark.parametrize(("name", "row"), SAME_PAIR.values(), ids=SAME_PAIR)
def test_every_pair_format_is_recognised_and_gives_the_same_record(name, row):
    assert recognise(row) == name
    assert convert(row, name) == PLAIN


@pytest.mark.parametrize(("name", "row"), SAME_PAIR.values(), ids=SAME_PAIR)
def test_a_weight_is_read_in_every_pair_format(name, row):
    for written, weight in ((0, 0.0), (2.5, 2.5), ("0.5", 0.5), (None, 1.0), ("", 1.0)):
        assert convert(row | {"weight": written}, name).weight == weight


def test_judged_answers_and_demonstrations_have_weights():
    for row in (
        {"prompt": "2+2?", "completion": "4"},
        {"messages": [user("2+2?"), assistant("4")], "label": 0},
    ):
        assert read(row | {"weight": 3}).weight == 3.0


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "much", True, [1]])
def test_what_is_no_weight_makes_a_row_malformed(weight):
    with pytest.raises(MalformedRow, match=r"'weight' is .*finite number, 0 or more"):
        read({"prompt": "2+2?", "completion": "4", "weight": weight})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4", "label": False},
        {"prompt": [user("2+2?")], "completion": [assistant("4")], "label": "False"},
        {"messages": [user("2+2?"), assistant("4")], "label": 0},
    ],
)
def test_judged_answers_become_unpaired_records(row):
    assert recognise(row) == "kto"
    assert read(row) == Unpaired([user("2+2?")], [assistant("4")], False)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "2+2?", "completion": "4"}, {"messages": [user("2+2?"), assistant("4")]}],
)
def test_demonstrations_have_nothing_rejected(row):
    assert recognise(row) == "demonstration"
    assert read(row) == Preference([user("2+2?")], [assistant("4")], [])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "4", "rejected": "5"}, "the end of the prompt can only be told in"),
        ({"text": "2+2? 4"}, "nothing says what of 'text' is the answer.*give prompt and completion"),
        ({"input_ids": [5, 6], "labels": [-100, 6]}, "given in Python, as slimepo.data.rows.Row"),
    ],
)
def test_columns_without_an_answer_of_their_own_have_a_way_out(row, words):
    with pytest.raises(InputError, match=words):
        recognise(row)


def test_the_source_is_kept():
    assert read(SAME_PAIR["implicit"][1]).source == "here:1"


def test_system_messages_are_kept_in_every_way_of_writing_them():
    pair = [{"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}]
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"}]
    rows = [
        {"conversations": turns, "chosen": pair[0], "rejected": pair[1]},
        {"instruction": "2+2?", "system": "Be brief.", "output": ["4", "5"]},
        {"prompt": "2+2?", "system": "Be brief.", "chosen": "4", "rejected": "5"},
        {
            "prompt": "2+2?",
            "chosen": [system("Be brief."), user("2+2?"), assistant("4")],
            "rejected": [system("Be brief."), user("2+2?"), assistant("5")],
        },
    ]
    for row in rows:
        assert read(row).prompt == [system("Be brief."), user("2+2?")]


def test_columns_that_only_other_rows_fill_do_not_count():
    empty = {
        "prompt": "",
        "completion": "",
        "messages": [],
        "conversations": "",
        "chosen": None,
        "rejected": None,
    }
    turns, alone = [user("2+2?"), assistant("4")], replace(PLAIN, rejected=[])
    assert convert(empty | {"instruction": "2+2?", "output": "4"}, "demonstration") == alone
    assert convert(empty | {"messages": turns}, "demonstration") == alone
    assert convert(empty | {"instruction": "2+2?", "output": ["4", "5"]}, "alpaca") == PLAIN
    assert convert({"conversations": turns, "messages": turns, "rejected": "5"}, "sharegpt") == PLAIN


def test_alpaca_input_and_history_are_part_of_the_prompt():
    row = {"instruction": "Add.", "input": "2 and 2", "history": [["Hi", "Hello"]], "output": ["4", "5"]}
    assert read(row).prompt == [user("Hi"), assistant("Hello"), user("Add.\n2 and 2")]


def test_equal_conversations_share_all_but_the_last_turn():
    turns = [user("2+2?"), assistant("4")]
    assert read({"chosen": turns, "rejected": turns}) == Preference(
        [user("2+2?")], [assistant("4")], [assistant("4")]
    )


def test_transcript_text_keeps_its_inner_line_breaks():
    row = {
        "chosen": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nd",
        "rejected": "\n\nHuman: a\n\nb\n\nAssistant: e",
    }
    assert read(row) == Preference([user("a\n\nb")], [assistant("c\n\nd")], [assistant("e")])


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
transcript_text = text.filter(
    lambda t: "\n\nHuman:" not in t and "\n\nAssistant:" not in t and t[:1].strip() != ""
)
exchanges = st.lists(st.tuples(transcript_text, transcript_text), max_size=3)


@given(exchanges, transcript_text, transcript_text, transcript_text)
def test_all_ways_of_writing_a_conversation_read_back_the_same(history, question, good, bad):
    prompt = [turn for q, a in history for turn in (user(q), assistant(a))] + [user(question)]
    expected = Preference(prompt, [assistant(good)], [assistant(bad)])
    transcript = "".join(
        f"\n\n{'Human' if t['role'] == 'user' else 'Assistant'}: {t['content']}" for t in prompt
    )
    names = {"user": "human", "assistant": "gpt"}
    rows = {
        "explicit": {"prompt": prompt, "chosen": good, "rejected": bad},
        "implicit": {"chosen": [*prompt, assistant(good)], "rejected": [*prompt, assistant(bad)]},
        "hh-rlhf": {
            "chosen": f"{transcript}\n\nAssistant: {good}",
            "rejected": f"{transcript}\n\nAssistant: {bad}",
        },
        "alpaca": {"instruction": question, "history": [list(h) for h in history], "output": [good, bad]},
        "sharegpt": {
            "conversations": [{"from": names[t["role"]], "value": t["content"]} for t in prompt],
            "chosen": {"from": "gpt", "value": good},
            "rejected": {"from": "gpt", "value": bad},
        },
    }
    for name, row in rows.items():
        assert recognise(row) == name
        assert convert(row, name) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "'chosen' is null"),
        ({"prompt": "a", "chosen": "b"}, "no 'rejected' (columns: chosen, prompt)"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "'chosen' is a number, not a list of messages"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "'chosen' is an empty list"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "turn 1 of 'chosen' is a string, not a message"),
        (
            {"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"},
            "turn 1 of 'chosen' must have 'role' and 'content' (or 'from' and 'value'); it has role",
        ),
        (
            {"prompt": "a", "chosen": [assistant(None)], "rejected": "c"},
            "the content of turn 1 of 'chosen' is null, not a string",
        ),
        (
            {"prompt": "a", "chosen": [{"role": "robot", "content": "x"}], "rejected": "c"},
            "turn 1 of 'chosen' has the unknown role 'robot' (known: system, user, assistant, tool)",
        ),
        (
            {"prompt": "a", "chosen": "\ud800", "rejected": "c"},
            "'chosen' holds half a surrogate pair, which is not valid text",
        ),
        (
            {"prompt": [user("a"), assistant("b")], "chosen": "b", "rejected": "c"},
            "the prompt ends in an assistant turn; it must end in the turn that is answered",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "[...]"},
            "'tools' is no JSON: Expecting value",
        ),
    ],
)
def test_a_malformed_row_says_what_is_wrong(row, reason):
    with pytest.raises(MalformedRow) as caught:
        convert(row, "explicit")
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        (
            "implicit",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]},
            "same prompt",
        ),
        (
            "ultrafeedback",
            {"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "do not start with the prompt",
        ),
        ("hh-rlhf", {"chosen": "hello", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "does not start with"),
        (
            "hh-rlhf",
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
                "rejected": "\n\nHuman: a\n\nAssistant: b",
            },
            "'chosen' ends in a user turn",
        ),
        (
            "kto",
            {"messages": [user("a"), assistant("b")], "label": "maybe"},
            "'label' is 'maybe', not true or false; .* remove the column",
        ),
        ("kto", {"messages": [user("a")], "label": True}, "ends in a user turn"),
        ("demonstration", {"messages": [assistant("a")]}, "starts with the answer"),
        ("alpaca", {"instruction": "a", "output": "b"}, "not a list of two answers"),
        ("alpaca", {"instruction": "a", "history": ["b"], "output": ["b", "c"]}, "item 1 of 'history'"),
        (
            "sharegpt",
            {"conversations": [{"from": "narrator", "value": "{}"}], "chosen": "b", "rejected": "c"},
            "unknown role 'narrator'",
        ),
    ],
)
def test_each_format_has_its_own_ways_to_go_wrong(name, row, reason):
    with pytest.raises(MalformedRow, match=reason):
        convert(row, name)


def test_unknown_columns_say_what_was_found_and_the_nearest_forms():
    with pytest.raises(InputError) as caught:
        recognise({"question": "a", "answer": "b"})
    message = str(caught.value)
    assert "(answer, question)" in message
    assert "(prompt, chosen, rejected)" in message
    assert "\n" not in message


def test_plain_strings_without_a_prompt_are_refused_with_the_way_out():
    with pytest.raises(InputError, match="plain strings without a 'prompt' column"):
        recognise({"chosen": "a cat", "rejected": "a dog"})


def test_a_conversation_beside_answers_is_not_taken_for_a_demonstration():
    assert recognise({"messages": [user("a")], "chosen": "b", "rejected": "c"}) == "sharegpt"


def test_a_misspelt_format_names_the_nearest():
    assert known_format("kto") == "kto"
    with pytest.raises(InputError, match="did you mean 'implicit'"):
        known_format("implict")


@pytest.mark.parametrize("answer", [json.dumps([user("hi")]), "Human: hi\n\nAssistant: hello"])
def test_an_answer_that_is_a_conversation_is_text_beside_a_plain_one(answer):
    for row in (
        {"prompt": "q", "chosen": answer, "rejected": "b"},
        {"instruction": "q", "output": [answer, "b"]},
    ):
        assert read(row) == Preference([user("q")], [assistant(answer)], [assistant("b")])
    with pytest.raises(MalformedRow, match="do not start with the"):
        read({"prompt": "q", "chosen": answer, "rejected": answer})
