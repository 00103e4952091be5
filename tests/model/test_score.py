"""The loop that only scores, and what it says of held-out pairs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from slimepo.data.batch import StepCollator
from slimepo.data.rows import PAIR, Row
from slimepo.model.logps import install_logps
from slimepo.model.modes import scoring
from slimepo.model.score import PairScores, distributions, histogram, score_pairs, score_rows
from slimepo.model.tryout import choose_layout
from tests.tiny import random_rows, tiny_model


def plain_numbers(model: Any, row: Row, position: int) -> np.ndarray:
    """`[3, tokens]`: log-probs, entropies and top1 of a response from the model's own logits."""
    prompt, response = (torch.from_numpy(ids).long() for ids in (row.prompt_ids, row.response(position)))
    with torch.no_grad():
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].double()
    logps = logits.log_softmax(-1)
    of_tokens = logps.gather(1, response[:, None])[:, 0]
    entropy = -(logps.exp() * logps).sum(-1)
    return torch.stack([of_tokens, entropy, (of_tokens == logps.amax(-1)).double()]).numpy()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_every_response_token_has_its_numbers_in_the_order_of_the_rows(layout: Any) -> None:
    model, rows = tiny_model(), random_rows(7)
    # A judged answer has one side, and a row may have none of those that are asked for.
    rows[2] = Row(rows[2].prompt_ids, (rows[2].responses[0][:0], rows[2].responses[1]), id="judged")
    rows[4] = Row(rows[4].prompt_ids, (), id="no answer")
    expected = [[plain_numbers(model, row, p) for p in PAIR if len(row.response(p))] for row in rows]
    install_logps(model)
    if layout != "padded":
        choose_layout(model, layout)
    done: list[tuple[int, int]] = []
    collator = StepCollator(3, layout=layout)
    with scoring(model) as forward:
        found = score_rows(
            forward, rows, collator, torch.device("cpu"), stats=True, report=lambda *of: done.append(of)
        )
    for row, of_row, numbers in zip(rows, found, expected, strict=True):
        assert [each.shape[1] for each in of_row] == [len(row.response(p)) for p in PAIR]
        for ours, plain in zip((each for each in of_row if each.size), numbers, strict=True):
            np.testing.assert_allclose(ours, plain, atol=2e-6)
    assert done[-1] == (7, 7)


def test_no_batch_is_over_the_budget_and_pairs_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, sizes = tiny_model(), random_rows(16), []
    real = StepCollator.batch

    def spy(self: StepCollator, *args: Any) -> Any:
        batch = real(self, *args)
        sizes.append(batch["input_ids"].numel())
        return batch

    whole = score_pairs(model, rows)
    monkeypatch.setattr(StepCollator, "batch", spy)
    cut = score_pairs(model, rows, collator=StepCollator(16, max_tokens=70))
    assert len(sizes) > 3
    assert max(sizes) <= 70
    np.testing.assert_allclose(cut.chosen, whole.chosen, atol=1e-6)
    np.testing.assert_allclose(cut.rejected, whole.rejected, atol=1e-6)
    first = plain_numbers(model, rows[0], 0)[0]
    assert whole.chosen[0] == pytest.approx(first.mean(), abs=1e-6)


def test_both_sides_share_bins_and_every_value_is_counted() -> None:
    made = histogram([0.0, 1.0, 2.0], [1.0, 4.0, math.nan, 10.0], bins=5)
    assert len(made["edges"]) == 6
    assert sum(made["before"]) == sum(made["after"]) == 3
    # 99 % of six values between 0 and 10 is nearly all of the range.
    assert made["edges"][0] == pytest.approx(0.0, abs=0.1)
    assert made["edges"][-1] == pytest.approx(10.0, abs=0.2)
    # Bins of two: 0 and 1 in the first, 2 on its edge or just over it.
    assert made["before"][0] + made["before"][1] == 3
    assert made["after"][-1] == 1


def test_values_far_out_count_in_the_end_bins() -> None:
    values = [*np.linspace(0, 1, 2000), -1e6]
    made = histogram(values, values)
    assert made["edges"][0] == pytest.approx(0, abs=0.01)
    assert sum(made["before"]) == 2001


def test_equal_values_and_no_values() -> None:
    assert sum(histogram([2.0, 2.0], [2.0])["before"]) == 2
    assert histogram([], [1.0]) == {}
    assert histogram([math.nan], [1.0]) == {}


def test_margins_and_rejected_tokens_are_told_and_demonstrations_have_none() -> None:
    tokens = [np.array([-1.0, -3.0]), np.array([-2.0])]
    before = PairScores(np.array([-0.5, -1.0]), np.array([-2.0, -2.0]), tokens)
    after = PairScores(np.array([-0.5, np.nan]), np.array([-2.0, -2.0]), tokens)
    made = distributions(before, after)
    assert (sum(made["margin"]["before"]), sum(made["margin"]["after"])) == (2, 1)
    assert sum(made["rejected_tokens"]["after"]) == 3
    one_sided = PairScores(np.array([-0.5]), np.zeros(0), [])
    assert distributions(one_sided, one_sided) == {}
