"""A run that was stopped goes on to the weights that it would have had; a different one does not go on at all."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.harness import make_world, slimepo, told_in_step, weights, write_pairs


@pytest.mark.case(1, "stopped after 3 of 6 steps: the same command ends with the same bits")
@pytest.mark.parametrize(
    ("kind", "ranks", "overrides"),
    [
        pytest.param("full", 1, (), id="one rank"),
        pytest.param("lora", 1, (), id="adapter"),
        pytest.param("full", 2, (), id="DDP"),
        pytest.param("full", 2, ("parallel=fsdp2",), id="FSDP2", marks=pytest.mark.ranks),
    ],
)
def test_stopped_and_resumed(
    world: Path,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    ranks: int,
    overrides: tuple[str, ...],
) -> None:
    command = ("run", world / f"{kind}.yaml", *overrides, "--out", tmp_path / "run")
    stopped = slimepo(*command, ranks=ranks, before=told_in_step(3, signal.SIGTERM))
    assert stopped.codes == [75] * ranks, stopped.said
    assert (tmp_path / "run" / "only" / "checkpoints" / "checkpoint-3" / "manifest.json").exists()
    resumed = slimepo(*command, ranks=ranks)
    assert resumed.codes == [0] * ranks, resumed.said
    assert json.loads((tmp_path / "run" / "only" / "stage.json").read_text())["resumed_from_step"] == 3
    assert weights(tmp_path / "run") == weights(undisturbed(kind, ranks, *overrides))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of its own with a run that was stopped after three steps, of an objective in a file."""
    folder = make_world(tmp_path_factory.mktemp("half"))
    (folder / "own.py").write_text(
        "from slimepo.losses import slime\n\n\ndef own(logps):\n    return slime(logps)\n"
    )
    recipe = (folder / "full.yaml").read_text().replace("loss: slime", f"loss: '{folder}/own.py:own'")
    (folder / "full.yaml").write_text(recipe)
    out = folder / "run"
    stopped = slimepo("run", folder / "full.yaml", "--out", out, before=told_in_step(3, signal.SIGTERM))
    assert stopped.code == 75, stopped.said
    return folder


def other_order(folder: Path) -> None:
    write_pairs(folder, range(39, -1, -1))


def other_rows(folder: Path) -> None:
    write_pairs(folder, range(1, 41))


def other_source(folder: Path) -> None:
    file = folder / "own.py"
    file.write_text(file.read_text().replace("slime(logps)", "slime(logps, threshold=0.5)"))


def other_template(folder: Path) -> None:
    file = folder / "tokenizer" / "chat_template.jinja"
    file.write_text(
        file.read_text().replace("{% generation %}", "").replace("{% endgeneration %}", "") + "{{ '' }}"
    )


@pytest.mark.case(
    9, "resumed with other data, order, seed, objective, source, template or ranks: refused by name"
)
@pytest.mark.parametrize(
    ("change", "overrides", "ranks", "name", "words"),
    [
        (other_rows, (), 1, "data", "pairs.jsonl has changed"),
        (other_order, (), 1, "row_order", "another order"),
        (None, ("seed=1",), 1, "seed", "seed was 0, is now 1"),
        (None, ("stages.only.loss=dpo",), 1, "stage.loss", "is now 'dpo'"),
        (other_source, (), 1, "sources", "own.py:own"),
        (other_template, (), 1, "template", "the chat template is another"),
        (None, (), 2, "world_size", "world_size was 1, is now 2"),
        (None, ("stages.only.batch_size=8", "stages.only.learning_rate=1e-3"), 1, "stage.batch_size", "0.001"),
    ],
    ids=["rows", "order", "seed", "objective", "source", "template", "ranks", "two keys"],
)  # fmt: skip
def test_another_run_is_refused(
    half: Path,
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    overrides: tuple[str, ...],
    ranks: int,
    name: str,
    words: str,
) -> None:
    kept = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    try:
        if change is not None:
            change(half)
        ended = slimepo("run", half / "full.yaml", *overrides, "--out", half / "run", ranks=ranks)
        assert ended.codes == [2] * ranks, ended.said
        assert words in ended.said
        assert f"--accept {name}" in ended.said
        assert "Traceback" not in ended.said
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.case(9, "a difference that is accepted by name does not stop the run")
def test_a_difference_can_be_accepted(half: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(half / "run", out)
    ended = slimepo("run", half / "full.yaml", "--out", out, "--accept", "world_size", ranks=2)
    assert ended.codes == [0, 0], ended.said
    assert json.loads((out / "only" / "stage.json").read_text())["resumed_from_step"] == 3
