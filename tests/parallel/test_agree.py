"""Ranks tell each other what one of them has seen."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimepo.errors import BadFilesError
from slimepo.parallel import agree
from slimepo.parallel.agree import any_rank, each_its_share, on_main, together


def test_alone_a_rank_agrees_with_itself() -> None:
    assert any_rank(True)
    assert not any_rank(False)
    assert on_main(lambda: 7, SimpleNamespace(is_main_process=True, num_processes=1)) == 7


def test_every_rank_learns_of_an_error_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it for ever."""

    def told(objects: list[Any]) -> None:
        objects[:] = [None, BadFilesError("cache.npy is damaged; delete it")]

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", told)
    other = SimpleNamespace(is_main_process=False, num_processes=2)
    with pytest.raises(BadFilesError, match=r"cache.npy is damaged"):
        on_main(lambda: None, other)


def test_what_another_rank_raises_is_raised_here_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere: list[Any] = [None, (RuntimeError, "OutOfMemoryError: no room")]
    monkeypatch.setattr(agree, "of_all_ranks", lambda own: [own, *elsewhere])
    with pytest.raises(RuntimeError, match=r"OutOfMemoryError: no room \(on rank 2\)"), together():
        pass
    with pytest.raises(KeyError, match="mine"), together():
        raise KeyError("mine")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_the_shares_of_all_ranks_are_the_rows_in_their_order(
    monkeypatch: pytest.MonkeyPatch, ranks: int, count: int
) -> None:
    shares: list[list[int]] = []
    monkeypatch.setattr(agree, "of_all_ranks", lambda here: [here])
    for rank in range(ranks):
        group = SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: ranks,
            get_rank=lambda rank=rank: rank,
        )  # fmt: skip
        monkeypatch.setattr(torch, "distributed", group)
        shares += each_its_share(range(count), list)
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
