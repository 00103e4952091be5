"""Several ranks share the work as they were asked to, or do not begin."""

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.reliability.harness import slimepo, told_in_step, weights


@pytest.mark.case(
    25, "sharding that is requested but not in effect: refused, whether set by recipe, args or environment"
)
@pytest.mark.parametrize(
    ("overrides", "env", "ranks", "words"),
    [
        (("parallel=fsdp2",), {}, 1, "'fsdp2' is for several processes and this is one"),
        (("stages.only.args.fsdp=full_shard",), {}, 1, "give the recipe's parallel"),
        (("stages.only.args.deepspeed=zero.json",), {}, 1, "give the recipe's parallel"),
        ((), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, 1, "FSDP 1, which is not supported"),
        ((), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, 1, "'fsdp2' is for several processes"),
        (("parallel=ddp",), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, 2, "asks for fsdp2"),
    ],
    ids=["recipe", "args", "deepspeed", "FSDP 1", "environment", "both"],
)
def test_sharding_that_cannot_be(
    world: Path, tmp_path: Path, overrides: tuple[str, ...], env: Mapping[str, str], ranks: int, words: str
) -> None:
    ended = slimepo("run", world / "full.yaml", *overrides, "--out", tmp_path / "run", ranks=ranks, env=env)
    assert ended.codes == [2] * ranks, ended.said
    assert words in ended.said
    assert not (tmp_path / "run" / "only").exists()


@pytest.mark.case(25, "sharding that the libraries silently skip: refused before the first step")
def test_sharding_that_is_left_out(world: Path, tmp_path: Path) -> None:
    def before(_: int) -> None:
        from slimepo.training import config

        # accelerate knows no FSDP on a CPU, and would train with DDP.
        config.settle_engine = lambda engine: None  # type: ignore[assignment]

    out = tmp_path / "run"
    ended = slimepo("run", world / "full.yaml", "parallel=fsdp2", "--out", out, ranks=2, before=before)
    assert set(ended.codes) == {2}, ended.said
    assert "parallel = 'fsdp2' is not in effect" in ended.said
    assert not (out / "only" / "model").exists()


@pytest.mark.ranks
@pytest.mark.case(
    26, "a tied model with a saved head under FSDP2: as under DDP, through a resume, and untied on disk"
)
def test_a_tied_model_with_a_trained_head(
    world: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = ("adapter={r: 2, train_head: true}", "parallel=fsdp2")
    command = ("run", world / "lora.yaml", *overrides, "--out", tmp_path / "run")
    stopped = slimepo(*command, ranks=2, before=told_in_step(3, signal.SIGTERM))
    assert stopped.codes == [75, 75], stopped.said
    assert slimepo(*command, ranks=2).codes == [0, 0]
    model = tmp_path / "run" / "only" / "model"
    assert weights(tmp_path / "run") == weights(undisturbed("lora", 2, *overrides))
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is False
    sharded = load_file(model / "model.safetensors")
    assert not torch.equal(sharded["lm_head.weight"], sharded["model.embed_tokens.weight"])
