"""The calculation of docs/scale.md, on a tiny model."""

import pytest

from benchmarks import scale
from benchmarks.flops import step_flops
from benchmarks.gpu import MODELS

TINY = MODELS["llama-3.2-3b"] | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 199,
}  # fmt: skip


@pytest.fixture
def tables(monkeypatch, capsys):
    monkeypatch.setattr(scale, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(scale, "GIB", 1)
    step = scale.planned_step(TINY, None)
    return list(scale.memory_rows("tiny", "all weights", step)), list(
        scale.time_rows("tiny", "all weights", step)
    )


def test_sixty_four_devices_hold_an_eighth_of_the_optimizer_of_eight(tables):
    held = {(row["engine"], row["devices"]): float(row["optimizer"]) for row in tables[0]}
    alone = held["", 1]
    assert held["ddp", 8] == alone
    assert held["fsdp2", 8] == pytest.approx(alone / 8, abs=1)
    assert held["fsdp2", 64] == pytest.approx(alone / 64, abs=1)


def test_the_papers_run_costs_as_much_on_more_devices_where_sending_costs_the_same(tables):
    ddp = {row["devices"]: row for row in tables[1] if row["engine"] == "ddp"}
    assert float(ddp[512]["paper_hours"]) == pytest.approx(float(ddp[64]["paper_hours"]) / 8, abs=1e-3)
    assert ddp[512]["pairs_an_hour"] == pytest.approx(8 * ddp[64]["pairs_an_hour"], rel=1e-6)


def test_six_operations_a_trained_weight_and_token_and_four_a_frozen_one():
    lengths = scale.LENGTHS._replace(prompt=1, chosen=1, rejected=0)
    one_layer = dict(TINY, num_hidden_layers=1)
    whole, frozen = (step_flops(one_layer, lengths, 1, rank, shared=False) for rank in (None, 0))
    projections = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    # Three tokens go through the layer: prompt and chosen, and the prompt of the rejected answer.
    assert whole - frozen == 3 * 2 * projections
