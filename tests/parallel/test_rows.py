"""Each rank works out a part, and all of them have the whole."""

from types import SimpleNamespace

import pytest

from slimepo.parallel import rows
from slimepo.parallel.rows import each_its_share


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_the_shares_are_the_rows_in_their_order(
    monkeypatch: pytest.MonkeyPatch, ranks: int, count: int
) -> None:
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(
            rows,
            "PartialState",
            lambda rank=rank: SimpleNamespace(num_processes=ranks, process_index=rank),
        )
        monkeypatch.setattr(rows, "gather_object", lambda results: results)
        shares += each_its_share(range(count), list)
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
