"""Weighted sums of objectives: their value, what they read, and what cannot be summed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimepo.errors import InputError
from slimepo.losses import bind, count, dpo, find_objective, hyperparameters, sft, slime, step_loss
from slimepo.losses.composed import option_key, shares_of, sum_name
from tests.losses.problems import POLICY, REFERENCE, slopes, softplus

NAME = "0.8*dpo+2.0*sft"


def test_a_sum_worked_by_hand() -> None:
    # 0.8 softplus(-0.1 * 5), and twice the NLL of two tokens, which are averaged over the step.
    output = bind(NAME, {"sft": {"average": "token"}})(POLICY, reference=REFERENCE)
    assert output.loss.item() == pytest.approx(0.8 * softplus(-0.5), rel=1e-14)
    assert output.token_loss["chosen"].item() == pytest.approx(2 * 3.0)
    assert step_loss(output, count(POLICY)).item() == pytest.approx(0.8 * softplus(-0.5) + 2 * 1.5, rel=1e-14)


def test_its_gradient_is_the_sum_of_the_parts() -> None:
    whole = slopes(bind(NAME, {})(POLICY, reference=REFERENCE), POLICY)
    of_dpo = slopes(dpo(POLICY, REFERENCE), POLICY)
    of_sft = torch.autograd.grad(sft(POLICY).loss.sum(), POLICY.chosen)[0]
    torch.testing.assert_close(whole[0], 0.8 * of_dpo[0] + 2 * of_sft, rtol=1e-14, atol=0)
    torch.testing.assert_close(whole[1], 0.8 * of_dpo[1], rtol=1e-14, atol=0)


def test_metrics_keep_the_name_of_their_part_and_those_of_the_pair_their_own() -> None:
    metrics = bind("0.5*dpo+0.5*slime", {})(POLICY, reference=REFERENCE).metrics
    assert metrics["logps/chosen"].item() == -1.5
    assert metrics["dpo/rewards/chosen"].item() == pytest.approx(0.2)
    assert metrics["loss/dpo"].item() == pytest.approx(softplus(-0.5))
    assert metrics["loss/slime"].item() == slime(POLICY).loss.item()
    assert "rewards/chosen" not in metrics


def test_it_reads_and_asks_for_what_any_part_does() -> None:
    objective = find_objective({"sft": 1, "slime/without-hard": 0.5})
    assert (objective.positions, objective.asks, objective.judged) == ((0, 1), (), False)
    assert find_objective("1*sft+1*reward_aware_rpo").asks == ("reference", "rewards")
    assert find_objective("1*dpo+1*tpo").positions == (0, 1, 2)
    assert find_objective("2*sft").positions == (0,)
    # Of one objective alone it is that objective, scaled.
    assert find_objective("0.5*kto").judged
    assert find_objective("0.5*kto", {"kto": {"reference_point": False}}).asks == ("reference",)


def test_options_stand_by_part_and_presets_under_the_name_of_their_objective() -> None:
    options = hyperparameters(find_objective("1*dpo+1*slime/without-hard").function)
    assert options["dpo"]["beta"] == 0.1
    assert options["slime"]["hard_gate"] == "one"
    bound = bind("1*dpo+1*slime/without-hard", {"slime": {"exponent": "1"}})
    assert bound(POLICY, reference=REFERENCE).metrics["loss/slime"].item() == pytest.approx(
        slime(POLICY, hard_gate="one", exponent=1.0).loss.item()
    )


def test_a_mapping_has_one_name_that_says_the_same() -> None:
    assert sum_name({"dpo": 0.8, "sft": 2}) == NAME
    assert shares_of(NAME) == shares_of(" 0.8 * dpo + 2e0*sft") == {"dpo": 0.8, "sft": 2.0}
    assert sum_name("dpo") == "dpo"
    assert shares_of("dpo") == {}


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        ({"dpo": -1}, {}, "the share of dpo = -1 is out of range: give a finite number >= 0"),
        ({"dpo": "much"}, {}, "the share of dpo = 'much'"),
        ({}, {}, "has no objective in it"),
        ("0.8*dpo+sft", {}, "'sft' is not SHARE\\*NAME with a number >= 0"),
        ("x*dpo", {}, "'x\\*dpo' is not SHARE"),
        ("1*dpo+nan*sft", {}, "'nan\\*sft' is not SHARE"),
        ("1*dpo+1*dpo", {}, "has dpo twice"),
        ("1*slime+1*slime/without-hard", {}, "would share their options"),
        ("1*dpo+1*stf", {}, "unknown loss 'stf' \\(did you mean 'sft'"),
        (NAME, {"beta": 0.2}, "has no part 'beta'.*; its options stand by part: dpo, sft"),
        (NAME, {"dpo": 0.2}, "dpo = 0.2: give the options of dpo"),
        (NAME, {"dpo": {"betta": 1}}, "loss 'dpo' has no hyperparameter 'betta'"),
        (NAME, {"dpo": {"beta": 0}}, "loss 'dpo': beta = 0"),
        ("1*dpo+1*kto", {}, "kto reads answers judged one by one, and cannot be summed"),
        ("1*dpo+1*grpo", {}, "grpo reads samples of the policy, and cannot be summed"),
        ("1*sft+1*bopo", {}, "bopo takes the weight of a row itself, and cannot be summed"),
    ],
)
def test_what_cannot_be_summed_is_named(loss: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bind(loss, options)


def test_a_share_of_0_leaves_no_slope() -> None:
    output = bind("0*dpo+1*sft", {})(POLICY, reference=REFERENCE)
    assert math.isclose(output.loss.item(), 1.5)
    assert not slopes(output, POLICY)[1].any()


class TestWpo:
    """A pair weighs as much as its answers are like the policy's own."""

    def test_a_weight_worked_by_hand(self) -> None:
        # Chosen: mean -1.5, against -1 for draws from the policy.
        even = replace(
            POLICY,
            chosen=torch.full_like(POLICY.chosen, -1.0),
            rejected=torch.full_like(POLICY.rejected, -1.0),
        )
        output = bind("wpo(dpo)", {"beta": 0.2})(POLICY, reference=REFERENCE, collision=even)
        plain = dpo(POLICY, REFERENCE, beta=0.2)
        means = [
            logps[mask].mean()
            for logps, mask in ((POLICY.chosen, POLICY.chosen_mask), (POLICY.rejected, POLICY.rejected_mask))
        ]
        weight = math.exp(means[0].item() + means[1].item() + 2.0)
        assert output.loss.item() == pytest.approx(weight * plain.loss.item(), rel=1e-12)
        assert output.metrics["wpo/weight"].item() == pytest.approx(weight, rel=1e-12)
        for ours, theirs in zip(slopes(output, POLICY), slopes(plain, POLICY), strict=True):
            torch.testing.assert_close(ours, weight * theirs)

    def test_it_asks_for_the_policys_squared_probabilities_and_has_the_options_of_what_it_weighs(
        self,
    ) -> None:
        assert find_objective("wpo(dpo)").asks == ("reference", "collision")
        assert find_objective(" wpo( simpo ) ").asks == ("collision",)
        assert hyperparameters(find_objective("wpo(simpo)").function)["gamma"] == 0.5
        assert option_key("wpo(slime/without-hard)") == "slime"

    def test_a_part_of_a_sum_has_them_alone(self) -> None:
        objective = find_objective({"wpo(dpo)": 0.8, "sft": 1})
        assert objective.asks == ("reference", "collision")
        unlike = replace(POLICY, chosen=torch.full_like(POLICY.chosen, 50.0))
        output = bind("0.8*wpo(dpo)+1*sft", {})(POLICY, reference=REFERENCE, collision=unlike)
        assert output.metrics["loss/dpo"].item() == pytest.approx(0.0, abs=1e-15)
        assert output.metrics["loss/sft"].item() == sft(POLICY).loss.item()

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("wpo(kto)", "kto does not compare a chosen answer with a rejected one"),
            ("wpo(sft)", "sft does not compare"),
            ("wpo(aot_unpaired)", "aot_unpaired sorts answers"),
            ("wpo(grpo)", "grpo does not compare"),
            ("wpo(0.5*dpo+1*sft)", r"weigh the parts of a sum, as in 0.8\*wpo\(dpo\)"),
            ("wpo(dpoo)", "unknown loss 'dpoo'.*did you mean 'dpo'"),
            ("1*wpo(dpo)+1*dpo", "two of its parts would share their options"),
        ],
    )
    def test_what_cannot_be_weighted_is_refused(self, name: str, words: str) -> None:
        with pytest.raises(InputError, match=words):
            bind(name, {})

    def test_a_function_of_ones_own_may_take_any_options(self, tmp_path: Path) -> None:
        (tmp_path / "own.py").write_text(
            "from slimepo.losses import simpo\n\n\ndef mine(policy, **options):\n    return simpo(policy, **options)\n"
        )
        assert find_objective(f"wpo({tmp_path}/own.py:mine)").asks == ("collision",)
