"""Numbers that are none stop every rank, before anything is written of them; memory that runs out does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimepo.checkpoints.store import newest
from slimepo.training import step
from slimepo.training.trainer import PreferenceTrainer
from tests.reliability.harness import in_step, slimepo


def spoil(trainer: PreferenceTrainer) -> None:
    """The weights of this rank are no numbers from here on."""
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))


def spoil_gradient(trainer: PreferenceTrainer) -> None:
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.case(
    12, "a loss or a gradient that is not finite: exit code 4, step and rows named, nothing saved of it"
)
@pytest.mark.parametrize(
    ("fault", "words"), [(spoil, "the loss is not finite"), (spoil_gradient, "the gradient is not finite")]
)
def test_not_finite(
    world: Path, tmp_path: Path, fault: Callable[[PreferenceTrainer], None], words: str
) -> None:
    out = tmp_path / "run"
    ended = slimepo("run", world / "full.yaml", "--out", out, before=lambda _: in_step(2, fault))
    assert ended.code == 4, ended.said
    assert f"{words} at step 2" in ended.said
    assert "pairs.jsonl:" in ended.said
    _nothing_of_it(out, 1)


@pytest.mark.case(
    12, "an absurd learning rate: exit code 4 before a checkpoint of useless weights, and no export"
)
@pytest.mark.parametrize("rate", ["1e8", "1e30"])
def test_absurd_rates(world: Path, tmp_path: Path, rate: str) -> None:
    out = tmp_path / "run"
    ended = slimepo("run", world / "full.yaml", f"stages.only.learning_rate={rate}", "--out", out)
    assert ended.code == 4, ended.said
    assert "ower the learning rate" in ended.said
    _nothing_of_it(out, 0)


@pytest.mark.case(13, "a loss that is not finite on one rank: all ranks stop, with its rows and exit code 4")
def test_not_finite_on_one_rank(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = slimepo(
        "run",
        world / "full.yaml",
        "--out",
        out,
        ranks=2,
        before=lambda rank: in_step(2, spoil) if rank else None,
    )
    assert ended.codes == [4, 4], ended.said
    assert ended.said.count("the loss is not finite at step 2; rows: ") >= 2
    assert "pairs.jsonl:" in ended.said
    _nothing_of_it(out, 1)


def _nothing_of_it(out: Path, last: int) -> None:
    found = newest(out / "only" / "checkpoints")
    assert (found.name if found else "checkpoint-0") == f"checkpoint-{last}"
    assert not (out / "only" / "model").exists()
    assert not (out / "only" / "model.part").exists()


def too_large(rows: int, of_rank: int) -> Callable[[int], None]:
    """For `before`: micro-batches of more rows are too large for this rank, from the second step on."""
    compute = step.output_of

    def before(rank: int) -> None:
        def fault(_: PreferenceTrainer) -> None:
            def output_of(objective: Any, loss: Any, logps: Any, batch: Any, *given: Any) -> Any:
                if batch["rows"] > rows:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return compute(objective, loss, logps, batch, *given)

            step.output_of = output_of

        if rank == of_rank:
            in_step(2, fault)

    return before


EXACT = (
    "stages.only.micro_batch_size=4",
    "stages.only.batch_size=8",
    "stages.only.args={optim: sgd, disable_dropout: true}",
)


@pytest.mark.case(
    14, "out of memory on one rank: all ranks repeat the step with the same batch in smaller micro-batches"
)
@pytest.mark.parametrize(("ranks", "of_rank"), [(1, 0), (2, 1)])
def test_out_of_memory(
    world: Path, undisturbed: Callable[..., Path], tmp_path: Path, ranks: int, of_rank: int
) -> None:
    out = tmp_path / "run"
    ended = slimepo(
        "run", world / "full.yaml", *EXACT, "--out", out, ranks=ranks, before=too_large(1, of_rank)
    )
    assert ended.codes == [0] * ranks, ended.said
    said = " ".join(ended.said.split())
    assert "out of memory at step 2" in said
    assert "micro-batches of 1 rows" in said
    file = Path("only", "model", "model.safetensors")
    whole, cut = load_file(undisturbed("full", ranks, *EXACT) / file), load_file(out / file)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.case(
    14, "out of memory with a single row: exit code 5 on all ranks, and a hint about what would help"
)
def test_out_of_memory_with_one_row(world: Path, tmp_path: Path) -> None:
    ended = slimepo("run", world / "full.yaml", "--out", tmp_path / "run", ranks=2, before=too_large(0, 1))
    assert ended.codes == [5, 5], ended.said
    assert "lower max_length" in ended.said
