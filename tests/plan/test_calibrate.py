"""Knobs from scores: worked numbers, closed forms against autograd, a whole command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimepo.data.batch import StepCollator, pair_logps
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.losses import hyperparameters, slime
from slimepo.model.logps import install_logps, response_logps
from slimepo.model.score import PairScores, score_pairs
from slimepo.plan.calibrate import calibrate, floor_pull, fragment, rate_range, separation_pulls
from slimepo.settings import parse_value
from slimepo.types import PairLogps
from tests.command import slimepo
from tests.tiny import letter_tokenizer, random_rows, tiny_model

PAPER: dict[str, Any] = {key: value for key, value in hyperparameters(slime).items() if type(value) is float}


def scores(chosen: list[float], rejected: list[float], tokens: int = 20) -> PairScores:
    of_tokens = [np.linspace(2 * mean, 0, tokens) for mean in rejected]
    return PairScores(np.array(chosen), np.array(rejected), of_tokens)


def spread_scores() -> PairScores:
    margins = np.linspace(-0.5, 1.5, 101)
    return scores([-1.0] * 101, [*(-1.0 - margins)])


def test_margins_stand_to_pairs_as_the_paper_s_do_in_units_of_one_deviation() -> None:
    found = calibrate(spread_scores())
    # Margins evenly from -0.5 to 1.5: median 0.5, deviation 0.5860.
    assert found.margins["deviation"] == pytest.approx(0.5860, abs=1e-4)
    assert found.options["hard_margin"] == pytest.approx(0.5 + 1.5 * 0.5860, rel=0.05)
    assert found.options["soft_margin"] == pytest.approx(0.5 + 1.0 * 0.5860, rel=0.05)
    assert found.options["sharpness"] == pytest.approx(2.5 / 0.5860, rel=0.05)


def test_a_shift_of_all_margins_shifts_both_margins_and_a_stretch_stretches_them() -> None:
    one = calibrate(spread_scores())
    margins = 3 + 2 * np.linspace(-0.5, 1.5, 101)
    other = calibrate(scores([-1.0] * 101, [*(-1.0 - margins)]))
    for key in ("hard_margin", "soft_margin"):
        assert other.options[key] == pytest.approx(3 + 2 * one.options[key], rel=0.05)
    assert other.options["sharpness"] == pytest.approx(one.options["sharpness"] / 2, rel=0.05)
    # The pull does not depend on the scale, so neither does the anchor that equals it.
    assert other.options["chosen_weight"] == pytest.approx(one.options["chosen_weight"], rel=0.05)


def test_a_margin_that_slime_refuses_is_not_proposed() -> None:
    # Chosen answers of another's, rejected ones of the model's own: all margins lie far below zero.
    found = calibrate(scores([-3.0] * 101, [*(-3.0 - np.linspace(-2.9, -2.0, 101))]))
    assert found.options["hard_margin"] == 0
    assert found.options["soft_margin"] < 0
    pair = PairLogps(
        torch.tensor([[-3.0]]),
        torch.tensor([[True]]),
        torch.tensor([[-0.5]]),
        torch.tensor([[True]]),
    )
    assert slime(pair, **found.options).loss.isfinite().all()


def test_so_many_rejected_tokens_lie_under_the_floor() -> None:
    found = calibrate(spread_scores())
    tokens = np.concatenate(spread_scores().rejected_tokens)
    assert np.mean(tokens < -found.options["threshold"]) == pytest.approx(0.05, abs=0.01)


def test_the_pulls_are_the_loss_s_own_gradients() -> None:
    given = spread_scores()
    found = calibrate(given)
    chosen = torch.tensor(given.chosen)[:, None].requires_grad_()
    shift = torch.zeros(101, 1, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(np.array(given.rejected_tokens)) + shift
    true = torch.ones_like(rejected, dtype=torch.bool)
    for knobs, terms in ((PAPER, found.terms["paper"]), (PAPER | found.options, found.terms["proposal"])):
        pairs = PairLogps(chosen, true[:, :1], rejected, true)
        by_chosen, by_rejected = torch.autograd.grad(slime(pairs, **knobs).loss.mean(), (chosen, shift))
        assert -by_chosen.sum().item() == pytest.approx(terms["chosen"] + terms["distance"])
        assert by_rejected.sum().item() == pytest.approx(terms["distance"] - terms["rejected"])


def test_worked_pulls() -> None:
    # At Delta = 0: v = sigmoid(2.5) = 0.92414, u = 1.5: v + 2.5 u v (1 - v) = 1.18703.
    assert separation_pulls(np.zeros(3), PAPER) == pytest.approx([1.18703] * 3, abs=1e-5)
    assert separation_pulls(np.array([1.6]), PAPER) == 0
    # At l = -1.25: softplus(0) = ln 2; 0.1 * 2.5 * (ln 2)^1.5 / 2 = 0.072135.
    assert floor_pull([np.array([-1.25])], PAPER) == pytest.approx(0.072135, abs=1e-6)


def test_the_fragment_is_a_stage() -> None:
    stage = parse_value(fragment(calibrate(spread_scores())))[0]
    assert stage["loss"] == "slime"
    assert stage["loss_options"].keys() <= PAPER.keys()


def test_rates_that_meet_are_no_range() -> None:
    """Where training takes one step, steps that agree and steps that do not are the same."""
    found = calibrate(spread_scores())
    of_one = fragment(replace(found, rates=(2e-4, 2e-4), steps=1))
    assert (
        "learning_rate: 2e-4  # for 1 step; more steps (a smaller batch_size, more epochs) give a range"
        in of_one
    )
    of_many = fragment(replace(found, rates=(1e-5, 1e-4), steps=100))
    assert "learning_rate: 3e-5  # worth trying in 100 steps: 1e-5 to 1e-4" in of_many
    assert parse_value(of_one)[0]["learning_rate"] == 2e-4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (scores([-1.0] * 19, [-2.0] * 19), "19 pairs have both answers; 20 are the least"),
        (scores([-1.0] * 30, [-2.0] * 30), "the same margin"),
        (PairScores(np.full(30, -1.0), np.zeros(0), []), "0 pairs have both answers"),
    ],
)
def test_what_tells_nothing_is_refused(given: PairScores, words: str) -> None:
    with pytest.raises(InputError, match=words):
        calibrate(given)


def test_the_lowest_rate_moves_the_loss_by_one_nat_if_all_steps_agree() -> None:
    model, rows = tiny_model(), random_rows(24, seed=1)
    low, high = rate_range(model, rows, PAPER, steps=100)
    assert high == pytest.approx(low * 10)
    # One of Adam's first steps at that rate, times half of a hundred: to first order, one nat.
    before = _loss(model, rows)
    install_logps(model)
    batch = StepCollator(len(rows)).batch(rows)
    torch.autograd.backward(slime(pair_logps(response_logps(model, batch), batch), **PAPER).loss.mean())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= low / 100 * parameter.grad.sign()
    assert 100 * (before - _loss(model, rows)) == pytest.approx(2 / 100, rel=0.05)


def _loss(model: Any, rows: list[Row]) -> float:
    found = score_pairs(model, rows)
    tokens = [torch.tensor(each) for each in found.rejected_tokens]
    width = max(map(len, tokens))
    rejected = torch.stack([torch.nn.functional.pad(each, (0, width - len(each))) for each in tokens])
    mask = torch.arange(width) < torch.tensor([len(each) for each in tokens])[:, None]
    chosen = torch.tensor(found.chosen)[:, None]
    pairs = PairLogps(chosen, torch.ones_like(chosen, dtype=torch.bool), rejected, mask)
    return slime(pairs, **PAPER).loss.mean().item()


def test_the_command_proposes_a_stage_and_draws(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "ab", "chosen": "abc"[: 1 + i % 3], "rejected": "cba"[: 1 + i % 2] + "d" * (i % 5)}
        for i in range(60)
    ]
    rows.append({"prompt": "a", "response_a": "b", "response_b": "c", "preferred": "tie"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "pairs.jsonl",
        "adapter=none",
        "batch_size=8",
    ]
    done = slimepo("calibrate", *given, "--plot", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    assert "- loss: slime\n  learning_rate: " in done.stdout
    assert "note: 1 tie left out" in done.stdout
    assert (tmp_path / "plot.png").stat().st_size > 1000
    plot = tmp_path / "new" / "plot.svg"
    found = json.loads(slimepo("calibrate", *given, "--json", "--plot", plot).stdout)
    assert plot.is_file()
    assert found["options"].keys() == found["reasons"].keys()
    assert found["rates"][0] < found["rates"][1]
    wrong = slimepo("calibrate", *given, "epoch=1")
    assert (wrong.returncode, "did you mean 'epochs'" in wrong.stderr) == (2, True)
    for words, told in (
        (["loss=dpo"], "leave loss, loss_options and rollouts out"),
        (["loss_options.exponent=2"], "leave loss, loss_options and rollouts out"),
        (["--plot", tmp_path], f"--plot {tmp_path} is a folder"),
        (["--plot", tmp_path / "plot.xyz"], "ends in .png or .svg"),
        (["data.limit=15"], "pairs have both answers; 20 are the least"),
    ):
        wrong = slimepo("calibrate", *given, *words)
        assert (wrong.returncode, told in wrong.stderr) == (2, True), wrong.stderr
