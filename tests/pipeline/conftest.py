"""A console that can be read back and the tiny Llama, as in the tests of evaluation; a recipe in the built-in world."""

from pathlib import Path
from typing import Any

from slimepo.playground.world import WorldSettings, write_world
from tests.evaluation.conftest import console, loads, one_llama

__all__ = ["console", "loads", "one_llama"]


def world_recipe(folder: Path, settings: WorldSettings, **tasks: Any) -> dict[str, Any]:
    """A recipe of SFT alone, of a tiny Llama in a world that is written to `folder`; `tasks`: more keys of tasks."""
    world = folder / "world"
    write_world(settings, 0, world)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "model": {"init": "random", "architecture": "llama", "num_key_value_heads": 2, **sizes},
        "tokenizer": f"{world}/tokenizer",
        "data": {"path": f"{world}/demonstrations.jsonl", "parts": {"sft": 1.0}},
        "tasks": {
            "train": f"{world}/tasks.jsonl",
            "heldout": f"{world}/heldout.jsonl",
            "checker": "slimepo.playground.tasks:judge",
            "max_new_tokens": 8,
            **tasks,
        },
        "stages": [{"loss": "sft", "learning_rate": 1e-2, "epochs": 1, "batch_size": 20, "monitor": False}],
    }
