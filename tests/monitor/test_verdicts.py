"""When the monitor speaks: thresholds, hysteresis, plain words."""

from typing import Any

import pytest

from slimepo.monitor.verdicts import Verdict, answers_fact, facts, heldout_facts, judge_answers, judge_pairs

START = {
    "chosen": -0.5, "chosen_pairs": 64, "chosen_change": 0.0, "chosen_change_error": 0.0, "chosen_fell": 0.0,
    "accuracy": 0.6, "margin": 0.2, "rejected_below_floor": 0.2, "rejected_p5": -2.0, "entropy": 0.5,
}  # fmt: skip


def verdict(kind: str, on: bool = False, rows: str = "train", **now: Any) -> Verdict:
    held: dict[Any, bool] = {(kind, rows): on}
    found = judge_pairs({"train": None, rows: START | now}, {rows: START}, held)
    return next(v for v in found if v.kind == kind)


def test_where_nothing_has_moved_nothing_is_said() -> None:
    verdicts = judge_pairs({"train": START, "heldout": START}, {"train": START, "heldout": START}, {})
    kinds = [(v.kind, v.rows) for v in verdicts]
    assert kinds == [(k, s) for k in ("unlearning", "floor", "entropy") for s in ("train", "heldout")]
    assert not any(v.holds for v in verdicts)


def test_of_what_is_not_there_nothing_is_said() -> None:
    """A demonstration has no rejected answer, a judged answer one of the two."""
    absent = dict.fromkeys(("rejected_below_floor", "rejected_p5", "entropy", "chosen_change"))
    assert (
        judge_pairs({"train": START | absent, "heldout": None}, {"train": START, "heldout": None}, {}) == []
    )


class TestUnlearning:
    def fell(self, by: float, error: float = 0.01, share: float = 0.61) -> dict[str, float]:
        return {"chosen_change": -by, "chosen_change_error": error, "chosen_fell": share}

    def test_it_says_how_far_and_in_how_many_pairs(self) -> None:
        found = verdict("unlearning", **self.fell(0.8))
        assert found.holds
        assert found.message == (
            "chosen answers trained on are 0.8 nats per token less likely than at the start on average, and less "
            "likely in 61% of 64 pairs: unlearning"
        )

    @pytest.mark.parametrize(
        ("by", "error", "share"),
        [(0.09, 0.01, 0.9), (0.8, 0.3, 0.9), (0.8, 0.01, 0.4), (-0.8, 0.01, 0.1)],
        ids=["too little", "within the spread over pairs", "in a few pairs alone", "a rise"],
    )
    def test_it_stays_silent_where_the_fall_is(self, by: float, error: float, share: float) -> None:
        assert not verdict("unlearning", **self.fell(by, error, share)).holds

    def test_of_one_pair_no_spread_is_known(self) -> None:
        one = self.fell(0.8) | {"chosen_change_error": None}
        assert not verdict("unlearning", **one).holds

    def test_it_goes_off_at_half_of_what_brought_it_on(self) -> None:
        assert verdict("unlearning", on=True, **self.fell(0.07)).holds
        assert not verdict("unlearning", on=True, **self.fell(0.04)).holds

    def test_of_fewer_than_eight_pairs_chance_cannot_be_told_from_a_fall(self) -> None:
        assert verdict("unlearning", chosen_pairs=8, **self.fell(0.8)).holds
        assert not verdict("unlearning", chosen_pairs=7, **self.fell(0.8)).holds

    def test_each_set_has_a_verdict_of_its_own(self) -> None:
        """A warning about one of them does not make the other's threshold milder."""
        now = {"train": START | self.fell(0.06), "heldout": START | self.fell(0.06)}
        found = judge_pairs(now, {"train": START, "heldout": START}, {("unlearning", "heldout"): True})
        assert [(v.rows, v.holds) for v in found if v.kind == "unlearning"] == [
            ("train", False),
            ("heldout", True),
        ]
        assert "held out" in verdict("unlearning", rows="heldout", **self.fell(0.3)).message


class TestFloor:
    def test_many_more_tokens_under_the_floor(self) -> None:
        assert verdict("floor", rejected_below_floor=0.45).holds
        assert not verdict("floor", rejected_below_floor=0.42).holds
        assert verdict("floor", on=True, rejected_below_floor=0.42).holds
        assert verdict("floor", rejected_below_floor=0.45).message == (
            "rejected answers trained on are collapsing: 45% of their tokens are under the floor (20% at the start)"
        )

    def test_a_few_tokens_that_fall_very_deep(self) -> None:
        found = verdict("floor", rejected_p5=-7.0)
        assert found.holds
        assert "at -7.0 nats or lower (-2.0 at the start)" in found.message
        assert "under the floor" not in found.message, "what has not moved is no reason"
        assert not verdict("floor", rejected_p5=-6.5).holds


class TestEntropy:
    def test_a_model_that_is_sure_and_wrong(self) -> None:
        assert verdict("entropy", entropy=0.05, chosen=-1.0).holds

    def test_a_model_that_is_sure_and_right_has_learnt(self) -> None:
        assert not verdict("entropy", entropy=0.05, chosen=-0.06).holds

    def test_one_that_was_sure_at_the_start_has_not_collapsed(self) -> None:
        found = judge_pairs(
            {"train": START | {"entropy": 0.05, "chosen": -1.0}}, {"train": START | {"entropy": 0.08}}, {}
        )
        assert not next(v for v in found if v.kind == "entropy").holds


class TestAnswers:
    def answers(self, finished: float = 1.0, looping: float = 0.0, repeated: float = 0.1) -> dict[str, Any]:
        return {
            "finished": finished, "looping": looping, "repeated": repeated, "length": 20.0, "answers": [{}] * 4,
        }  # fmt: skip

    def test_answers_that_loop_or_do_not_end(self) -> None:
        start = self.answers()
        assert judge_answers(self.answers(looping=0.5), start, {}).holds
        assert judge_answers(self.answers(finished=0.25), start, {}).holds
        assert not judge_answers(self.answers(finished=0.75, looping=0.25), start, {}).holds
        assert judge_answers(self.answers(looping=0.25), start, {("repetition", None): True}).holds
        message = judge_answers(self.answers(finished=0.25, looping=0.5), start, {}).message
        assert message.startswith(
            "of 4 greedy answers 2 repeat themselves (0 at the start) and 3 do not end within"
        )

    def test_loops_that_vary_a_little_take_nothing_back(self) -> None:
        start, on = self.answers(finished=0.0), {("repetition", None): True}
        assert judge_answers(self.answers(finished=0.0, repeated=0.78), start, on).holds
        assert not judge_answers(self.answers(finished=0.0, repeated=0.2), start, on).holds
        assert not judge_answers(self.answers(finished=0.0, repeated=0.78), start, {}).holds

    def test_a_model_that_never_ended_has_not_become_worse(self) -> None:
        start = self.answers(finished=0.0, looping=1.0)
        assert not judge_answers(self.answers(finished=0.0, looping=1.0), start, {}).holds

    def test_the_fact(self) -> None:
        said = answers_fact(self.answers(looping=0.25), self.answers())
        assert said == (
            "4 of 4 greedy answers end within the limit (4 at the start), 1 repeats itself; "
            "they are 20 tokens long (20)."
        )


def test_facts_are_the_chosen_answers_and_the_separation() -> None:
    after = {"logps/chosen": -0.38, "accuracy": 0.75, "margin": 0.5}
    before = {"logps/chosen": -0.5, "accuracy": 0.6, "margin": 0.2}
    first, second = heldout_facts({"before": before, "after": after, "chosen_fell": 0.25})
    assert first == (
        "Chosen answers held out are 0.12 nats per token likelier than at the start; 25% of them became less likely."
    )
    assert second == (
        "The chosen answer is the likelier one in 75% of the pairs held out (60% at the start), by 0.50 nats per token "
        "on average (0.20)."
    )
    assert facts("train", {"chosen": -0.5}, {"chosen": -0.501}, 0.4) == [
        "Chosen answers trained on are as likely as at the start (to 0.01 nats per token); 40% of them became less "
        "likely."
    ]
