"""What ranks tell each other of beside their numbers: one has seen something, does a job for all, or a share of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from slimepo.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


def any_rank(here: bool) -> bool:
    """Whether it is so on any rank; every rank must call this at the same place.

    Between the CPUs, so that no device is waited for.
    """
    return any(of_all_ranks(here))


def of_all_ranks(here: T) -> list[T]:
    """What each rank has, in their order; every rank must call this at the same place. Plain data alone."""
    of = torch.distributed
    if not of.is_available() or not of.is_initialized() or of.get_world_size() == 1:
        return [here]
    found: list[Any] = [None] * of.get_world_size()
    of.all_gather_object(found, here, group=_of_cpus(of.group.WORLD))
    return found


def each_its_share(rows: Sequence[T], work: Callable[[Sequence[T]], R]) -> list[R]:
    """What `work` makes of consecutive parts of `rows`, one part on each rank; all ranks get all results, in order."""
    of = torch.distributed
    several = of.is_available() and of.is_initialized()
    ranks, rank = (of.get_world_size(), of.get_rank()) if several else (1, 0)
    return of_all_ranks(work(rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]))


@contextmanager
def together() -> Iterator[None]:
    """What one rank raises in here all ranks raise behind it, so that none of them waits for one that has left.

    Every rank must come here, and none may wait for another inside. The rank that failed raises its own error, the
    others an InputError where that is one, else a RuntimeError, with its words.
    """
    failed: BaseException | None = None
    try:
        yield
    except (Exception, SystemExit) as error:
        failed = error
    kind = InputError if isinstance(failed, InputError) else RuntimeError
    words = str(failed) if kind is InputError else f"{type(failed).__name__}: {failed}"
    told = of_all_ranks(None if failed is None else (kind, words))
    if failed is not None:
        raise failed
    for rank, found in enumerate(told):
        if found is not None:
            kind, words = found
            raise kind(f"{words} (on rank {rank})")


def on_main(job: Callable[[], T], accelerator: Any) -> T:
    """What `job` gives the main process, on every rank; its error too, for which the others would wait for ever."""
    done: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            done[0] = job()
        except Exception as error:
            done[1] = error
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(done)
    if done[1] is not None:
        raise done[1]
    result: T = done[0]
    return result


@functools.lru_cache(maxsize=1)
def _of_cpus(world: Any) -> Any:
    """The ranks of a process group, through their CPUs; made once, by all of them together."""
    return torch.distributed.new_group(backend="gloo")
