"""Every column of a row is read, read under another name, refused by name, or said to be unread."""

import json
from typing import ClassVar

import pytest

from slimepo.data.chat import chat_format
from slimepo.data.columns import renamed
from slimepo.data.formats import FORMATS, convert, recognise
from slimepo.data.messages import MalformedRow
from slimepo.data.read import read_rows, row_notes, rows_from, rows_from_records
from slimepo.data.tokenize import tokenize
from slimepo.data.winners import Tie
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

    SIDES: ClassVar = {"prompt": "q", "response_a": "a", "response_b": "b"}

    @pytest.mark.parametrize(
        "row",
        [
            {**SIDES, "preferred": "a"},
            {"prompt": "q", "response_a": "b", "response_b": "a", "preferred": "B"},
            {"prompt": "q", "response_a": "b", "response_b": "a", "winner": "response_b"},
            {"prompt": "q", "answer_A": "a", "answer_B": "b", "Winner": "model_a"},
            {"question": "q", "response_0": "b", "response_1": "a", "better_response_id": 1},
            {"prompt": "q", "response_1": "a", "response_2": "b", "preference": 1},
            {"prompt": "q", "response1": "b", "response2": "a", "choice": "2"},
            {"instruction": "q", "output_1": "b", "output_2": "a", "preference": 2.0},
            {**SIDES, "preferred": None, "winner": "a"},
            {**SIDES, "preferred": "a", "other": "b"},
            {
                "conversation_a": [user("q"), assistant("b")],
                "conversation_b": [user("q"), assistant("a")],
                "model_a": "one", "model_b": "two", "winner": "model_b",
            },
        ],
        ids=[
            "letter", "capital", "column", "model", "id", "from one", "no mark", "float", "the filled one", "another",
            "conversations",
        ],
    )  # fmt: skip
    def test_the_better_answer_is_chosen(self, row):
        assert read(row) == PAIR

    @pytest.mark.parametrize("said", ["left_text", "left", "Left"])
    def test_other_names_are_mapped_and_may_say_it(self, said):
        row = {"ask": "q", "left_text": "a", "right_text": "b", "pick": said}
        mapping = {
            "prompt": "ask",
            "response_a": "left_text",
            "response_b": "right_text",
            "preferred": "pick",
        }
        assert read(row, **mapping) == PAIR

    @pytest.mark.parametrize("said", ["answer_b", "b", "model_b"])
    def test_the_files_own_names_say_it_and_not_those_that_they_are_mapped_to(self, said):
        row = {"prompt": "q", "answer_a": "worse", "answer_b": "better", "w": said}
        found = read(row, response_a="answer_b", response_b="answer_a", preferred="w")
        assert (found.chosen, found.rejected) == ([assistant("better")], [assistant("worse")])
        row = {"prompt": "q", "text_1": "b", "text_2": "a", "pick": 2}
        assert read(row, response_0="text_1", response_1="text_2", preferred="pick") == PAIR

    @pytest.mark.parametrize(
        "said",
        [
            1,
            "1",
            0,
            True,
            "first",
            "a or b",
            -1,
            "not a",
            "loser_b",
            "class a",
            "Response A, though both are",
        ],
    )
    def test_what_may_mean_either_is_refused(self, said):
        with pytest.raises(MalformedRow, match="does not say whether 'response_a' or 'response_b' is better"):
            read({**self.SIDES, "preferred": said})

    def test_a_scale_stops_the_file_whatever_is_skipped(self):
        """Its 1 means slightly better, and without its other numbers nobody would see that."""
        row = {"prompt": "q", "response_1": "a", "response_2": "b"}
        rows = [{**row, "preference": 1}, {**row, "preference": -2}]
        with pytest.raises(InputError, match="dataset:row 2: 'preference' is -2, which does not say"):
            rows_from_records(rows, skip_bad_rows=True)

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "q", "response_0": "a", "response_1": "b", "response_2": "c", "winner": 0},
            {"question": "q", "answer_a": "a", "answer_b": "b", "answer_c": "c", "choice": "b"},
            {"prompt": "q", "text_1": "a", "text_2": "b", "label": 1},
        ],
        ids=["three numbers", "multiple choice", "similar texts"],
    )
    def test_what_is_no_comparison_of_two_is_no_pair(self, row):
        with pytest.raises(InputError, match="no format fits"):
            read(row)

    def test_an_answer_that_is_there_is_left_alone(self):
        row = {"prompt": "q", "completion": "a", "label": True, "output_1": "x", "output_2": "y"}
        assert read(row) == Unpaired([user("q")], [assistant("a")], True)

    @pytest.mark.parametrize(
        "said", ["tie", "Tie (bothbad)", "both", "both_bad", "a tie", "no preference", None, ""]
    )
    def test_ties_are_left_out_and_counted(self, said):
        row = {**self.SIDES, "winner": "a"}
        rows = rows_from_records([{**row, "winner": said}] * 120 + [row])
        assert list(rows.preferences) == [
            Preference(PAIR.prompt, PAIR.chosen, PAIR.rejected, "dataset:row 121")
        ]
        assert (len(rows.ties), rows.ties[0], rows.malformed) == (120, "dataset:row 1", [])
        with pytest.raises(InputError, match="all of its 2 rows are ties"):
            rows_from_records([{**row, "winner": said}] * 2)

    def test_ties_say_what_format_the_others_have(self):
        row = {"conversation_a": [user("q"), assistant("a")], "conversation_b": [user("q"), assistant("b")]}
        rows = rows_from_records([{**row, "winner": "tie"}] * 101 + [{**row, "winner": "a"}])
        assert (rows.format, len(rows.preferences)) == ("implicit", 1)

    def test_a_mapped_verdict_that_is_not_there_is_a_tie_too(self):
        row = {"prompt": "q", "answer": "x", "answer_2": "y"}
        mapping = {"response_a": "answer", "response_b": "answer_2", "preferred": "pick"}
        for nothing in ("", None):
            with pytest.raises(Tie):
                read({**row, "pick": nothing}, **mapping)

    def test_a_verdict_may_repeat_the_answer(self):
        row = {"prompt": "q", "response_a": "b", "response_b": "a", "winner": "a"}
        with pytest.raises(MalformedRow, match="names one answer and is the text of the other"):
            read(row)
        row = {"prompt": "q", "response_a": "no it is", "response_b": "a", "winner": "no it is"}
        assert read(row).chosen == [assistant("no it is")]

    def test_a_side_that_is_null_has_its_own_name(self):
        with pytest.raises(MalformedRow, match="'response_b' is null"):
            read({**self.SIDES, "response_b": None, "winner": "a"})

    @pytest.mark.parametrize("ends", ["ab", [1, 2]])
    def test_a_winner_that_a_mapping_passes_over_is_refused(self, ends):
        first, second = (f"answer_{end}" for end in ends)
        rows = [{"prompt": "q", first: "a", second: "b", "pick": pick} for pick in (*ends, "tie", None)]
        mapping = {"chosen": first, "rejected": second}

        def read_all(**columns):
            placed = ((f"row {at}", row) for at, row in enumerate(rows))
            return rows_from(placed, name="f", format="auto", skip_bad_rows=False, columns=columns)

        with pytest.raises(InputError, match=f"response_b: {second}, preferred: pick"):
            read_all(**mapping)
        assert len(read_all(**mapping, pick=None).preferences) == 4
        assert len(read_all(response_a=first, response_b=second, preferred="pick").ties) == 2

    def test_a_column_with_other_values_is_no_winner(self):
        rows = [{"prompt": "q", "answer_1": "a", "answer_2": "b", "id": str(at)} for at in range(4)]
        placed = ((str(at), row) for at, row in enumerate(rows))
        mapping = {"chosen": "answer_1", "rejected": "answer_2"}
        read_in = rows_from(placed, name="f", format="auto", skip_bad_rows=False, columns=mapping)
        assert len(read_in.preferences) == 4

    def test_two_sides_without_a_verdict_are_told_how(self):
        with pytest.raises(
            InputError, match="which of response_a and response_b is better, a column says: --column p"
        ):
            read({**self.SIDES, "verdict": "a"})

    def test_a_second_verdict_is_refused(self):
        row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}
        with pytest.raises(MalformedRow, match="safer_response_id"):
            read({**row, "safer_response_id": 1})

    def test_a_file_of_one_such_object_is_read(self, tmp_path):
        (tmp_path / "one.json").write_text(json.dumps({**self.SIDES, "winner": "b"}))
        assert read_rows(tmp_path / "one.json").preferences[0].chosen == [assistant("b")]
