"""The files of recipes/distributed: each is read by the program that it is for, and the commands in them exist. The
paper's recipes start on two ranks under every engine, and leave the same folders."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors import safe_open
from torch.distributed import run as torchrun

from slimepo.cli import app
from slimepo.settings import read_mapping

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDER = RECIPES / "distributed"
ENGINES = ["ddp", "fsdp2", "fsdp2-offload", "zero2", "zero3", "zero3-offload"]


def commands(path: Path) -> list[list[str]]:
    """The torchrun and accelerate commands in a file, with something in the place of variables."""
    text = path.read_text().replace("\\\n", " ")
    found = re.findall(r"(?:torchrun|accelerate launch) .*--?.*", text)
    known = {"NODELIST": "a", "head": "127.0.0.1"}
    filled = [re.sub(r"\$\{?(\w+)\}?", lambda m: known.get(m[1], "1"), each.rstrip("& ")) for each in found]
    return [shlex.split(each) for each in filled]


def test_all_engines_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*ENGINES, "skypilot"}


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerate_reads_its_configuration(engine: str) -> None:
    file = FOLDER / f"{engine}.yaml"
    config = load_config_from_file(str(file))
    kind, _, offload = engine.partition("-")
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(kind, "DEEPSPEED")
    assert config.distributed_type == expected
    assert config.num_processes == 8
    if kind == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_offload_params"] is bool(offload)
    if kind.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(kind[-1])
        assert config.deepspeed_config["offload_optimizer_device"] == ("cpu" if offload else "none")
    (command,) = commands(file)
    assert command[:4] == ["accelerate", "launch", "--config_file", f"recipes/distributed/{engine}.yaml"]
    args = launch_command_parser().parse_args(["--config_file", str(file), *command[4:]])
    assert args.module
    assert (args.training_script, args.training_script_args[0]) == ("slimepo.cli", "run")


@pytest.mark.parametrize("name", ["slurm.sh", "skypilot.yaml"])
def test_torchrun_reads_what_is_asked_of_it(name: str) -> None:
    (command,) = commands(FOLDER / name)
    asked = torchrun.parse_args(command[1:])
    assert asked.module
    assert (asked.training_script, asked.training_script_args[0]) == ("slimepo.cli", "run")
    assert "--out" in asked.training_script_args
    assert "run" in {each.name or each.callback.__name__ for each in app.registered_commands if each.callback}


def test_the_slurm_script_is_one_for_bash_and_queues_again() -> None:
    script = FOLDER / "slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "#SBATCH --signal=B:TERM@300\n" in script.read_text()
    assert "#SBATCH --requeue\n" in script.read_text()
    told = subprocess.run(["bash", script], capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr.startswith("usage: sbatch")


def test_skypilot_has_nodes_and_a_command() -> None:
    task = read_mapping(FOLDER / "skypilot.yaml", "task")
    assert {"resources", "num_nodes", "setup", "run", "file_mounts"} <= task.keys()
    assert (FOLDER.parents[1] / task["envs"]["RECIPE"]).is_file()


def smoke(*arguments: str, out: Path) -> None:
    """A smoke run of the command line, without the Hub."""
    command = [sys.executable, "-m", "slimepo.cli", *arguments, "--smoke", "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def exported(folder: Path) -> dict[str, Any]:
    """The files of a model folder: tensors by name with dtype and shape, JSON, and of others that they are there."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found[path.name] = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
        else:
            found[path.name] = json.loads(path.read_text()) if path.suffix == ".json" else None
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(recipe, engine) -> the run folder of a smoke run on two ranks; each runs once."""

    @cache
    def run(name: str, engine: str) -> Path:
        out = tmp_path_factory.mktemp(f"{Path(name).stem}-{engine}") / "run"
        own = [f"parallel={engine}", "data.heldout_limit=8"]
        smoke("run", str(RECIPES / f"{name}.yaml"), *own, "--nproc", "2", out=out)
        return out

    return run


@pytest.mark.ranks
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["llama-3.2-3b", "qwen3-4b", "gemma-3-4b"])
def test_the_papers_recipes_start_on_two_ranks_under_every_engine(
    started: Any, name: str, engine: str
) -> None:
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    run = started(f"paper/{name}", engine)
    for stage in ("sft", "slime"):
        assert json.loads((run / stage / "stage.json").read_text())["steps"] == 5
        assert exported(run / stage / "model") == exported(started(f"paper/{name}", "ddp") / stage / "model")


@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_base_in_four_bits_trains_on_two_ranks(started: Any) -> None:
    pytest.importorskip("bitsandbytes")
    run = started("llama-3.2-3b-qlora", "ddp")
    for stage in ("sft", "slime"):
        assert json.loads((run / stage / "certificate.json").read_text())["agrees"]
        assert json.loads((run / stage / "stage.json").read_text())["merged"]["largest"] < 1e-3


@pytest.mark.ranks
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["llama-3.2-3b", "qwen3-4b", "gemma-3-4b"])
def test_strong_baselines_start_with_each_of_the_papers_models(model: str, tmp_path: Path) -> None:
    own = [f"recipe={RECIPES}/paper/{model}.yaml", "search=null", "seeds=[0]"]
    smoke("sweep", str(RECIPES / "sweeps" / "strong-baselines.yaml"), *own, out=tmp_path / "sweep")
    for arm in ("sft-on-chosen", "dpo", "simpo", "slime"):
        assert (tmp_path / "sweep" / arm / "seed-0" / arm / "stage.json").exists()
