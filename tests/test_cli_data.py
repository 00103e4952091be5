"""`slimepo data ...` from outside: instructions that are made, and what they have in common with others."""

from pathlib import Path

from slimepo.evaluation.rows import read_rows
from tests.command import slimepo


def test_instructions_and_their_overlap(tmp_path: Path, data_dir: Path) -> None:
    made = slimepo("data", "instructions", tmp_path, "--train", 40, "--heldout", 36)
    assert (made.returncode, made.stderr) == (0, "")
    assert "40 and 36 instructions" in made.stdout
    assert len(read_rows(tmp_path / "train.jsonl")) == 40
    beside = slimepo("data", "overlap", tmp_path / "train.jsonl", "ifeval", "--data-dir", data_dir)
    assert beside.stdout.splitlines()[:2] == [
        "40 prompts beside 4 of ifeval: 0 are the same",
        "5 words in a row that stand there too: 0 prompts, 0 different runs",
    ]
    itself = slimepo("data", "overlap", tmp_path / "train.jsonl", tmp_path / "train.jsonl")
    assert "40 are the same" in itself.stdout


def test_a_benchmark_or_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Name a bird.\n")
    result = slimepo("data", "overlap", tmp_path / "a.txt", "ifevil")
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (2, 1)
    assert "ifevil: cannot be read" in result.stderr
