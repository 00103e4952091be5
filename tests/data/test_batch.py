"""Batches: where the response tokens stand, and back into pairs; row order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimepo.data.batch import StepCollator, collate, epoch_order, pair_logps
from slimepo.data.rows import Row, length


def row(prompt: list[int], chosen: list[int], rejected: list[int], name: str = "r") -> Row:
    ids = [np.array(part, dtype=np.int32) for part in (prompt, chosen, rejected)]
    return Row(ids[0], (ids[1], ids[2]), id=name)


tokens = st.lists(st.integers(2, 99), min_size=1, max_size=6)
rows = st.lists(st.builds(row, tokens, tokens, tokens), min_size=1, max_size=6)


def test_a_batch_worked_by_hand() -> None:
    batch = collate([row([5, 6], [7], [8, 9], "a"), row([4], [3, 2, 1], [2], "b")], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [4, 3, 2, 1], [5, 6, 8, 9], [4, 2, 0, 0]]
    # The hidden state that predicts a token stands one place before it.
    assert batch["predict_at"].tolist() == [1, 4, 5, 6, 9, 10, 12]
    assert batch["targets"].tolist() == [7, 3, 2, 1, 8, 9, 2]
    assert batch["response_tokens"] == [[1, 3], [2, 1]]
    assert batch["real_tokens"] == 3 + 4 + 4 + 2
    assert batch["row_ids"] == ["a", "b"]


@given(rows)
def test_every_response_token_comes_back_to_its_pair(pairs: list[Row]) -> None:
    batch = collate(pairs)
    flat = batch["input_ids"].flatten()
    assert (flat[batch["predict_at"] + 1] == batch["targets"]).all()
    back = pair_logps(batch["targets"].double(), batch)
    for i, pair in enumerate(pairs):
        assert back.chosen[i][back.chosen_mask[i]].tolist() == pair.responses[0].tolist()
        assert back.rejected[i][back.rejected_mask[i]].tolist() == pair.responses[1].tolist()


def test_a_side_that_is_not_asked_for_is_not_in_the_batch() -> None:
    batch = collate([row([5], [6, 7], [8] * 50)], positions=(0,))
    assert batch["input_ids"].shape == (1, 3)
    logps = pair_logps(torch.zeros(2), batch)
    assert logps.rejected.shape == (1, 0)
    assert logps.rejected_mask.shape == (1, 0)


@given(rows, st.integers(1, 7))
def test_micro_batches_hold_every_pair_of_the_step_once(pairs: list[Row], size: int) -> None:
    batches = StepCollator(size)(pairs)["batches"]
    assert sorted(i for b in batches for i in b["row_ids"]) == sorted(p.id for p in pairs)
    assert all(b["rows"] <= size for b in batches)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 9), st.booleans())
def test_an_epoch_visits_every_row_once_and_depends_on_seed_and_epoch_alone(
    lengths: list[int], batch: int, by_length: bool
) -> None:
    order = epoch_order(lengths, batch, seed=3, epoch=2, by_length=by_length)
    assert sorted(order) == list(range(len(lengths)))
    assert order == epoch_order(lengths, batch, seed=3, epoch=2, by_length=by_length)
    if len(lengths) > 20:
        assert order != epoch_order(lengths, batch, seed=3, epoch=3, by_length=by_length)


def test_rows_of_similar_length_meet_when_grouped() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 2000).tolist()

    def padding(by_length: bool) -> float:
        order = epoch_order(lengths, 20, 0, 0, by_length)
        batches = [[lengths[i] for i in order[s : s + 20]] for s in range(0, 2000, 20)]
        return sum(max(b) * len(b) for b in batches) / sum(lengths) - 1

    assert padding(by_length=True) < 0.1 < padding(by_length=False)


def test_length_is_of_the_longer_row() -> None:
    assert length(row([1, 2], [3], [4, 5, 6])) == 5


def test_values_travel_with_their_rows() -> None:
    """A number a row, a response or a token; what a row lacks is in no batch that it is in."""
    tokens = (np.array([0.1]), np.array([0.2, 0.3]))
    values = {"weight": 2.0, "advantages": np.array([1.0, -1.0]), "behaviour": tokens}
    rows = [
        replace(row([5, 6], [7], [8, 9]), values=values),
        replace(row([4], [3], [2]), values={"weight": 1.0}),
    ]
    alone, both = collate(rows[:1]), collate(rows)
    assert alone["values"]["weight"].tolist() == [2.0]
    assert alone["values"]["advantages"].tolist() == [[1.0, -1.0]]
    assert alone["token_values"]["behaviour"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert both["values"]["weight"].tolist() == [2.0, 1.0]
    assert (list(both["values"]), both["token_values"]) == (["weight"], {})


def test_a_padded_batch_keeps_to_the_budget_where_rows_have_unequal_numbers_of_answers() -> None:
    ids = np.arange(1, 7, dtype=np.int32)
    judged = Row(ids[:4], (ids, ids[:0]), id="judged")
    pair = Row(ids[:4], (ids[:3], ids[3:6]), id="pair")
    collator = StepCollator(8, max_tokens=20)
    sizes = [
        collator.batch([(judged, pair)[i] for i in part])["input_ids"].numel()
        for part in collator.cut([judged, pair])
    ]
    assert max(sizes) <= 20


def test_token_values_that_do_not_cover_a_response_are_left_out_of_its_batch() -> None:
    """An answer to another prompt comes without what was known of the row's own."""
    ids = np.arange(1, 4, dtype=np.int32)
    known = (np.zeros(3, dtype=np.float32), np.zeros(2, dtype=np.float32))
    row = Row(ids, (ids, ids[:2], ids[:1]), {"behaviour": known}, "row")
    step = StepCollator(8)([row])
    assert "behaviour" in step["batches"][0]["token_values"]
    assert "behaviour" not in step["mismatched"][0]["token_values"]
