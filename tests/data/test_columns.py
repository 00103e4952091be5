"""Every column of a row is read, read under another name, refused by name, or said to be unread."""

import json
from typing import ClassVar

import pytest

from slimepo.data.chat import chat_format
from slimepo.data.columns import columns_from, renamed
from slimepo.data.formats import convert, recognise
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
        with pytest.raises(InputError, match=r"no format fits .*data\.columns=\{prompt: THEIRS, "):
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
        "rows that score their rejected answer higher than the chosen one: 1; the first, f:row 2"
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
    assert "every judged answer (3) is undesirable" in next(row_notes(rows))
    pairs = [
        {"prompt": "q", **ANSWERS},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "r", **ANSWERS},
    ]
    (note,) = row_notes(rows_from_records(pairs, name="f"))
    assert note.startswith(
        "pairs that stand there the other way round too (A preferred to B, and B to A): 1;"
    )
    assert note.endswith("f:row 2")


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": [user("q"), assistant("a")], "prompt": "p", "output": "b"}, {"prompt", "output"}),
        # What only repeats a turn is nothing new.
        ({"messages": [user("q"), assistant("a")], "prompt": "q", "output": "b"}, {"output"}),
        # Under the names of the file.
        ({"messages": [user("q"), assistant("a")], "question": "p"}, {"question"}),
        ({"messages": [user("q"), assistant("a")], "input": "p"}, {"input"}),
        ({"instruction": "q", "output": "a", "prompt": "before"}, {"prompt"}),
        (
            {"prompt": "q", "completion": "a", "input": "a text", "messages": [user("q")]},
            {"input", "messages"},
        ),
        ({"completion": [user("q"), assistant("a")], "instruction": "Be kind."}, {"instruction"}),
        ({"instruction": "q", "chosen": "a", "rejected": "b", "output": "c"}, {"output"}),
        ({"conversations": [user("q")], "chosen": "a", "rejected": "b", "messages": "m"}, {"messages"}),
    ],
)
def test_columns_of_another_layout_are_said_to_be_unread(row, unread):
    assert rows_from_records([row]).unread == dict.fromkeys(unread, 1)


@pytest.mark.parametrize("label", [{}, {"label": True}])
def test_earlier_turns_beside_a_prompt_and_its_answer_are_refused(label):
    row = {"prompt": "And then?", "completion": "a", "history": [["Hello", "Hi"]]}
    with pytest.raises(InputError, match="'history' is not empty: it holds earlier turns"):
        rows_from_records([row | label])


def test_no_format_fits_is_one_short_line_with_the_columns_the_nearest_forms_and_the_guide():
    for row in (
        {"ask": "q", "good": "a", "bad": "b"},
        {f"key_{at:02}_of_many": "x" for at in range(60)},
    ):
        with pytest.raises(InputError) as caught:
            rows_from_records([row], name="f")
        said = str(caught.value)
        assert len(said) <= 500
        assert "prompt, chosen, rejected" in said
        assert "prompt, response_a, response_b, preferred" in said
        assert "docs/guide.md#data-formats" in said
    assert "(key_00_of_many, key_01_of_many, " in said
    assert "and 52 more" in said


def test_a_missing_column_of_a_wide_row_does_not_list_them_all():
    row = {f"key_{at:02}": "x" for at in range(60)}
    with pytest.raises(MalformedRow, match=r"no 'ask' \(columns: key_00, key_01, .*, and 52 more\)"):
        renamed(row, {"prompt": "ask"})


def test_a_mapping_the_wrong_way_round_is_told_which_side_is_ours():
    row = {"question": "q", **ANSWERS}
    with pytest.raises(
        MalformedRow, match=r"no 'prompt' \(columns: .*\); ours comes first: did you mean prompt=question\?"
    ):
        renamed({"ask": "q", "question": "q", **ANSWERS}, {"question": "prompt"})
    with pytest.raises(
        InputError, match=r"'null=question': it is OURS=THEIRS.* question= leaves the column out"
    ):
        columns_from(["null=question"])
    assert columns_from(["prompt=question", "label=", "Ticket ID=null", "a=b=c"]) == {
        "prompt": "question", "label": None, "Ticket ID": None, "a": "b=c",
    }  # fmt: skip
    with pytest.raises(InputError, match="--column 'prompt' is not OURS=THEIRS"):
        columns_from(["prompt"])
    assert renamed(row, columns_from(["question=null"])) == ANSWERS


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

    @pytest.mark.parametrize("said", ["tie", "Tie (bothbad)", "both", "both_bad", "a tie", "no preference"])
    def test_ties_are_left_out_and_counted(self, said):
        row = {**self.SIDES, "winner": "a"}
        rows = rows_from_records([{**row, "winner": said}] * 120 + [row])
        assert list(rows.preferences) == [
            Preference(PAIR.prompt, PAIR.chosen, PAIR.rejected, "dataset:row 121")
        ]
        assert (len(rows.ties), rows.ties[0], rows.malformed) == (120, "dataset:row 1", [])
        with pytest.raises(InputError, match="no row prefers an answer: 2 ties"):
            rows_from_records([{**row, "winner": said}] * 2)

    def test_ties_say_what_format_the_others_have(self):
        row = {"conversation_a": [user("q"), assistant("a")], "conversation_b": [user("q"), assistant("b")]}
        rows = rows_from_records([{**row, "winner": "tie"}] * 101 + [{**row, "winner": "a"}])
        assert (rows.format, len(rows.preferences)) == ("implicit", 1)

    @pytest.mark.parametrize("said", [None, "", " "])
    def test_a_blank_verdict_is_left_out_and_counted_apart_from_ties(self, said):
        row = {**self.SIDES, "winner": "a"}
        rows = rows_from_records([{**row, "winner": said}, {**row, "winner": "tie"}, row])
        assert (len(rows.preferences), rows.ties, rows.without_verdict) == (
            1, ["dataset:row 2"], ["dataset:row 1"],
        )  # fmt: skip
        with pytest.raises(InputError, match="no row prefers an answer: 1 tie, 1 without a verdict"):
            rows_from_records([{**row, "winner": said}, {**row, "winner": "tie"}])

    def test_a_mapped_verdict_that_is_not_there_is_no_verdict_too(self):
        row = {"prompt": "q", "answer": "x", "answer_2": "y"}
        mapping = {"response_a": "answer", "response_b": "answer_2", "preferred": "pick"}
        for nothing in ("", None):
            with pytest.raises(Tie) as caught:
                read({**row, "pick": nothing}, **mapping)
            assert caught.value.blank

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
        read_in = read_all(response_a=first, response_b=second, preferred="pick")
        assert (len(read_in.ties), len(read_in.without_verdict)) == (1, 1)

    def test_a_column_with_other_values_is_no_winner(self):
        rows = [{"prompt": "q", "answer_1": "a", "answer_2": "b", "id": str(at)} for at in range(4)]
        placed = ((str(at), row) for at, row in enumerate(rows))
        mapping = {"chosen": "answer_1", "rejected": "answer_2"}
        read_in = rows_from(placed, name="f", format="auto", skip_bad_rows=False, columns=mapping)
        assert len(read_in.preferences) == 4

    def test_two_sides_without_a_verdict_are_told_how(self):
        with pytest.raises(
            InputError,
            match=r"which of response_a and response_b is better, a column says \(preferred=THEIRS\)",
        ):
            read({**self.SIDES, "verdict": "a"})

    def test_a_second_verdict_is_refused(self):
        row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}
        with pytest.raises(MalformedRow, match="safer_response_id"):
            read({**row, "safer_response_id": 1})

    def test_a_file_of_one_such_object_is_read(self, tmp_path):
        (tmp_path / "one.json").write_text(json.dumps({**self.SIDES, "winner": "b"}))
        assert read_rows(tmp_path / "one.json").preferences[0].chosen == [assistant("b")]


def read_all(rows, **columns):
    placed = ((f"row {at}", row) for at, row in enumerate(rows, 1))
    return rows_from(placed, name="f", format="auto", skip_bad_rows=True, columns=columns)


class TestScoresOfSides:
    """Two answers side by side, and a score of each that says which one is better."""

    @pytest.mark.parametrize(
        ("row", "mapping"),
        [
            ({"question": "q", "answer_1": "b", "answer_2": "a", "score_1": 1, "score_2": 3.5}, {}),
            ({"prompt": "q", "response_a": "b", "response_b": "a", "rating_a": "1", "rating_b": "3.5"}, {}),
            ({"prompt": "q", "response_a": "b", "response_b": "a", "a_score": 1, "b_score": 3.5}, {}),
            ({"prompt": "q", "output1": "b", "output2": "a", "reward1": 1, "reward2": 3.5}, {}),
            ({"prompt": "q", "Answer_A": "b", "Answer_B": "a", "Score-A": 1, "Score-B": 3.5}, {}),
            (
                {"prompt": "q", "answer_0": "b", "answer_1": "a", "answer_0_score": 1, "answer_1_score": 3.5},
                {},
            ),
            ({"prompt": "q", "reply_1": "b", "reply_2": "a", "score_reply_1": 1, "score_reply_2": 3.5}, {}),
            (
                {"prompt": "q", "left": "b", "right": "a", "score_left": 1, "score_right": 3.5},
                {"response_a": "left", "response_b": "right"},
            ),
            (
                {"prompt": "q", "answer": "b", "answer_2": "a", "score": 1, "score_2": 3.5},
                {"response_a": "answer", "response_b": "answer_2"},
            ),
            (
                # The file's own names say whose score it is, whatever these are mapped to.
                {"prompt": "q", "answer_a": "b", "answer_b": "a", "score_a": 1, "score_b": 3.5},
                {"response_a": "answer_b", "response_b": "answer_a"},
            ),
            (
                {"prompt": "q", "text_1": "b", "text_2": "a", "worth_1": 1, "worth_2": 3.5},
                {
                    "response_a": "text_1", "response_b": "text_2",
                    "score_a": "worth_1", "score_b": "worth_2",
                },
            ),
        ],
        ids=[
            "numbers", "text", "letter first", "no mark", "capitals", "behind the side", "before the side", "mapped",
            "no mark on one",
            "mapped crosswise", "mapped scores",
        ],
    )  # fmt: skip
    def test_the_higher_score_is_chosen_and_the_scores_travel(self, row, mapping):
        found = read(row, **mapping)
        assert (found.prompt, found.chosen, found.rejected) == (PAIR.prompt, PAIR.chosen, PAIR.rejected)
        assert found.scores == (3.5, 1.0)

    ROW: ClassVar = {"prompt": "q", "answer_1": "a", "answer_2": "b"}

    def test_equal_scores_are_ties_and_what_is_no_number_is_a_malformed_row(self):
        scores = [(1, 0), (2, 2), (2, None), ("x", 1), (float("nan"), 1), (True, 0), ("", 1), (0, 1)]
        rows = read_all([{**self.ROW, "score_1": one, "score_2": other} for one, other in scores])
        assert [row.source for row in rows.preferences] == ["row 1", "row 8"]
        assert rows.preferences[1].chosen == [assistant("b")]
        assert (rows.ties, rows.scored_against, rows.unread) == (["row 2"], [], {})
        assert [place for place, _ in rows.malformed] == [f"row {at}" for at in (3, 4, 5, 6, 7)]
        assert rows.malformed[0][1] == "'score_2' is null, and should be a number: the score of 'answer_2'"
        assert rows.malformed[1][1] == "'score_1' is 'x', and should be a number: the score of 'answer_1'"

    def test_a_row_that_lacks_one_of_the_scores_is_malformed(self):
        rows = read_all([{**self.ROW, "score_1": 1, "score_2": 0}, {**self.ROW, "score_1": 1}])
        assert rows.malformed == [
            ("row 2", "'score_2' is null, and should be a number: the score of 'answer_2'")
        ]

    def test_a_column_that_names_the_winner_comes_first_and_the_scores_travel(self):
        row = {**self.ROW, "winner": 2, "score_1": 3, "score_2": 1}
        rows = read_all([row, {**row, "score_1": None}])
        assert [row.scores for row in rows.preferences] == [(1.0, 3.0), None]
        assert (rows.scored_against, rows.malformed) == (["row 1"], [])

    def test_two_kinds_of_scores_are_refused_until_one_is_left_out(self):
        row = {**self.ROW, "score_1": 3, "score_2": 1, "reward_1": 0, "reward_2": 1}
        with pytest.raises(
            MalformedRow, match=r"'score_1' and 'reward_1' .*columns: \{score_1: null, score_2: null\}"
        ):
            read(row)
        assert read(row, reward_1=None, reward_2=None).chosen == [assistant("a")]
        assert read(row, score_1=None, score_2=None).chosen == [assistant("b")]

    @pytest.mark.parametrize(
        "sides", [("answer_1", "answer_2"), ("text a", "text b"), ("left", "right")], ids=str
    )
    def test_a_mapping_that_passes_over_the_scores_is_refused_with_the_way_out(self, sides):
        first, second = sides
        marks = [side.removeprefix("answer_").removeprefix("text ") for side in sides]
        scores = [f"score_{mark}" for mark in marks]
        rows = [
            {"prompt": "q", first: "a", second: "b", scores[0]: one, scores[1]: other}
            for one, other in ((2, 1), (1, 2))
        ]
        with pytest.raises(
            InputError,
            match=f"response_a: {first}, response_b: {second}.*{scores[0]}: null, {scores[1]}: null",
        ):
            read_all(rows, chosen=first, rejected=second)
        told = {"chosen": first, "rejected": second}
        assert len(read_all(rows, **told, **dict.fromkeys(scores)).preferences) == 2
        assert len(read_all(rows, response_a=first, response_b=second).preferences) == 2
        travel = read_all(rows, **told, score_chosen=scores[0], score_rejected=scores[1])
        assert travel.scored_against == ["row 2"]

    def test_names_that_say_which_one_is_better_may_be_mapped_where_their_scores_agree(self):
        row = {"prompt": "q", "good": "a", "bad": "b", "score_good": 2, "score_bad": 1}
        assert len(read_all([row], chosen="good", rejected="bad").preferences) == 1

    def test_scores_in_a_table_of_text_are_numbers(self, tmp_path):
        (tmp_path / "a.csv").write_text("question,answer_1,answer_2,score_1,score_2\nq,b,a,1,3.5\n")
        assert read_rows(tmp_path / "a.csv").preferences[0].scores == (3.5, 1.0)
        (tmp_path / "b.csv").write_text("prompt,chosen,rejected,score_chosen,score_rejected\nq,a,b,3.5,1\n")
        assert read_rows(tmp_path / "b.csv").preferences[0].scores == (3.5, 1.0)
