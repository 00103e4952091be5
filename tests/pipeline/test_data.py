"""What a run reads before a model is loaded."""

import json
from pathlib import Path

import pytest

from slimepo.pipeline.data import leaks, load_data
from slimepo.pipeline.recipe.read import load_recipe


@pytest.mark.parametrize("parts", [None, "{preference: 0.5, heldout: 0.5}"])
def test_a_file_of_which_nothing_is_held_out_is_told(tmp_path: Path, parts: str | None) -> None:
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": "no"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: a/model\ndata: {{path: {tmp_path}/pairs.jsonl}}\nstages: [{{loss: slime}}]\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"data.parts={parts}"] if parts else [])
    held_out, facts = load_data(recipe)
    told = any(note.startswith("none of the 8 rows is held out") for note in facts.get("heldout_notes", ()))
    assert told == (not held_out["heldout"]) == (parts is None)


def test_rows_left_out_of_a_file_of_its_own_for_what_is_held_out_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "a": "yes", "b": "no", "preferred": "a"} for i in range(8)]
    rows[3]["preferred"] = rows[4]["preferred"] = "tie"
    for name, of in (
        ("pairs", rows),
        ("heldout", [*rows, {"prompt": "q", "a": 1, "b": "no", "preferred": "a"}]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    columns = "columns: {response_a: a, response_b: b}"
    (tmp_path / "recipe.yaml").write_text(
        f"model: a/model\ndata: {{path: {tmp_path}/pairs.jsonl, heldout: {tmp_path}/heldout.jsonl, {columns}, "
        "skip_bad_rows: true}\nstages: [{loss: slime}]\n"
    )
    _, facts = load_data(load_recipe(tmp_path / "recipe.yaml"))
    assert (facts["ties"], facts["malformed"]) == (2, 0)
    assert facts["heldout_notes"] == [
        "held out: 2 ties left out, in which neither answer is preferred",
        "held out: 1 malformed row skipped",
    ]


def test_held_out_prompts_that_are_trained_on_too_are_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": "no"} for i in range(8)]
    asked = [{**rows[2], "prompt": "add 2 and 2"}, {**rows[0], "prompt": "Add 0 and 3."}]
    for name, of in {"pairs": rows, "heldout": asked}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    (tmp_path / "recipe.yaml").write_text(
        f"model: a/model\ndata: {{path: {tmp_path}/pairs.jsonl, heldout: {tmp_path}/heldout.jsonl}}\n"
        "stages: [{loss: slime}]\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    parts, _ = load_data(recipe)
    (note,) = leaks(recipe, parts, None)
    assert note.startswith("1 of 2 held-out rows has a prompt that is trained on too")
    assert note.endswith("heldout.jsonl:1")
    assert not list(leaks(recipe, {**parts, "heldout": parts["heldout"][1:]}, None))
