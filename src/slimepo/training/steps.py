"""Which rows make an optimizer step or a batch of an evaluation, and which of them a rank takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Sampler

from slimepo.data.batch import epoch_order

STRATEGIES = ("random", "group_by_length", "sequential")


@dataclass
class StepSampler(Sampler[list[int]]):
    """Yields one rank's rows of each optimizer step.

    The rows of a step are a function of seed and epoch alone, whatever the number of ranks, which share them out
    (`shared_out`). In a short last step a rank may be left with none. `repeats`: how many steps the rows of one are
    taken for.
    """

    lengths: Sequence[int]
    step_size: int
    seed: int
    strategy: str = "random"
    drop_last: bool = False
    rank: int = 0
    ranks: int = 1
    epoch: int = 0
    repeats: int = 1
    # All steps of the run are taken: none is left to yield.
    finished: bool = False

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.step_size)
        return (full + bool(rest and not self.drop_last)) * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        if self.finished:
            return
        if self.strategy == "sequential":
            order = list(range(len(self.lengths)))
        else:
            by_length = self.strategy == "group_by_length"
            order = epoch_order(self.lengths, self.step_size, self.seed, self.epoch, by_length)
        for step in (place // self.repeats for place in range(len(self))):
            rows = order[step * self.step_size : (step + 1) * self.step_size]
            yield shared_out(rows, self.lengths, self.ranks)[self.rank]


def shared_out(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The rows of a step for each rank: as many rows and about as many tokens for each, since all wait for the last.

    The longest first, each to the rank with the fewest tokens so far that has room; within a rank in the step's order.

    >>> shared_out([0, 1, 2, 3], [9, 8, 2, 1], 2)
    [[0, 3], [1, 2]]
    """
    room = [len(rows[rank::ranks]) for rank in range(ranks)]
    tokens, rank_of = [0] * ranks, {}
    for place in sorted(range(len(rows)), key=lambda place: -lengths[rows[place]]):
        rank = min((rank for rank in range(ranks) if room[rank]), key=lambda rank: tokens[rank])
        room[rank] -= 1
        tokens[rank] += lengths[rows[place]]
        rank_of[place] = rank
    return [[row for place, row in enumerate(rows) if rank_of[place] == rank] for rank in range(ranks)]


def step_sampler(lengths: Sequence[int], args: Any, accelerator: Any) -> StepSampler:
    """The sampler that the trainer's arguments ask for, for this rank."""
    sampling = args.sampling
    return StepSampler(
        lengths=lengths,
        step_size=args.train_batch_size * accelerator.num_processes,
        seed=args.seed if args.data_seed is None else args.data_seed,
        strategy=args.train_sampling_strategy,
        drop_last=args.dataloader_drop_last,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        repeats=sampling.passes if sampling else 1,
    )


def steps_of(per_epoch: int, max_steps: int, epochs: float) -> int:
    """The steps of a run: `max_steps` where that is not negative, else those of its epochs, as in transformers."""
    return max_steps if max_steps >= 0 else math.ceil(epochs * per_epoch)


def rows_read(sampler: StepSampler, max_steps: int, epochs: float) -> list[int]:
    """The rows that a run reads on all its ranks, in the order of the data set.

    Args:
        sampler: that of the run.
        max_steps: its steps, where that is not negative; `epochs` decides otherwise, as in transformers' Trainer.
        epochs: its epochs, which may be a part of one.
    """
    steps = steps_of(len(sampler), max_steps, epochs)
    read: set[int] = set()
    for epoch in range(math.ceil(steps / max(len(sampler), 1))):
        if len(read) == len(sampler.lengths):
            break
        in_order = replace(sampler, rank=0, ranks=1, epoch=epoch)
        for rows in itertools.islice(in_order, steps - epoch * len(sampler)):
            read.update(rows)
    return sorted(read)


def shares(batches: Sequence[Sequence[int]], rank: int, ranks: int) -> Iterator[tuple[Sequence[int], int]]:
    """One rank's batches, each to be counted once.

    A rank left without a batch is given the last one, to be counted 0 times: its sums need the same names as the
    others'.
    """
    for mine in range(rank, math.ceil(len(batches) / ranks) * ranks, ranks):
        yield batches[min(mine, len(batches) - 1)], int(mine < len(batches))
