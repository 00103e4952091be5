"""Rows come from files, folders and datasets; whatever is wrong is one line with the place and the way out."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slimepo.data.read import read_rows, rows_from_records
from slimepo.errors import InputError
from slimepo.types import Preference

ROWS = [{"prompt": f"p{i}", "chosen": f"good {i}\nline", "rejected": 'say "no", é'} for i in range(3)]
RECORDS = [
    Preference(
        [{"role": "user", "content": row["prompt"]}],
        [{"role": "assistant", "content": row["chosen"]}],
        [{"role": "assistant", "content": row["rejected"]}],
    )
    for row in ROWS
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_csv(path, rows, **options):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], **options)
        writer.writeheader()
        writer.writerows(rows)


def error(source, **options):
    with pytest.raises(InputError) as caught:
        read_rows(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WRITERS = {
    ".jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    ".json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    ".data.json": lambda path: path.write_text(json.dumps({"data": ROWS}), encoding="utf-8"),
    ".lines.json": lambda path: path.write_text(LINES, encoding="utf-8"),
    ".parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    ".csv": lambda path: write_csv(path, ROWS),
    ".semicolons.csv": lambda path: write_csv(path, ROWS, delimiter=";"),
    ".tabs.csv": lambda path: write_csv(path, ROWS, delimiter="\t"),
    ".tsv": lambda path: write_csv(path, ROWS, delimiter="\t"),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(kind, zipped, tmp_path):
    path = tmp_path / f"rows{kind}"
    WRITERS[kind](path)
    if zipped:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    rows = read_rows(path)
    assert rows.preferences == RECORDS
    assert (rows.format, rows.unpaired, rows.malformed) == ("explicit", [], [])
    assert [row.source for row in rows.preferences] == [
        f"{path}:{i}" if kind in (".jsonl", ".lines.json") else f"{path}:row {i}" for i in (1, 2, 3)
    ]


def test_byte_order_mark_and_windows_line_ends_are_tolerated(tmp_path):
    for name, text in (
        ("a.jsonl", LINES),
        ("b.json", json.dumps(ROWS)),
        ("c.csv", "prompt,chosen,rejected\na,b,c\n"),
    ):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert read_rows(path).malformed == []


def test_places_are_physical_lines_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + LINES.replace("\n", "\n\n"))
    assert [row.source for row in read_rows(path).preferences] == [f"{path}:{i}" for i in (2, 4, 6)]


def test_csv_cells_with_messages_are_parsed_and_other_json_stays_text(tmp_path):
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "[1, 2]"}]
    write_csv(tmp_path / "a.csv", [{"chosen": json.dumps(turns), "rejected": json.dumps(turns)}])
    assert read_rows(tmp_path / "a.csv").preferences[0].chosen == turns[1:]
    write_csv(tmp_path / "b.csv", [{"prompt": "p", "chosen": "[1, 2]", "rejected": '{"a": 1}'}])
    assert read_rows(tmp_path / "b.csv").preferences[0].rejected[0]["content"] == '{"a": 1}'


def test_a_csv_cell_may_be_long(tmp_path):
    write_csv(tmp_path / "a.csv", [{"prompt": "p", "chosen": "x" * 300_000, "rejected": "y"}])
    assert len(read_rows(tmp_path / "a.csv").preferences[0].chosen[0]["content"]) == 300_000


BAD_LINES = {
    "[1, 2]": "a row must be a JSON object with named columns, not a list",
    '{"prompt": ': "not valid JSON: Expecting value at column 12",
    '{"prompt": "p", "chosen": null, "rejected": "b"}': "'chosen' is null",
    '{"prompt": "p"}': "no 'chosen' (columns: prompt)",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_a_malformed_row_stops_with_file_line_and_reason(line, reason, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINES}{line}\n{LINES}")
    assert (
        error(path) == f"{path}:4: {reason} (to go on without it: --skip-bad-rows of data check, "
        "data.skip_bad_rows=true of a recipe)"
    )
    rows = read_rows(path, skip_bad_rows=True)
    assert rows.malformed == [(f"{path}:4", reason)]
    assert rows.preferences == RECORDS + RECORDS


def test_a_bad_first_row_does_not_hide_the_format(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": null}\n' + LINES)
    assert error(path).startswith(f"{path}:1: 'rejected' is null")
    assert read_rows(path, skip_bad_rows=True).preferences == RECORDS


def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode() + b'{"prompt": "\xff"}\n')
    assert read_rows(path, skip_bad_rows=True).malformed == [
        (f"{path}:4", "not UTF-8 text (byte 13 of the line)")
    ]


def test_csv_rows_of_the_wrong_width_are_bad_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\na,b\na,b,c,d\na,\"[{'role': 'assistant'}]\",c\n")
    assert read_rows(path, skip_bad_rows=True).malformed == [
        (f"{path}:row 2", "fewer cells than the header has names"),
        (f"{path}:row 3", "1 more cells than the header has names"),
        (
            f"{path}:row 4",
            "'chosen' holds messages as Python writes them; write them as JSON (double quotes)",
        ),
    ]


def test_a_header_with_commas_and_another_mark_is_told_what_it_looks_separated_by(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt;chosen, the better;rejected\na;b;c,d,e\n")
    assert "looks separated by ';': save it with commas" in error(path)
    tabs = tmp_path / "rows.tsv"
    tabs.write_text("prompt, the\tone\nq\tr\n")
    assert "(one, prompt, the)" in error(tabs)
    path.write_text("prompt;one\nq;r\n")
    assert "(one, prompt)" in error(path)


def test_an_object_with_many_keys_does_not_list_them_all(tmp_path):
    rows = {f"key_{at:02}": {"text": "x"} for at in range(60)}
    (tmp_path / "keys.json").write_text(json.dumps(rows))
    assert error(tmp_path / "keys.json").endswith("key_06, key_07, and 52 more")
    (tmp_path / "table.json").write_text(json.dumps({key: ["x", "y"] for key in rows}))
    assert "key_07, and 52 more); write a list" in error(tmp_path / "table.json")


@pytest.mark.parametrize("kind", ["txt", "xlsx"])
def test_another_kind_of_file_is_told_what_to_save_it_as(kind, tmp_path):
    (tmp_path / f"rows.{kind}").write_text("hello")
    assert "save a table as .csv, and JSON objects, one a line, as .jsonl" in error(tmp_path / f"rows.{kind}")


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    whole = gzip.compress(LINES.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz is a damaged or incomplete gzip file" in error(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.jsonl.gz").write_text("not gzip")
    assert "damaged or incomplete" in error(tmp_path / "no.jsonl.gz", skip_bad_rows=True)
    (tmp_path / "bad.parquet").write_text("not parquet")
    assert "not a readable Parquet file" in error(tmp_path / "bad.parquet")
    (tmp_path / "cut.json").write_text('[{"prompt": "p"},')
    assert "cut.json:1: not valid JSON" in error(tmp_path / "cut.json")
    (tmp_path / "keys.json").write_text('{"rows": []}')
    assert 'must hold a list of rows or {"data": [rows]}' in error(tmp_path / "keys.json")
    (tmp_path / "empty.jsonl").touch()
    assert error(tmp_path / "empty.jsonl") == f"{tmp_path / 'empty.jsonl'} is empty"
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert "holds no rows" in error(tmp_path / "blank.jsonl")
    (tmp_path / "notes.txt").write_text("hello")
    assert "known are .jsonl, .json, .parquet, .csv" in error(tmp_path / "notes.txt")
    (tmp_path / "unknown.csv").write_text("question,answer\na,b\n")
    assert "no format fits the columns found (answer, question)" in error(tmp_path / "unknown.csv")


def test_a_file_without_one_good_row_is_an_error_even_when_bad_rows_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "chosen": 1, "rejected": "b"}\n')
    assert "none of its rows can be used; the first of 1, " in error(path, skip_bad_rows=True)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "preferences.jsonl").write_text(LINES)
    assert error(tmp_path / "preference.jsonl").endswith(" (did you mean 'preferences.jsonl'?)")
    assert "there is no folder" in error(tmp_path / "nowhere" / "x.jsonl")


def test_limit_counts_rows_and_the_format_can_be_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES)
    assert read_rows(path, limit=2).preferences == RECORDS[:2]
    assert read_rows(path, format="explicit").preferences == RECORDS
    assert "no 'completion'" in error(path, format="kto")
    assert "did you mean 'explicit'" in error(path, format="explict")


def test_a_folder_of_files_is_read_split_by_split(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000.jsonl").write_text(LINES)
    (tmp_path / "data" / "train-00001.jsonl").write_text(LINES)
    (tmp_path / "data" / "test-00000.jsonl").write_text(LINES)
    (tmp_path / "README.md").write_text("about")
    assert read_rows(tmp_path).preferences == RECORDS + RECORDS
    assert read_rows(tmp_path, split="test").preferences == RECORDS
    assert "there are test, train" in error(tmp_path, split="validation")
    assert "has no splits" in error(tmp_path / "data" / "test-00000.jsonl", split="test")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no data" in error(empty)


def test_splits_of_a_folder_have_the_names_that_datasets_gives_them(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train_prefs", "train_sft", "test_prefs"):
        (tmp_path / "data" / f"{name}-00000-of-00001.jsonl").write_text(LINES)
    assert read_rows(tmp_path, split="train_prefs").preferences == RECORDS
    for split in (None, "train"):
        assert "there are test_prefs, train_prefs, train_sft (choose one with split)" in error(
            tmp_path, split=split
        )
    (tmp_path / "data" / "train_sft-00000-of-00001.jsonl").unlink()
    assert read_rows(tmp_path).preferences == RECORDS


@pytest.mark.parametrize(
    "names", [("train_prefs", "train_sft"), ("helpful/train", "harmless/train"), ("one", "two")]
)
def test_files_that_are_no_shards_of_one_table_are_not_read_as_one_unasked(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        for shard in ("00", "01"):
            (tmp_path / f"{name}-{shard}.jsonl").write_text(LINES)
    assert "several files that are no shards of one: " + ", ".join(sorted(names)) in error(tmp_path)
    assert len(read_rows(tmp_path, split=names[0]).preferences) == 2 * len(RECORDS)
    assert len(read_rows(tmp_path, split="train").preferences) == 4 * len(RECORDS)


def test_a_file_that_is_in_no_split_is_not_passed_over(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(LINES)
    (tmp_path / "test.jsonl").write_text(LINES)
    assert "holds pairs.jsonl, which is in no split as datasets names them (test)" in error(tmp_path)
    assert read_rows(tmp_path, split="test").preferences == RECORDS


def test_a_folders_card_names_its_splits_and_several_data_sets_are_not_mixed(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text(LINES)
    card = "---\nconfigs:\n- config_name: one\n  data_files: {}\n{}---\n"
    splits = "[{split: good, path: a.jsonl}, {split: other, path: b.jsonl}]"
    (tmp_path / "README.md").write_text(card.format(splits, ""))
    assert read_rows(tmp_path, split="good").preferences == RECORDS
    (tmp_path / "README.md").write_text(card.format("a.jsonl", "- config_name: two\n  data_files: b.jsonl\n"))
    assert "Config name is missing.; give one of its files" in error(tmp_path)


def test_columns_are_named_where_the_file_names_them_otherwise(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"ask": r["prompt"], **r, "prompt": "?", "label": 1}) + "\n" for r in ROWS)
    )
    assert read_rows(path, columns={"prompt": "ask", "label": None}).preferences == RECORDS
    assert "no 'asked' (columns: ask, " in error(path, columns={"prompt": "asked"})


def test_one_json_value_over_a_whole_file_is_said_in_clear_words(tmp_path):
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    conversation = {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}
    conversation["rejected"] = [conversation["chosen"][0], {"role": "assistant", "content": "b"}]
    for name, content, message in (
        ("list.jsonl", ROWS, "begins one JSON list over the whole file"),
        ("columns.json", columns, "is a table by columns (chosen, prompt, rejected)"),
        ("columns.jsonl", columns, "a table by columns?"),
        (
            "pandas.json",
            {key: dict(enumerate(cells)) for key, cells in columns.items()},
            "is a table by columns",
        ),
        ("value.json", {"value": ROWS}, "the rows are under 'value': write that list alone"),
        ("splits.json", {"train": ROWS, "test": ROWS}, "it holds one object with the keys test, train"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert message in error(tmp_path / name)
    (tmp_path / "pretty.jsonl").write_text(json.dumps(ROWS, indent=1))
    assert "name it .json" in error(tmp_path / "pretty.jsonl")
    (tmp_path / "one.json").write_text(json.dumps(conversation))
    assert len(read_rows(tmp_path / "one.json").preferences) == 1


def test_a_saved_dataset_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train_prefs": data, "test_prefs": data.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert read_rows(tmp_path / "one").preferences == RECORDS
    assert read_rows(tmp_path / "two").preferences == RECORDS
    assert read_rows(tmp_path / "two", split="test_prefs").preferences == RECORDS[:1]
    assert read_rows(tmp_path / "one").preferences[1].source == f"{tmp_path / 'one'}:row 2"
    assert "there are test_prefs, train_prefs" in error(tmp_path / "two", split="dev")


def test_a_hub_id_that_cannot_be_loaded_is_one_line():
    message = error("nobody/no-such-dataset")
    assert message.startswith(
        "'nobody/no-such-dataset' is no file or folder here, and the Hub does not give it: "
    )


def test_rows_in_memory_are_read_like_a_file():
    rows = rows_from_records(ROWS, name="train_dataset")
    assert rows.preferences == RECORDS
    assert rows.preferences[0].source == "train_dataset:row 1"


def test_the_real_files_are_read_whole(official_data):
    found = {}
    for path in sorted((official_data / "preferences").glob("*.gz")):
        rows = read_rows(path)
        assert rows.malformed == []
        found[path.name] = (rows.format, len(rows.preferences), len(rows.unpaired))
    assert found == {
        "llamafactory_dpo_en_demo.json.gz": ("sharegpt", 300, 0),
        "llamafactory_kto_en_demo.json.gz": ("kto", 0, 300),
        "ultrafeedback_eval.jsonl.gz": ("explicit", 200, 0),
        "ultrafeedback_train.jsonl.gz": ("explicit", 1000, 0),
    }
