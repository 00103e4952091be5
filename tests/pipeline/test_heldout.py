"""What a model says to held-out rows before it trains is kept for all that start from the same weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimepo.files import json_lines
from slimepo.model.score import PairScores
from slimepo.pipeline import heldout
from slimepo.pipeline.run import run_recipe
from slimepo.pipeline.tasks import Said
from slimepo.playground.world import WorldSettings
from slimepo.terminal import make_console
from tests.pipeline.conftest import world_recipe
from tests.pipeline.test_recipe import make_recipe


@pytest.mark.parametrize(
    "scores",
    [
        None,
        PairScores(np.array([-0.1, np.nan]), np.zeros(0), []),
        PairScores(np.array([-0.1, -1 / 3]), np.array([np.nan, -2.0]), [np.zeros(0), np.array([-1.5, -2.5])]),
    ],
    ids=["tasks alone", "demonstrations", "pairs"],
)
def test_what_is_kept_comes_back_to_the_last_bit(scores: PairScores | None, tmp_path: Path) -> None:
    said = [Said("ä\n\ud800", True, 3), Said("", False, 8)]
    heldout._write(tmp_path / "standing.npz", scores, said)
    found = heldout._read(tmp_path / "standing.npz")
    assert found is not None
    assert found[1] == said
    if scores is None:
        assert found[0] is None
        return
    assert found[0] is not None
    np.testing.assert_array_equal(found[0].chosen, scores.chosen)
    np.testing.assert_array_equal(found[0].rejected, scores.rejected)
    assert [list(tokens) for tokens in found[0].rejected_tokens] == [list(t) for t in scores.rejected_tokens]
    assert [path.name for path in tmp_path.iterdir()] == ["standing.npz"]


def test_arms_that_start_from_the_same_weights_are_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = WorldSettings(demonstrations=60, preference_prompts=30, heldout_prompts=8)
    values = world_recipe(tmp_path, world)
    stage = {"part": "own", "start": "sft", "batch_size": 20, "max_steps": 2, "epochs": 1}
    values["pairs"] = {"own": {"model": "sft", "per_prompt": 4, "max_new_tokens": 8, "gold": True}}
    values["stages"] += [
        {"loss": "slime", "learning_rate": 1e-3, **stage},
        {"loss": "dpo", "learning_rate": 1e-3, **stage},
        # What it trains in changes nothing of what it starts from.
        {"loss": "dpo", "name": "half", "learning_rate": 1e-3, "args": {"bf16": True}, **stage},
        {"loss": "dpo", "name": "whole-again", "learning_rate": 1e-3, **stage},
    ]
    looked: list[str] = []
    look = heldout._look

    def watched(*arguments: Any) -> Any:
        looked.append(arguments[-1])
        return look(*arguments)

    monkeypatch.setattr(heldout, "_look", watched)
    run_recipe(make_recipe(values), tmp_path / "run", make_console(quiet=True))
    # SFT before and after, the stages on pairs once before, and each after.
    assert sorted(looked) == ["after"] * 5 + ["before"] * 2
    of = {
        name: json.loads((tmp_path / "run" / name / "stage.json").read_text())["heldout"]
        for name in ("sft", "slime", "dpo")
    }
    assert of["slime"]["before"] == of["dpo"]["before"]
    assert of["slime"]["before"]["exact_match"] == of["sft"]["after"]["exact_match"]
    assert of["slime"]["after"] != of["dpo"]["after"]
    first, second = (json_lines(tmp_path / "run" / name / "answers.jsonl") for name in ("slime", "dpo"))
    assert [line["before"] for line in first] == [line["before"] for line in second]
    (kept,) = (tmp_path / "run" / "own").glob("standing-*.npz")
    for size in (0, 100):
        kept.write_bytes(kept.read_bytes()[:size])
        assert heldout._read(kept) is None
