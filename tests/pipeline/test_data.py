"""What a run reads before a model is loaded."""

import json
from pathlib import Path

import pytest

from slimepo.pipeline.data import load_data
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
    told = any(note.startswith("none of the 8 rows is held out") for note in facts["notes"])
    assert told == (not held_out["heldout"]) == (parts is None)
