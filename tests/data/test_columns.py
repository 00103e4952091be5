"""Every column of a row is read, read under another name, refused by name, or said to be unread."""

import pytest

from slimepo.data.chat import chat_format
from slimepo.data.columns import renamed
from slimepo.data.formats import FORMATS, convert, recognise
from slimepo.data.messages import MalformedRow
from slimepo.data.notes import row_notes
from slimepo.data.read import rows_from_records
from slimepo.data.tokenize import tokenize
from slimepo.errors import InputError
from slimepo.types import Preference, Unpaired
from tests.tiny import letter_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(row, **columns):
    row = renamed(row, columns)
    return convert(row, recognise(row))


PAIR = Preference([user("q")], [assistant("a")], [assistant("b")])
ANSWERS = {"chosen": "a", "rejected": "b"}

# Layouts of published data sets and other trainers.
LAYOUTS = {
    "question": {"question": "q", **ANSWERS},
    "input": {"input": "q", **ANSWERS},
    "paired answers": {"qid": 1, "question": "q", "response_j": "a", "response_k": "b"},
    "instruction and responses": {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
    "instruction and conversations": {
        "instruction": "q",
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
    },
    "OpenAI": {
        "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [assistant("a")],
        "non_preferred_output": [assistant("b")],
    },
    "OpenAI as text": {
        "input": '{"messages": [{"role": "user", "content": "q"}]}',
        "preferred_output": '[{"role": "assistant", "content": "a"}]',
        "non_preferred_output": '[{"role": "assistant", "content": "b"}]',
    },
    "messages and answers": {"messages": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")},
    "messages and lists": {"messages": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    "messages and a rejected response": {"messages": [user("q"), assistant("a")], "rejected_response": "b"},
    "messages and rejected messages": {
        "messages": [user("q"), assistant("a")],
        "rejected_messages": [user("q"), assistant("b")],
    },
    "transcripts beside the prompt": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "chosen": "\n\nHuman: q\n\nAssistant: a",
        "rejected": "\n\nHuman: q\n\nAssistant: b",
    },
    "an open transcript": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
}


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_others_give_the_same_pair(row):
    assert read(row) == PAIR


def test_columns_can_be_named_and_left_out():
    assert read({"ask": "q", "good": "a", "bad": "b"}, prompt="ask", chosen="good", rejected="bad") == PAIR
    assert read({"prompt": "q", **ANSWERS, "label": 1}, label=None) == PAIR
    with pytest.raises(MalformedRow, match="no 'question'"):
        renamed({"prompt": "q"}, {"prompt": "question"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("q"), assistant("a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"completion": [user("q"), assistant("a")]},
    ],
)
def test_an_answer_is_judged_by_label_or_kto_tag(row):
    for key in ("kto_tag", "label"):
        for written, label in ((True, True), (0, False), (1.0, True), (0.0, False), ("False", False)):
            assert read({**row, key: written}) == Unpaired([user("q")], [assistant("a")], label)
    with pytest.raises(MalformedRow, match="'kto_tag' is not empty"):
        read({**row, "kto_tag": True, "label": False})


@pytest.mark.parametrize("column", ["images", "image", "videos", "audios"])
def test_a_picture_is_refused_and_an_empty_column_is_not(column):
    row = {"prompt": "q", **ANSWERS}
    with pytest.raises(MalformedRow, match=f"'{column}' is not empty: only text"):
        read({**row, column: ["cat.png"]})
    for empty in (None, [], [None], "", "[]"):
        assert read({**row, column: empty}) == PAIR


@pytest.mark.parametrize(
    "column",
    [
        "label",
        "kto_tag",
        "preference",
        "winner",
        "rejected_messages",
        "reasoning_content",
        "thinking",
        "history",
    ],
)
def test_what_tells_something_of_a_pair_and_is_not_read_is_refused_with_the_way_out(column):
    with pytest.raises(MalformedRow, match=rf"'{column}' .*\(columns: {{\w+: null}} leaves it out\)"):
        read({"prompt": "q", **ANSWERS, column: "x"})


@pytest.mark.parametrize("column", ["score", "rating", "reward"])
def test_an_answer_with_a_score_is_no_demonstration(column):
    with pytest.raises(MalformedRow, match=f"'{column}' is not empty: it says how good the answer is"):
        read({"prompt": "q", "completion": "a", column: 0.1})
    assert read({"prompt": "q", "completion": "a", column: 0.1}, **{column: None}).chosen == [assistant("a")]


def test_data_whose_order_has_to_be_made_first_is_no_format():
    for row in (
        {"prompt": "q", "response_0": "a", "response_1": "b"},
        {"prompt": "q", "response": "a", "helpfulness": 4},
        {"instruction": "q", "completions": [{"response": "a", "overall_score": 3}]},
    ):
        with pytest.raises(InputError, match=r"no format fits .*data\.columns=\{prompt: THEIR-NAME, "):
            recognise(renamed(row, {}))


def test_columns_and_message_keys_that_are_not_read_are_counted():
    rows = [
        {"prompt": [{**user("q"), "id": 7}], **ANSWERS, "prompt_id": "x", "empty": None},
        {"prompt": "r", **ANSWERS},
    ]
    assert rows_from_records(rows).unread == {"prompt_id": 1, "prompt.id": 1}
    assert list(row_notes(rows_from_records(rows))) == [
        "columns that were not read (rows that have them): prompt.id (1), prompt_id (1)"
    ]
    # UltraFeedback's scores are held against the order of the answers.
    scored = [
        {"prompt": "q", **ANSWERS, "score_chosen": 2.0, "score_rejected": score} for score in (1.0, 3.0)
    ]
    assert next(iter(row_notes(rows_from_records(scored, name="f")))).startswith(
        "1 rows score their rejected answer"
    )


def test_scores_of_a_pair_are_rewards_of_its_row():
    rated = [
        {"prompt": "abc", "chosen": "de", "rejected": "fg", "chosen_rating": 4, "rejected_rating": 2.5},
        {"prompt": "abc", "chosen": "de", "rejected": "fg", "chosen_rating": 4, "rejected_rating": None},
    ]
    records = rows_from_records(rated).preferences
    assert [record.scores for record in records] == [(4.0, 2.5), None]
    first, second = tokenize(records, chat_format(letter_tokenizer(), {})).rows
    assert first.values["rewards"].tolist() == [4.0, 2.5]
    assert second.values == {}


def test_no_row_decides_for_a_file_against_the_others():
    judged = {"prompt": "q", "completion": "a", "label": True}
    unjudged = {"prompt": "q", "completion": "a", "label": None}
    rows = rows_from_records([unjudged, judged, judged], skip_bad_rows=True)
    assert (rows.format, len(rows.unpaired), len(rows.malformed)) == ("kto", 2, 1)
    rows = rows_from_records([unjudged, unjudged, judged], skip_bad_rows=True)
    assert (rows.format, len(rows.preferences)) == ("demonstration", 2)
    assert "'label' or 'kto_tag' is not empty" in rows.malformed[0][1]


def test_answers_judged_all_alike_and_pairs_the_other_way_round_are_said():
    rows = rows_from_records([{"prompt": "q", "completion": "a", "label": 0}] * 3)
    assert "all 3 judged answers are undesirable" in next(row_notes(rows))
    pairs = [
        {"prompt": "q", **ANSWERS},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "r", **ANSWERS},
    ]
    (note,) = row_notes(rows_from_records(pairs, name="f"))
    assert note.startswith("1 pairs stand there the other way round too")
    assert note.endswith("f:row 2")


def test_every_format_says_which_columns_it_reads():
    assert all(format_.reads and format_.accepts for format_ in FORMATS.values())


class TestWinners:
    """Two answers side by side, and a column that says which one is better."""

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "q", "response_a": "a", "response_b": "b", "preferred": "a"},
            {"prompt": "q", "response_a": "b", "response_b": "a", "preferred": "B"},
            {"prompt": "q", "response_a": "b", "response_b": "a", "winner": "response_b"},
            {"prompt": "q", "answer_A": "a", "answer_B": "b", "winner": "model_a"},
            {"question": "q", "response_0": "b", "response_1": "a", "better_response_id": 1},
            {"prompt": "q", "response_1": "a", "response_2": "b", "preference": 1},
            {"prompt": "q", "response1": "b", "response2": "a", "choice": "2"},
            {"instruction": "q", "output_1": "b", "output_2": "a", "preference": 2.0},
            {
                "conversation_a": [user("q"), assistant("b")],
                "conversation_b": [user("q"), assistant("a")],
                "model_a": "one", "model_b": "two", "winner": "model_b",
            },
        ],
        ids=["letter", "capital", "column", "model", "id", "from one", "no mark", "float", "conversations"],
    )  # fmt: skip
    def test_the_better_answer_is_chosen(self, row):
        assert read(row) == PAIR

    @pytest.mark.parametrize("said", ["left_text", "left", "Left"])
    def test_other_names_are_mapped_and_may_say_it(self, said):
        row = {"ask": "q", "left_text": "a", "right_text": "b", "pick": said}
        assert (
            read(row, prompt="ask", response_a="left_text", response_b="right_text", preferred="pick") == PAIR
        )

    @pytest.mark.parametrize("said", [1, "1", 0, True, "first", "a or b", -1])
    def test_what_may_mean_either_is_refused(self, said):
        with pytest.raises(
            MalformedRow, match="does not say whether 'response_a' or 'response_b' is better: write a or b"
        ):
            read({"prompt": "q", "response_a": "a", "response_b": "b", "preferred": said})

    def test_of_three_answers_none_is_taken(self):
        row = {"prompt": "q", "response_0": "a", "response_1": "b", "response_2": "c", "preferred": 0}
        with pytest.raises(InputError, match="no format fits"):
            read(row)

    @pytest.mark.parametrize("said", ["tie", "tie (bothbad)", "both", None, ""])
    def test_ties_are_left_out_and_counted(self, said):
        row = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"}
        rows = rows_from_records([{**row, "winner": said}, row])
        assert list(rows.preferences) == [
            Preference(PAIR.prompt, PAIR.chosen, PAIR.rejected, "dataset:row 2")
        ]
        assert rows.ties == ["dataset:row 1"]
        assert not rows.malformed
        assert any("1 rows are left out as ties" in note for note in row_notes(rows))
        with pytest.raises(InputError, match="all of its 2 rows are ties"):
            rows_from_records([{**row, "winner": said}] * 2)

    def test_a_winner_that_a_mapping_passes_over_is_refused(self):
        row = {"prompt": "q", "response_a": "a", "response_b": "b", "pick": "b"}
        mapping = {"chosen": "response_a", "rejected": "response_b"}
        with pytest.raises(MalformedRow, match="preferred: pick") as refused:
            read(row, **mapping)
        assert "'pick' is 'b', which says which of 'response_a' and 'response_b' is better" in str(
            refused.value
        )
        assert read(row, **mapping, pick=None) == PAIR
        with pytest.raises(MalformedRow, match="'preferred'"):
            read({"prompt": "q", "response_a": "a", "response_b": "b", "preferred": 1}, **mapping)

    def test_a_word_in_another_column_is_no_winner_where_names_have_nothing_in_common(self):
        row = {"prompt": "q", "good": "a", "bad": "b", "quality": "good"}
        assert read(row, chosen="good", rejected="bad") == PAIR

    def test_a_second_verdict_is_refused(self):
        row = {
            "prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1,
        }  # fmt: skip
        with pytest.raises(MalformedRow, match="safer_response_id"):
            read(row)
