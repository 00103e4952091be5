"""Which rows a run reads, and which chunks of an evaluation a rank takes."""

import pytest

from slimepo.training.steps import StepSampler, rows_read, shared_chunks


def sampler(rows: int, **options: object) -> StepSampler:
    return StepSampler(lengths=list(range(rows)), step_size=4, seed=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_steps", "epochs", "expected"),
    [(1, 3.0, 4), (5, 1.0, 20), (6, 1.0, 22), (100, 1.0, 22), (-1, 0.5, 12), (-1, 1.0, 22), (0, 1.0, 22)],
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


@pytest.mark.parametrize(("rows", "ranks"), [(10, 1), (10, 2), (10, 3), (3, 2), (0, 2)])
def test_ranks_score_every_row_once_and_take_as_many_chunks(rows: int, ranks: int) -> None:
    taken = [list(shared_chunks(range(rows), 4, rank, ranks)) for rank in range(ranks)]
    assert len({len(chunks) for chunks in taken}) == 1
    counted = [row for chunks in taken for chunk, weight in chunks for row in chunk if weight]
    assert sorted(counted) == list(range(rows))
    assert all(len(chunk) <= 4 for chunks in taken for chunk, _ in chunks)
