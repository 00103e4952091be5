"""Which room may use which: an arrow runs downwards only, lazy imports and imports of types included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "slimepo"

# Rooms on one floor do not know each other. A name is a package, or a module beside the packages.
FLOORS = [
    {
        "types",
        "errors",
        "words",
        "settings",
        "files",
        "versions",
        "terminal",
        "imports",
        "redaction",
        "hub",
        "means",
    },
    {"losses", "kernels", "data"},
    {"model", "checkpoints"},
    {"monitor", "onpolicy", "parallel"},
    {"training", "evaluation"},
    {"pipeline"},
    {"plan", "report", "playground", "sweep"},
    {"cli_data", "cli_eval", "cli_train"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The modules of the ground floor may use each other.
GROUND = FLOORS[0]
LARGEST_ROOM = 15


def _module(path: Path) -> str:
    return ".".join(["slimepo", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def _imported(path: Path) -> set[str]:
    """The modules of slimepo that a module imports from, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & NAMES - {_module(path)}


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]
NAMES = {_module(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_uses_its_own_room_and_those_below(path: Path) -> None:
    room = _module(path).split(".")[1]
    for other in {name.split(".")[1] for name in _imported(path)} - {room}:
        ground = room in GROUND and other in GROUND
        assert ground or FLOOR[other] < FLOOR[room], f"{room} may not use {other}"


def test_no_circle_runs_through_the_modules() -> None:
    TopologicalSorter({_module(path): _imported(path) for path in MODULES}).prepare()


def test_a_room_can_be_held_in_the_head() -> None:
    for folder in [SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= LARGEST_ROOM, f"{folder} has {len(files)} files at one level"
