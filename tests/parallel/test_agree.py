"""Ranks tell each other what one of them has seen."""

from types import SimpleNamespace
from typing import Any

import pytest

from slimepo.errors import BadFilesError
from slimepo.parallel.agree import any_rank, on_main


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
