"""Runs of the real command line in forked children: a run that is killed costs a second, not ten of imports.

Ranks are started without a launcher, so that nobody but slimepo sees to it that they end together.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from slimepo import cli
from slimepo.pipeline.run import run_recipe
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.trainer import PreferenceTrainer

# Imported before anything is forked: the command imports it when it runs.
assert run_recipe

# Nothing hangs: a run that is not done by then is killed, and its exit code says so.
SECONDS = 120

MODEL = """{init: random, architecture: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
  num_attention_heads: 2, num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: true, attention_dropout: 0.2}"""
RECIPE = """
model: {model}
adapter: {adapter}
tokenizer: {folder}/tokenizer
data: {{path: {folder}/pairs.jsonl, parts: {{preference: 1.0}}}}
stages:
  - {{name: only, loss: {loss}, learning_rate: 1e-2, batch_size: 4, micro_batch_size: 1, max_steps: 6, save_every: 1,
      monitor: false, args: {{disable_dropout: false, optim: adamw_torch}}}}
"""
# Kinds of runs: all weights, an adapter, an objective with a reference that is computed beforehand.
KINDS = {"full": ("none", "slime"), "lora": ("{r: 2, dropout: 0.2}", "slime"), "dpo": ("none", "dpo")}


class Ended(NamedTuple):
    """How the ranks of a command ended: their exit codes (negative: the signal's number) and what they printed."""

    codes: list[int]
    said: str

    @property
    def code(self) -> int:
        return self.codes[0]


def make_world(folder: Path, rows: int = 40) -> Path:
    """A folder with a tokenizer, pairs for ten steps an epoch and a recipe of six steps of each kind."""
    build_tokenizer().save_pretrained(folder / "tokenizer")
    write_pairs(folder, range(rows))
    for kind, (adapter, loss) in KINDS.items():
        text = RECIPE.format(model=MODEL, adapter=adapter, loss=loss, folder=folder)
        (folder / f"{kind}.yaml").write_text(text)
    return folder


def write_pairs(folder: Path, numbers: Sequence[int]) -> None:
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": f"{i + 3}0"} for i in numbers]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(out: Path, stage: str = "only") -> str:
    """The hash of the exported weights."""
    return sha256((out / stage / "model" / "model.safetensors").read_bytes()).hexdigest()


def slimepo(
    *arguments: object,
    ranks: int = 1,
    before: Callable[[int], None] | None = None,
    env: Mapping[str, str] | None = None,
    during: Callable[[list[int]], None] | None = None,
) -> Ended:
    """Run `slimepo ARGUMENTS` on so many ranks.

    before: called in each child, with its rank, before the command begins: the place to put a fault in.
    during: called here with the ids of the ranks once they have started.
    """
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"slimepo-{os.getpid()}-{time.monotonic_ns()}.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), **group}
            own = {**(of_rank if ranks > 1 else {}), "SLIMEPO_CACHE": f"{log}.cache", **(env or {})}
            _run(arguments, own, log, before, rank)
        children.append(child)
    try:
        if during is not None:
            during(children)
        codes = _wait(children)
        return Ended(codes, log.read_text(errors="replace"))
    finally:
        log.unlink(missing_ok=True)
        shutil.rmtree(f"{log}.cache", ignore_errors=True)


def in_step(step: int, fault: Callable[[PreferenceTrainer], None]) -> None:
    """Have `fault` happen in this process when training takes its step of that number."""
    take = PreferenceTrainer.training_step

    def faulty(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            fault(self)
        return take(self, *args, **kwargs)

    PreferenceTrainer.training_step = faulty  # type: ignore[method-assign]


def told_in_step(step: int, number: signal.Signals, of_rank: int | None = None) -> Callable[[int], None]:
    """For `before`: the signal comes to this rank (to all) in the midst of a step."""

    def before(rank: int) -> None:
        if of_rank in (None, rank):
            in_step(step, lambda _: os.kill(os.getpid(), number))

    return before


def _run(
    arguments: Sequence[object],
    env: Mapping[str, str],
    log: Path,
    before: Callable[[int], None] | None,
    rank: int,
) -> None:
    """The command in a child that is a process of its own in all that matters; does not return."""
    code = 99
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(file, standard)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.environ |= env
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        torch.manual_seed(time.monotonic_ns())
        if before is not None:
            before(rank)
        sys.argv = ["slimepo", *map(str, arguments)]
        cli.main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: Sequence[int]) -> list[int]:
    deadline, codes = time.monotonic() + SECONDS, dict[int, int]()
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
            elif child not in codes and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]
