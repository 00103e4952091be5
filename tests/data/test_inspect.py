"""The report counts what is there, and the shown rows mark exactly the trained tokens."""

import io
import re

import pytest

from slimepo.data.chat import chat_format, load_tokenizer
from slimepo.data.inspect import DropCount, check, print_report, show_rows
from slimepo.data.read import read_rows, rows_from_records
from slimepo.terminal import make_console


def printed(show, **options):
    console = make_console(file=io.StringIO(), width=160, **options)
    show(console)
    return console.file.getvalue()


RECORDS = [
    {"prompt": "a", "chosen": "yes", "rejected": "no"},
    {"prompt": "a", "chosen": "yes", "rejected": "no"},
    {"prompt": "a", "chosen": "[b]yes", "rejected": "never"},
    {"prompt": "b", "chosen": "same", "rejected": "same"},
    {"prompt": "c", "chosen": "", "rejected": "no"},
    {"prompt": "d", "chosen": None, "rejected": "no"},
]


@pytest.fixture
def rows():
    return rows_from_records(RECORDS, name="f", skip_bad_rows=True)


@pytest.fixture
def chat(tokenizer):
    return chat_format(tokenizer)


def test_everything_is_counted(rows, chat):
    report, pairs = check(rows, chat, name="f", fractions={"all": 1.0})
    assert (report.rows, report.kept, len(pairs)) == (6, 3, 3)
    assert report.drops == {
        "empty response": DropCount(1, "f:row 5", "'chosen' has no text"),
        "identical responses": DropCount(1, "f:row 4", "'chosen' and 'rejected' are the same tokens"),
        "malformed row": DropCount(1, "f:row 6", "'chosen' is null"),
    }
    assert (report.duplicate_rows, report.duplicate_prompts) == (1, 2)
    # Of what is kept, as what is dropped trains nothing.
    assert report.parts == {"all": 3}
    # Characters and one end token each: yes, no; yes, no; [b]yes, never.
    assert report.trained_tokens == (4 + 3) * 2 + (7 + 6)
    chosen = report.lengths["chosen"]
    assert (chosen.total, chosen.percentiles[0], chosen.percentiles[50], chosen.percentiles[100]) == (
        15,
        4,
        4,
        7,
    )
    assert sum(chosen.histogram) == 3


def test_ties_and_rows_without_a_verdict_are_two_reasons(chat):
    row = {"prompt": "q", "response_a": "x", "response_b": "y"}
    rows = rows_from_records([{**row, "winner": said} for said in ("a", "tie", "", None)], name="f")
    report, _ = check(rows, chat)
    assert report.drops == {
        "tie": DropCount(1, "f:row 2", "neither answer is preferred"),
        "no verdict": DropCount(2, "f:row 3", "nothing says which answer is better"),
    }


def test_what_is_there_once_is_said_in_the_singular(chat):
    scored = {"score_chosen": 1, "score_rejected": 2}
    pairs = [
        {"prompt": "Human: a", "chosen": "x", "rejected": "y", **scored},
        {"prompt": "Human: a", "chosen": "y", "rejected": "x"},
    ]
    judged = rows_from_records([{"prompt": "q", "completion": "a", "label": 1}], name="f")
    reports = [check(rows, chat)[0] for rows in (rows_from_records(pairs, name="f"), judged)]
    said = [note for report in reports for note in report.notes]
    assert len(said) >= 4
    assert not [note for note in said if re.search(r"\b1 \w+s\b|\b1 judged answers", note)]


def test_judged_answers_are_reported_as_responses(chat):
    rows = rows_from_records([{"prompt": "a", "completion": "b", "label": True}])
    report, _ = check(rows, chat)
    assert list(report.lengths) == ["prompt", "response"]


def test_the_printed_report_names_counts_drops_lengths_and_notes(rows, make_tokenizer):
    report, _ = check(rows, chat_format(make_tokenizer(None)), name="my [file]")
    text = printed(lambda console: print_report(report, console))
    for part in (
        "my [file]",
        "duplicate prompts",
        "SFT first, split: sft",
        "empty response",
        "f:row 5",
        "median",
        "#",
    ):
        assert part in text
    assert "note: there is no chat template" in text


def test_shown_rows_put_the_trained_tokens_between_brackets_where_there_is_no_colour(rows, chat):
    _, pairs = check(rows, chat)
    text = printed(lambda console: show_rows(pairs[2:], chat, 1, console))
    assert "<s>user: a<end>\nassistant: ⟦[b]yes<end>⟧\n" in text
    assert "⟦never<end>⟧" in text
    assert text.count("⟦") == 2


def test_shown_rows_are_coloured_where_there_is_colour(rows, chat):
    _, pairs = check(rows, chat)
    options = {"force_terminal": True, "color_system": "standard", "no_color": False}
    text = printed(lambda console: show_rows(pairs, chat, 1, console), **options)
    assert "\x1b[32myes\x1b[0m" in text
    assert "⟦" not in text


def test_the_real_file_reports_its_known_faults(official_data):
    rows = read_rows(official_data / "preferences" / "ultrafeedback_train.jsonl.gz")
    chat = chat_format(load_tokenizer(official_data / "tokenizers" / "llama-3.2"))
    report, _ = check(rows, chat)
    assert (report.rows, report.kept, report.duplicate_prompts) == (1000, 994, 0)
    assert {reason: drop.count for reason, drop in report.drops.items()} == {
        "empty response": 2,
        "identical responses": 4,
    }
    assert sum(report.parts.values()) == report.kept
