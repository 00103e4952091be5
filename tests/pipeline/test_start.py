"""What becomes of a stage's adapter in the next: it is merged under a new one, or it trains on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimepo.errors import InputError
from slimepo.model.load import load_model
from slimepo.pipeline.certify import certify_recipe
from slimepo.pipeline.export import probe_logits
from slimepo.pipeline.recipe.read import load_recipe
from slimepo.pipeline.run import run_recipe
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.terminal import make_console
from tests.tiny import tiny_model

RANK = 2
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("world")
    build_tokenizer().save_pretrained(folder / "base")
    tiny_model(tied=True, vocab_size=len(build_tokenizer())).save_pretrained(folder / "base")
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": str(i + 3)} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
model: {folder / "base"}
adapter: {{r: {RANK}}}
data: {{path: {folder / "pairs.jsonl"}, parts: {{sft: 0.4, preference: 0.4, heldout: 0.2}}}}
stages:
  - {{loss: sft, learning_rate: 1e-2, epochs: 1, batch_size: 8, monitor: false}}
  - {{loss: dpo, learning_rate: 1e-2, batch_size: 8, monitor: false}}
"""
    )
    return lambda *overrides, **given: load_recipe(folder / "recipe.yaml", [*overrides], **given)


def run(recipe: Any, out: Path) -> list[dict[str, Any]]:
    return run_recipe(recipe, out, make_console(quiet=True))


def added_rank(recipe: Any, out: Path) -> int:
    """The rank of what two stages have added to a matrix of the base."""
    base = load_file(Path(recipe.model) / "model.safetensors")[Q_PROJ]
    added = load_file(out / "dpo" / "model" / "model.safetensors")[Q_PROJ] - base
    return int(torch.linalg.matrix_rank(added.double(), rtol=1e-4))


def test_a_stages_adapter_is_merged_under_a_new_one(recipe: Any, tmp_path: Path) -> None:
    sft, dpo = run(recipe(), tmp_path)
    assert dpo["base"] == str(tmp_path / "sft" / "model")
    assert dpo["reference"] == "adapters-off"
    assert added_rank(recipe(), tmp_path) == 2 * RANK
    assert not (tmp_path / "sft" / "adapter").exists()
    assert dpo["heldout"]["before"] == pytest.approx(sft["heldout"]["after"], abs=1e-5)


def test_or_it_trains_on_upon_the_first_stages_base(recipe: Any, tmp_path: Path) -> None:
    made = recipe("between_stages=continue")
    sft, dpo = run(made, tmp_path)
    assert dpo["base"] == str(tmp_path / "sft" / "adapter")
    assert dpo["heldout"]["before"] == pytest.approx(sft["heldout"]["after"], abs=1e-5)
    # The reference is where the stage starts, adapter and all: that cannot be had by switching it off.
    assert dpo["reference"] == "cache"
    assert added_rank(made, tmp_path) == RANK
    for stage in ("sft", "dpo"):
        adapter = load_model(str(tmp_path / stage / "adapter"))
        exported = load_model(str(tmp_path / stage / "model"))
        assert (probe_logits(adapter) - probe_logits(exported)).abs().max() < 1e-4
    assert run(made, tmp_path) == [sft, dpo]
    with pytest.raises(InputError, match="between_stages was 'continue', is now None"):
        run(recipe(), tmp_path)
    assert all(each["agrees"] for each in certify_recipe(made, tmp_path, make_console(quiet=True)).values())


def test_a_smoke_runs_adapter_goes_on_upon_its_own_small_base(recipe: Any, tmp_path: Path) -> None:
    _, dpo = run(recipe("between_stages=continue", smoke=True), tmp_path)
    config = json.loads((tmp_path / "dpo" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "sft" / "base")
    assert dpo["steps"] > 0


def test_nothing_goes_on_where_no_adapter_is(recipe: Any) -> None:
    with pytest.raises(InputError, match="between_stages: continue is for an adapter"):
        recipe("between_stages=continue", "adapter=none")
