"""The files of recipes/distributed: each is read by the program that it is for, and the commands in them exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed import run as torchrun

from slimepo.cli import app
from slimepo.settings import read_mapping

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "distributed"
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
