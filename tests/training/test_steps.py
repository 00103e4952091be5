"""Which rows a run reads, and which chunks of an evaluation a rank takes."""

import pytest

from slimepo.training.steps import StepSampler, rows_read, shares


def sampler(rows: int, **options: object) -> StepSampler:
    return StepSampler(lengths=list(range(rows)), step_size=4, seed=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_steps", "epochs", "expected"),
    [(1, 3.0, 4), (5, 1.0, 20), (6, 1.0, 22), (100, 1.0, 22), (-1, 0.5, 12), (-1, 1.0, 22), (0, 1.0, 0)],
)
def test_a_run_reads_the_rows_of_its_steps(max_steps: int, epochs: float, expected: int) -> None:
    """Of 22 rows, which make five steps of four and one of two; half an epoch is three steps."""
    assert len(rows_read(sampler(22), max_steps, epochs)) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_knows_the_rows_of_all(rank: int) -> None:
    assert rows_read(sampler(22, rank=rank, ranks=2), 2, 1.0) == rows_read(sampler(22), 2, 1.0)


def test_rows_dropped_at_the_end_of_one_epoch_are_read_in_another() -> None:
    one, two = (rows_read(sampler(22, drop_last=True), -1, epochs) for epochs in (1.0, 2.0))
    assert len(one) == 20 < len(two)
    assert rows_read(sampler(3, drop_last=True), 10, 1.0) == [], "no step is full"


@pytest.mark.parametrize(("batches", "ranks"), [(3, 1), (3, 2), (3, 3), (1, 2), (0, 2)])
def test_ranks_score_every_batch_once_and_take_as_many_as_each_other(batches: int, ranks: int) -> None:
    taken = [list(shares([[i] for i in range(batches)], rank, ranks)) for rank in range(ranks)]
    assert len({len(of_rank) for of_rank in taken}) == 1
    counted = [row for of_rank in taken for batch, times in of_rank for row in batch if times]
    assert sorted(counted) == list(range(batches))
