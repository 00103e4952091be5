"""KTO: judged answers worked by hand, the reference point, weights, rows with one side."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError
from slimepo.losses import bind, find_objective, kto
from slimepo.types import PairLogps
from tests.losses.problems import pairs_of, sigmoid

log_ratios = st.floats(-30, 30)
ZERO = torch.zeros(())


def judged(ratio: float, desirable: bool) -> tuple[PairLogps, PairLogps]:
    """One answer of two tokens with that log-ratio to the reference, on the side where it belongs."""
    answer, reference = [ratio / 2 - 40.0] * 2, [-40.0] * 2
    if desirable:
        return pairs_of([answer], [[]]), pairs_of([reference], [[]])
    return pairs_of([[]], [answer]), pairs_of([[]], [reference])


class TestValue:
    def test_a_desirable_answer_worked_by_hand(self) -> None:
        # 0.1 (3 - 1) = 0.2.
        loss = kto(*judged(3.0, True), torch.tensor(1.0)).loss.item()
        assert loss == pytest.approx(1 - sigmoid(0.2), rel=1e-12)

    def test_an_undesirable_answer_worked_by_hand(self) -> None:
        # 0.1 (1 - 3) = -0.2.
        loss = kto(*judged(3.0, False), torch.tensor(1.0)).loss.item()
        assert loss == pytest.approx(1 - sigmoid(-0.2), rel=1e-12)

    def test_weights(self) -> None:
        weights = {"desirable_weight": 1.5, "undesirable_weight": 0.25}
        for desirable, weight in ((True, 1.5), (False, 0.25)):
            plain = kto(*judged(2.0, desirable), ZERO).loss.item()
            assert kto(*judged(2.0, desirable), ZERO, **weights).loss.item() == pytest.approx(weight * plain)

    @given(st.floats(0, 20))
    def test_at_the_reference_point_either_answer_costs_half(self, z0: float) -> None:
        for desirable in (True, False):
            loss = kto(*judged(z0, desirable), torch.tensor(z0, dtype=torch.float64)).loss.item()
            assert loss == pytest.approx(0.5, rel=1e-12)

    @given(log_ratios)
    def test_the_two_judgements_of_an_answer_add_up_to_one(self, ratio: float) -> None:
        z0 = torch.tensor(0.5)
        both = sum(kto(*judged(ratio, desirable), z0).loss.item() for desirable in (True, False))
        assert both == pytest.approx(1, rel=1e-12)

    def test_a_loss_close_to_zero_keeps_its_digits(self) -> None:
        # 1 - sigma(x) in floats is 0 from x = 37 on; the loss is exp(-x).
        policy, reference = judged(80.0, True)
        assert kto(policy, reference, ZERO, beta=1.0).loss.item() == pytest.approx(
            math.exp(-80), rel=1e-10, abs=0
        )


class TestReferencePoint:
    @pytest.mark.parametrize("divergence", [torch.tensor(0.0), torch.tensor(-5.0)])
    def test_it_is_never_below_zero(self, divergence: torch.Tensor) -> None:
        output = kto(*judged(2.0, True), divergence)
        assert output.loss.item() == pytest.approx(1 - sigmoid(0.2), rel=1e-12)
        assert output.metrics["z0"].tolist() == [0]

    def test_it_is_shown(self) -> None:
        assert kto(*judged(2.0, True), torch.tensor(0.75)).metrics["z0"].tolist() == [0.75]

    def test_without_one_it_is_the_reference_itself(self) -> None:
        # APO-zero of one answer: 1 - sigma(0.2) for a good one, sigma(0.2) for a bad one.
        assert "divergence" not in find_objective("kto", {"reference_point": False}).asks
        for desirable, worked in ((True, 1 - sigmoid(0.2)), (False, sigmoid(0.2))):
            output = kto(*judged(2.0, desirable), reference_point=False)
            assert output.loss.item() == pytest.approx(worked, rel=1e-12)
            assert "z0" not in output.metrics

    def test_no_gradient_flows_through_it(self) -> None:
        policy, reference = judged(2.0, True)
        divergence = torch.tensor(0.75, requires_grad=True)
        kto(policy, reference, divergence).loss.sum().backward()
        assert divergence.grad is None
        # As for a constant: -beta sigma(h) (1 - sigma(h)) for each token, h = 0.1 (2 - 0.75).
        s = sigmoid(0.125)
        assert policy.chosen.grad[0, :2].tolist() == pytest.approx([-0.1 * s * (1 - s)] * 2, rel=1e-10)

    def test_it_raises_the_bar_for_good_answers_and_lowers_it_for_bad_ones(self) -> None:
        for desirable, harder in ((True, True), (False, False)):
            low, high = (kto(*judged(1.0, desirable), torch.tensor(z)).loss.item() for z in (0.0, 2.0))
            assert (high > low) == harder


class TestRows:
    def test_gradients_push_good_answers_up_and_bad_ones_down(self) -> None:
        good, reference = judged(0.0, True)
        kto(good, reference, ZERO).loss.sum().backward()
        assert good.chosen.grad[0, :2].tolist() == pytest.approx([-0.025] * 2)
        bad, reference = judged(0.0, False)
        kto(bad, reference, ZERO).loss.sum().backward()
        assert bad.rejected.grad[0, :2].tolist() == pytest.approx([0.025] * 2)

    def test_a_row_with_both_answers_has_the_mean_and_one_with_none_nothing(self) -> None:
        policy = pairs_of([[-1.0], [], []], [[-2.0], [-2.0], []])
        reference = pairs_of([[-3.0], [], []], [[-5.0], [-5.0], []])
        good, bad = 1 - sigmoid(0.2), 1 - sigmoid(-0.3)
        assert kto(policy, reference, ZERO).loss.tolist() == pytest.approx(
            [(good + bad) / 2, bad, 0], rel=1e-12
        )

    def test_absent_answers_have_no_metrics(self) -> None:
        metrics = kto(*judged(2.0, False), ZERO).metrics
        assert math.isnan(metrics["rewards/chosen"].item())
        assert math.isnan(metrics["logps/chosen"].item())
        assert math.isnan(metrics["margin"].item())
        assert metrics["rewards/rejected"].item() == pytest.approx(0.2)


def test_the_table_says_what_it_needs() -> None:
    objective = find_objective("kto")
    assert objective.judged
    assert objective.asks == ("reference", "divergence")
    bind("kto", {"beta": 0.3})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0}, "beta.*> 0"),
        ({"desirable_weight": -1}, "desirable_weight.*>= 0"),
        ({"undesirable_weight": math.nan}, "undesirable_weight.*>= 0"),
    ],
)
def test_bad_hyperparameters_are_named_with_their_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kto(*judged(1.0, True), ZERO, **options)
