import csv
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, peers, step
from benchmarks.memory import forget_peak, peak, settle
from benchmarks.record import append_csv
from benchmarks.rows import Lengths, benchmark_rows, cut_vocabulary, equal_rows, mean_lengths, tiny_rows
from benchmarks.worker import random_model
from slimepo.data.batch import collate_packed
from slimepo.model.attention.interface import install
from slimepo.model.logps import install_logps, policy_logps

# TRL's configs set it themselves.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")

MODEL = step.TINY | {"vocab_size": 97}


@pytest.fixture
def setup(tmp_path):
    rows = cut_vocabulary(tiny_rows(4)[0], 97)
    return peers.Setup([rows[:2], rows[2:]], tmp_path)


def built(name, setup):
    model = random_model(MODEL)
    return model, contenders.CONTENDERS[name].build(model, setup)


def test_a_quick_run_measures_contenders_and_writes_them_to_csv(tmp_path):
    out = tmp_path / "results" / "step.csv"
    # A process each, most of whose time goes into its imports; the others' steps are tried in this process below.
    asked = ["slimepo shared", "slimepo packed", "slimepo padded", "TRL SimPO"]
    step.main(["--quick", "--out", str(out), "--only", *asked])

    with out.open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert set(asked) <= set(rows)
    assert all(float(row["cpu_s"]) > 0 and row["commit"] and row["torch"] for row in rows.values())
    assert float(rows["slimepo shared"]["times_baseline"]) == 1
    layouts = [float(rows[f"slimepo {layout}"]["loss"]) for layout in ("shared", "packed", "padded")]
    assert layouts == pytest.approx([layouts[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("name", ["slimepo packed", "slimepo padded", "slimepo shared, checkpointed"])
def test_every_layout_gives_the_gradients_of_the_shared_one(name, setup):
    shared, shared_step = built("slimepo shared", setup)
    other, other_step = built(name, setup)

    assert other_step() == pytest.approx(shared_step(), rel=1e-6)
    for one, two in zip(shared.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_trl_sees_the_same_tokens_as_slimepo(setup):
    model, trl_step = built("TRL SimPO", setup)
    trl_loss = trl_step()
    # SimPO in slimepo's own log-probs: -logsigmoid(beta * difference of means - gamma).
    install_logps(model)
    install(model)
    losses = []
    for pairs in setup.micro_batches:
        logps = policy_logps(model, collate_packed(pairs))
        means = [
            (values * mask).sum(dim=1) / mask.sum(dim=1)
            for values, mask in ((logps.chosen, logps.chosen_mask), (logps.rejected, logps.rejected_mask))
        ]
        losses.append(-torch.nn.functional.logsigmoid(2.0 * (means[0] - means[1]) - 0.5))
    assert trl_loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_trl_dpo_at_its_best_is_the_same_objective(setup):
    losses = []
    gradients = []
    for name in ("TRL DPO", "TRL DPO at its best"):
        model, dpo_step = built(name, setup)
        losses.append(dpo_step())
        gradients.append([parameter.grad for parameter in model.parameters()])

    assert losses == pytest.approx([torch.log(torch.tensor(2.0)).item()] * 2, rel=1e-5)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_authors_loss_by_hand():
    # One pair: chosen tokens -1 and -3 (mean -2), rejected one token -4 and one of probability 1, which is skipped.
    logps = torch.tensor([[-1.0, -3.0], [-4.0, 0.0]])
    mask = torch.tensor([[True, True], [True, True]])
    delta = -2.0 - -2.0
    expected = (
        0.1 * 2.0
        + 0.0005 * torch.nn.functional.softplus(torch.tensor(4.0 - 1.25)).item() ** 2.5
        + 1.5 * torch.sigmoid(torch.tensor(-2.5 * (delta - 1.0))).item()
    )
    assert peers._authors_loss(logps, mask).item() == pytest.approx(expected)


def test_the_slime_authors_step_trains_the_policy_alone(setup):
    model, authors_step = built("SLIME authors", setup)

    assert authors_step() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_rows_are_folded_into_the_vocabulary_and_keep_their_lengths(tmp_path):
    rows, source = benchmark_rows(8, shared=tmp_path)
    assert source.startswith("generated")
    cut = cut_vocabulary(rows, 97)
    assert mean_lengths(cut) == mean_lengths(rows)
    assert min(row.responses[0].min() for row in cut) >= 2
    assert max(row.responses[0].max() for row in cut) < 97
    assert mean_lengths(equal_rows(3, Lengths(5, 6, 7))) == Lengths(5, 6, 7)


def test_real_rows_stand_for_the_whole_file(official_data: Path):
    few, source = benchmark_rows(24, shared=official_data)
    many, _ = benchmark_rows(400, shared=official_data)
    assert source.startswith("UltraFeedback")
    assert mean_lengths(few).prompt == pytest.approx(mean_lengths(many).prompt, rel=0.1)


def test_the_peak_sees_memory_that_is_gone_again():
    idle = settle()
    forget_peak()
    block = torch.ones(32 * 2**20 // 4)
    del block
    assert peak() - idle > 30 * 2**20


def test_a_file_with_other_columns_is_not_mixed_up(tmp_path):
    out = tmp_path / "results.csv"
    append_csv(out, [{"a": 1}])
    append_csv(out, [{"a": 2}])
    assert out.read_text().split() == ["a", "1", "2"]
    with pytest.raises(ValueError, match="other columns"):
        append_csv(out, [{"b": 1}])
