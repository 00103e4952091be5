"""The forecast of displacement against plain computations, what it means for a step, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.losses import dpo, simpo, slime
from slimepo.plan.displacement import forecast, lowest, slime_bound
from slimepo.types import LossOutput, PairLogps
from tests.command import slimepo
from tests.tiny import letter_tokenizer, random_rows, tiny_model


def plain(model, row: Row, position: int) -> tuple[Tensor, Tensor]:
    """Log-probs of an answer's tokens, and the last hidden states that predict them: `[tokens]`, `[tokens, H]`."""
    prompt, answer = (torch.from_numpy(ids).long() for ids in (row.prompt_ids, row.responses[position]))
    output = model(torch.cat([prompt, answer])[None], output_hidden_states=True)
    at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    logps = output.logits[0, at].log_softmax(-1).gather(1, answer[:, None])[:, 0]
    return logps, output.hidden_states[-1][0, at]


def test_ches_and_margins_are_the_definitions() -> None:
    model, rows = tiny_model(), random_rows(7)
    found = forecast(model, rows, 0, batch_size=3)
    for row, ches, margin in zip(rows, found.ches, found.margin, strict=True):
        (w, hidden_w), (l, hidden_l) = plain(model, row, 0), plain(model, row, 1)  # noqa: E741
        total_w, total_l = hidden_w.double().sum(0), hidden_l.double().sum(0)
        wanted = total_w @ total_l / (len(w) * len(l)) - total_w @ total_w / len(w) ** 2
        assert ches == pytest.approx(wanted.item(), rel=1e-5, abs=1e-7)
        assert margin == pytest.approx((w.mean() - l.mean()).item(), abs=1e-5)
    assert np.isnan(found.ratio).all()


def test_the_ratio_is_that_of_plain_gradients() -> None:
    model, rows = tiny_model("gpt2").eval(), random_rows(3)
    found = forecast(model, rows)
    for row, ratio in zip(rows, found.ratio, strict=True):
        w, l = (  # noqa: E741
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(plain(model, row, i)[0].mean(), [*model.parameters()])
                ]
            )
            for i in (0, 1)
        )
        assert ratio == pytest.approx((w @ l / (w @ w)).item(), rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_step_does_what_is_foretold(seed: int) -> None:
    """Of each objective, on one pair alone, with the floor off."""
    start, rows = tiny_model(seed=seed), random_rows(4, seed=seed)
    # A third and fourth pair whose answers nearly agree, as those that displace do.
    twin = rows[0].responses[0].copy()
    twin[-1] = 2 + (twin[-1] - 1) % 50
    rows[2] = Row(rows[0].prompt_ids, (rows[0].responses[0], twin), id="twins")
    rows[3] = Row(
        rows[1].prompt_ids, (rows[1].responses[0][:2], np.tile(rows[1].responses[0][:2], 4)), id="longer"
    )
    found = forecast(start, rows)
    steps = {
        "dpo": lambda pair, reference: dpo(pair, reference),
        "simpo": lambda pair, _: simpo(pair),
        "slime": lambda pair, _: slime(pair, rejected_weight=0.0),
    }
    for name, objective in steps.items():
        for i, row in enumerate(rows):
            if abs(found.ratio[i] - found.bounds[name][i]) > 0.02:
                assert falls(start, row, objective) == bool(found.fall(name)[i]), (name, row.id)
    assert {name: set(found.fall(name)) for name in steps} != {name: {0.0} for name in steps}


def falls(start, row: Row, objective) -> bool:
    model = tiny_model()
    model.load_state_dict(start.state_dict())
    sides = [plain(model, row, i)[0][None] for i in (0, 1)]
    masks = [torch.ones_like(side, dtype=torch.bool) for side in sides]
    pair = PairLogps(sides[0], masks[0], sides[1], masks[1])
    reference = PairLogps(sides[0].detach(), masks[0], sides[1].detach(), masks[1])
    output: LossOutput = objective(pair, reference)
    output.loss.sum().backward()
    slope = sum(p.grad.square().sum() for p in model.parameters()) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 / slope * parameter.grad
        return plain(model, row, 0)[0].mean().item() < sides[0].mean().item()


def test_slimes_slack_is_8_percent_at_the_least_and_has_no_end_past_the_hard_margin() -> None:
    # D is largest at a margin of 0.331: 1.2309.
    margins = np.linspace(-3, 1.499, 10_001)
    bounds = slime_bound(margins)
    assert margins[bounds.argmin()] == pytest.approx(0.331, abs=1e-3)
    assert bounds.min() == pytest.approx(1 + 0.1 / 1.2309, abs=1e-5)
    assert slime_bound(np.array([1.5, 2.0])).tolist() == [np.inf, np.inf]


def test_pairs_that_are_kept_have_the_lowest_scores() -> None:
    found = forecast(tiny_model(), random_rows(10), 0)
    kept = lowest(found, 0.3)
    assert kept == {found.ids[i] for i in np.argsort(found.ches)[:3]}
    assert len(lowest(found, 0.0)) == 1


def test_rows_without_pairs_are_refused() -> None:
    demonstration = Row(*random_rows(1)[0].responses[:1], (random_rows(1)[0].responses[0],))
    with pytest.raises(InputError, match="no row has a chosen and a rejected answer"):
        forecast(tiny_model(), [demonstration])


def test_the_command_shows_the_worst_pairs_and_writes_the_rest(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "abc"[: 1 + i % 3], "chosen": "d" * (1 + i), "rejected": "e" * (12 - i), "note": i}
        for i in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "pairs.jsonl"
    done = slimepo("data", "check", data, "--displacement", tmp_path / "model", "--gradient-pairs", 4,
                   "--keep", tmp_path / "kept.jsonl", "--keep-share", 0.8)  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "CHES of 10 pairs, per token" in told
    for objective in ("dpo", "simpo", "slime"):
        assert f"{objective}: a small step on the pair alone lowers the chosen answer of" in told
    assert "8 of 10 pairs written to" in told
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 8
    assert all(row in rows for row in kept)
    for arguments, words in (
        (["--keep", data], "--keep goes with --displacement"),
        (["--model", tmp_path / "model", "--keep-share", 0.5], "--keep FILE writes: give that too"),
        (["--model", tmp_path / "model", "--gradient-pairs", 5], "--gradient-pairs goes with --displacement"),
        (["--model", "other", "--displacement", tmp_path / "model"], "leave --model out"),
        ([], "give --model, whose tokens are counted, or --displacement"),
        (["--displacement", tmp_path / "model", "--keep", data], "is the file that is read"),
        (["--displacement", tmp_path / "nothing"], "nothing"),
    ):
        refused = slimepo("data", "check", data, *arguments)
        assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
        assert words in refused.stderr
