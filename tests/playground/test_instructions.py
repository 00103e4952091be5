"""Instructions for training: a function of the seed, about topics of their own, and unlike a benchmark's prompts."""

import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from slimepo.data.overlap import overlap
from slimepo.errors import InputError
from slimepo.evaluation.rows import read_rows
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.tasks import load_tasks
from slimepo.playground.constraints import KINDS
from slimepo.playground.instructions import TEXTS, Texts, clash, draw, make_instructions, write_instructions
from slimepo.settings import read_mapping, validate

TEXT = validate(Texts, read_mapping(TEXTS, "instructions"), "test")


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_instructions(tmp_path / name, train=80, heldout=40, seed=seed)
    contents = {
        name: [(tmp_path / name / f"{part}.jsonl").read_bytes() for part in ("train", "heldout")]
        for name in "abc"
    }
    assert contents["a"] == contents["b"]
    assert contents["a"][0] != contents["c"][0]
    assert contents["a"][1] != contents["c"][1]


def test_rows_are_tasks_of_all_kinds_and_a_third_have_two_constraints(tmp_path: Path) -> None:
    train, heldout = write_instructions(tmp_path, train=720, heldout=108, seed=0)
    tasks: dict[str, Any] = {"train": str(train), "heldout": str(heldout)}
    tasks["checker"] = "slimepo.playground.constraints:check"
    recipe = make_recipe({"model": "m", "tasks": tasks, "stages": [{"loss": "grpo", "rollouts": {}}]})
    loaded = load_tasks(recipe)
    assert loaded is not None
    assert (len(loaded.train), len(loaded.heldout)) == (720, 108)
    rows = [task.row for task in loaded.train]
    first = Counter(row["constraints"][0]["kind"] for row in rows)
    assert first == dict.fromkeys(KINDS, 20)
    alone = sum(kind.alone for kind in KINDS.values())
    two = sum(len(row["constraints"]) == 2 for row in rows)
    assert two == pytest.approx(20 * (len(KINDS) - alone) / 3, abs=40)
    assert max(len(row["constraints"]) for row in rows) == 2
    assert {task.family for task in loaded.train} == {kind.group for kind in KINDS.values()}
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == 720
    # Every slot is filled, and what is in curly brackets is meant to be.
    assert {slot for prompt in prompts for slot in re.findall(r"{.*?}", prompt)} == {
        "{name}",
        "{date}",
        "{place}",
    }


def test_no_topic_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    files = write_instructions(tmp_path, train=300, heldout=300, seed=3)
    topics = [{row["topic"] for row in read_rows(file) if "topic" in row} for file in files]
    assert topics[0]
    assert topics[1]
    assert not topics[0] & topics[1]


def test_what_cannot_both_be_done_is_not_asked_together() -> None:
    assert clash({"kind": "lower_case"}, {"kind": "upper_case"})
    assert clash({"kind": "no_letter", "letter": "q"}, {"kind": "with_words", "wanted": ["quiet"]})
    assert clash({"kind": "opening", "phrase": "Good news"}, {"kind": "without_words", "wanted": ["good"]})
    assert clash({"kind": "numbered_exactly", "count": 2}, {"kind": "no_digits"})
    assert not clash({"kind": "no_letter", "letter": "z"}, {"kind": "with_words", "wanted": ["quiet"]})
    # A letter that the topic needs is not forbidden.
    rows = [draw(KINDS["no_letter"], TEXT, ["kayaks"], Random(seed)) for seed in range(20)]
    assert not {"k", "y"} & {row["constraints"][0]["letter"] for row in rows}


def test_every_kind_can_be_asked_for_in_several_ways() -> None:
    assert list(TEXT.wordings) == list(KINDS)
    assert min(len(ways) for ways in TEXT.wordings.values()) >= 3


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="there are no 5000 different instructions"):
        make_instructions(5000, "s", TEXT.model_copy(update={"requests": ["On {topic}."]}), ["kites"])


def test_nothing_of_ifeval_is_in_them(official_data: Path, tmp_path: Path) -> None:
    theirs = [row["prompt"] for row in read_rows(official_data / "eval" / "ifeval" / "input_data.jsonl")]
    files = write_instructions(tmp_path, train=2000, heldout=400, seed=0)
    ours = [row["prompt"] for file in files for row in read_rows(file)]
    # Every request and wording too, whether it was drawn or not.
    ours += [text for ways in (TEXT.requests, TEXT.choices, *TEXT.wordings.values()) for text in ways]
    found = overlap(ours, theirs)
    assert (found.same, found.shared) == (0, {5: (0, 0), 8: (0, 0), 13: (0, 0)})
