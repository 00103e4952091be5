"""Every engine takes the steps that one rank takes: losses, every weight, held-out figures and the monitor's."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from slimepo.errors import InputError
from slimepo.model.adapters import lora_config
from slimepo.parallel import engines
from slimepo.parallel.engines import asked_engine, filled, full_weights, skeleton
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.parallel import worker
from tests.tiny import random_rows, tiny_model

# Of all cells those that reach what differs most: a trained head beside sharded weights, a tied one, a reference that
# is the policy without its adapters or at the start, one of a whole step, sampling, unequal numbers of micro-batches.
CORE = (
    "full-tied-slime-2",
    "head-untied-slime-2",
    "lora-tied-dpo-2",
    "full-untied-dpo-1",
    "head-tied-kto-2",
    "lora-untied-grpo-1",
)

BROKEN = "head-untied-slime-1-outside"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(engine, ranks, cells) -> a folder with what each rank has told; an engine runs once."""
    done: dict[tuple[str, int], Path] = {}

    def run(engine: str, ranks: int, cells: tuple[str, ...]) -> Path:
        if (engine, ranks) not in done:
            folder = done[engine, ranks] = tmp_path_factory.mktemp(f"{engine}-{ranks}")
            port = str(20000 + (os.getpid() * 7 + len(done)) % 20000)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
            # The broken one last: it breaks the process.
            command += ["--master_port", port, worker.__file__, str(folder), engine, *cells]
            command += [BROKEN] if engine == "fsdp2" else []
            result = subprocess.run(command, capture_output=True, text=True, timeout=900)
            assert result.returncode == 0, result.stderr[-4000:]
        return done[engine, ranks]

    return run


@pytest.fixture(scope="module")
def alone() -> Any:
    known: dict[str, dict[str, Any]] = {}

    def train(cell: str) -> dict[str, Any]:
        if cell not in known:
            known[cell] = worker.train(cell, "alone", 1)
        return known[cell]

    return train


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """In float32: losses and figures to 1e-5, and so what became of each weight, measured by its norm."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6)
    assert found["score"] == pytest.approx(expected["score"], rel=1e-5, abs=1e-6)
    for name, moved in expected["moved"].items():
        want, got = torch.tensor(moved), torch.tensor(found["moved"][name])
        # The weights themselves are rounded: what they moved by is known to that, and no better.
        assert (got - want).norm() <= 2e-5 * want.norm() + 1e-6, name
    assert len(found["monitor"]) == len(expected["monitor"])
    for line, other in zip(found["monitor"], expected["monitor"], strict=True):
        for part in ("train", "heldout"):
            if part in line:
                assert line[part]["chosen"] == pytest.approx(other[part]["chosen"], rel=1e-4)
        assert line.get("answers") == other.get("answers")


@pytest.mark.parametrize("cell", CORE)
def test_two_ranks_take_the_steps_of_one(ran: Any, alone: Any, cell: str) -> None:
    same(json.loads((ran("ddp", 2, CORE) / f"{cell}-0.json").read_text()), alone(cell))


@pytest.mark.ranks
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3", "fsdp2-offload", "zero3-offload"])
def test_all_cells_of_all_engines(ran: Any, alone: Any, engine: str, ranks: int) -> None:
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    cells = tuple(worker.cells()) if ranks == 2 and "-" not in engine else CORE
    folder = ran(engine, ranks, cells)
    for cell in cells:
        found = json.loads((folder / f"{cell}-0.json").read_text())
        same(found, alone(cell))
        assert found["certificate"]["agrees"]
        assert all(each["error"] < 1e-4 for each in found["certificate"]["gradients"])


@pytest.mark.ranks
def test_with_fsdp2_the_certificate_is_of_weights_in_parts(ran: Any) -> None:
    for cell in CORE:
        found = json.loads((ran("fsdp2", 2, CORE) / f"{cell}-0.json").read_text())["certificate"]
        assert found["agrees"]
        assert max(each["error"] for each in found["gradients"]) < 1e-4


@pytest.mark.ranks
def test_a_head_that_is_read_from_outside_its_module_is_found_out(ran: Any) -> None:
    """Its loss is right and its gradient is one rank's."""
    said = json.loads((ran("fsdp2", 2, CORE) / f"{BROKEN}-0.json").read_text())["error"]
    assert "gradient of base_model.model.lm_head" in said


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_with_fsdp2_a_rank_holds_half_of_the_weights(ran: Any, rank: int) -> None:
    for cell in CORE:
        here, whole = json.loads((ran("fsdp2", 2, CORE) / f"{cell}-{rank}.json").read_text())["held"]
        assert 0.48 * whole < here < 0.52 * whole


def test_a_skeleton_has_no_weights_and_can_be_filled_again() -> None:
    for tied in (False, True):
        model = tiny_model(tied=tied)
        bare = skeleton(model)
        assert {p.device.type for p in bare.parameters()} == {"meta"}
        again = filled(bare, full_weights(model))
        ids = torch.arange(6)[None]
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


class TestAskedEngine:
    def test_nothing_asked_is_ddp(self) -> None:
        assert asked_engine(None) == "ddp"

    def test_an_unknown_one_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(InputError, match=r"fsdp3.*did you mean 'fsdp2'"):
            asked_engine("fsdp3")

    def test_the_launcher_decides_where_the_recipe_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        # accelerate sets this one by itself too.
        assert asked_engine(None) == "ddp"
        monkeypatch.setenv("FSDP_VERSION", "2")
        assert asked_engine(None) == "fsdp2"
        with pytest.raises(InputError, match=r"zero3.*asks for fsdp2"):
            asked_engine("zero3")
        monkeypatch.setenv("FSDP_VERSION", "1")
        with pytest.raises(InputError, match=r"FSDP 1.*fsdp_version: 2"):
            asked_engine(None)

    def test_deepspeed_by_a_file_of_its_own_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        assert asked_engine(None) == "zero3"
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero.json")
        with pytest.raises(InputError, match="parallel: zero2 or zero3"):
            asked_engine(None)

    def test_an_engine_that_the_environment_does_not_name_is_no_ddp(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(engines._SWITCHES, "ACCELERATE_USE_FSDP", "true")
        for wanted in (None, "ddp", "zero2"):
            with pytest.raises(InputError, match=r"ACCELERATE_USE_FSDP in the environment.*give parallel"):
                asked_engine(wanted)
        assert asked_engine("fsdp2-offload") == "fsdp2-offload"
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        assert asked_engine(None) == "fsdp2"

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
                "fsdp_activation_checkpointing: .* give activation_checkpointing: layers",
            ),
            (
                {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
                "fsdp_reshard_after_forward: false, which is not supported",
            ),
            (
                {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
                "offload_param_device: cpu, not supported with zero_stage 3",
            ),
            (
                {
                    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
                    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme",
                },
                "offload_optimizer_device: nvme",
            ),
        ],
    )
    def test_what_the_launcher_asks_for_beside_is_not_dropped(
        self, settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=words):
            asked_engine(None)


def test_one_process_cannot_share_its_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fsdp2.*several processes.*--nproc"):
        PreferenceTrainer(
            tiny_model(), args=PreferenceConfig(str(tmp_path), parallel="fsdp2"), train_dataset=random_rows(4),
            peft_config=lora_config(),
        )  # fmt: skip


def test_settings_of_fsdp_and_deepspeed_are_named_otherwise(tmp_path: Path) -> None:
    for given in (
        {"fsdp": True},
        {"fsdp_config": {"version": 2}},
        {"fsdp_config": "fsdp.json"},
        {"deepspeed": "zero.json"},
    ):
        with pytest.raises(InputError, match="parallel: give one of ddp, fsdp2"):
            PreferenceConfig(str(tmp_path), **given)
    plain = PreferenceConfig(str(tmp_path))
    assert replace(plain, seed=3).seed == 3
