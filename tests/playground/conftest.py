"""One small quickstart for every test that looks at what it leaves behind."""

from pathlib import Path

import pytest

from tests.command import slimepo

SMALL = [
    "world.demonstrations=300",
    "world.preference_prompts=60",
    "world.heldout_prompts=36",
    "tasks.max_new_tokens=12",
    "pairs.per_prompt=2",
    "pairs.max_new_tokens=12",
    "sft.max_steps=20",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
]


def command(out: Path) -> list[str]:
    """The command of the fixture: two seeds, KTO, and SLIME at a rate at which it breaks."""
    keys = [*SMALL, "seed=4", "preference.epochs=1", "objectives.slime.learning_rates=[1e-4, 1e16]"]
    return [
        "quickstart",
        *keys,
        "--objective",
        "slime",
        "--objective",
        "kto",
        "--seeds",
        "2",
        "--out",
        str(out),
    ]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of two seeds, and what was said."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    result = slimepo(*command(out))
    # The page is there all the same.
    assert result.returncode == 4, result.stderr
    return out, result.stdout
