"""A run in a group of ranks that another program has made, and a run that is told to end."""

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from transformers import TrainerCallback

from slimepo.errors import InputError
from slimepo.pipeline.run import train_loop
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.callbacks import SaveOnTerm
from tests.training.test_certificate import made

RECIPE = """
model: {init: random, architecture: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
        num_attention_heads: 2, num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: true}
tokenizer: TOKENIZER
data: {path: pairs.jsonl, parts: {preference: 1.0}}
stages: [{loss: slime, learning_rate: 1e-3, batch_size: 6, micro_batch_size: 2, max_steps: 2}]
"""


def worker(rank: int, port: int, config: dict[str, Any]) -> None:
    """As Ray Train calls it: the process group is there already, and this is not the main thread."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    failed: list[BaseException] = []

    def call() -> None:
        try:
            train_loop(config)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_the_loop_that_ray_train_calls_runs_a_recipe_on_its_ranks(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": str(i + 3)} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("TOKENIZER", str(tmp_path / "tokenizer")))
    config = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "out": str(tmp_path / "run"),
        "overrides": [f"data.path={tmp_path / 'pairs.jsonl'}"],
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, config), nprocs=2)
    stage = tmp_path / "run" / "slime"
    assert json.loads((stage / "stage.json").read_text())["steps"] == 2
    certificate = json.loads((stage / "certificate.json").read_text())
    assert certificate["agrees"]
    # A rank's share of the six is three; the last rank has one less.
    assert (certificate["ranks"], certificate["rows"]) == (2, 5)


def test_a_key_that_the_loop_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="the unknown key 'output'; it takes recipe, out, overrides"):
        train_loop({"recipe": "recipe.yaml", "out": "run", "output": "run"})
    with pytest.raises(InputError, match="no 'out'"):
        train_loop({"recipe": "recipe.yaml"})


class Term(TrainerCallback):
    """Tells this process to end in the midst of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("steps", "saved"), [(1, 2), (3, 3)], ids=["at once", "after the whole rollout"])
def test_told_to_end_a_run_writes_a_checkpoint_and_stops(tmp_path: Path, steps: int, saved: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run, ending = made(tmp_path, max_steps=5, save_strategy="steps", save_steps=100), SaveOnTerm(steps)
    run.add_callback(Term(2))
    run.add_callback(ending)
    run.train()
    assert ending.stopped
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert signal.getsignal(signal.SIGTERM) is before
