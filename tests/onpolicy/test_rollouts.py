"""From samples and their rewards to the rows of a step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.losses import find_objective
from slimepo.model.generate import Completion
from slimepo.onpolicy.advantages import Array
from slimepo.onpolicy.pairs import judged_answers, opposed_rows, pair_rows
from slimepo.onpolicy.rewards import Prompt, Rewarder
from slimepo.onpolicy.rollouts import (
    Rollout,
    figures,
    records,
    roll_out,
    sample_rows,
    sample_seed,
    whitened_rows,
)
from slimepo.onpolicy.settings import Rollouts, rollout_settings
from slimepo.types import LossOutput, SampleLogps

END = 1


def rollout_of(
    texts: list[list[str]], rewards: list[list[float]], *, unfinished: Sequence[tuple[int, int]] = ()
) -> Rollout:
    """Samples whose tokens are the letters of their texts and an end, for prompts `p0`, `p1` and so on."""
    completions = [
        [
            Completion([ord(c) for c in text] + [END] * ((p, i) not in unfinished), (p, i) not in unfinished)
            for i, text in enumerate(of_prompt)
        ]
        for p, of_prompt in enumerate(texts)
    ]
    return Rollout(
        prompts=[Prompt(f"p{p}", [], {}, [100 + p, 7]) for p in range(len(texts))],
        completions=completions,
        texts=texts,
        rewards=np.array(rewards),
        parts={"own": np.array(rewards)},
        skipped=[""] * len(texts),
        seconds={"sample": 2.0, "reward": 1.0},
    )


def letters(row: Row) -> list[str]:
    return ["".join(map(chr, ids[ids != END])) for ids in row.responses]


def reinforce(policy: SampleLogps, advantages: Tensor) -> LossOutput:
    """An objective of a user's own."""
    return LossOutput(-advantages * policy.logps.sum(dim=-1), {})


def settings_for(loss: str, given: Any) -> Rollouts:
    settings = rollout_settings(given, loss, find_objective(loss))
    assert settings is not None
    return settings


def samples(**options: Any) -> Rollouts:
    settings = settings_for("grpo", {"samples": 4, **options})
    return settings


class TestPairs:
    def test_the_best_against_the_worst(self) -> None:
        (row,) = pair_rows(rollout_of([["a", "b", "c", "d"]], [[0.2, 0.9, 0.1, 0.5]]), Rollouts())
        assert letters(row) == ["b", "c"]
        assert row.prompt_ids.tolist() == [100, 7]
        assert [ids[-1] for ids in row.responses] == [END, END]
        assert row.id == "p0"
        assert all(ids.dtype == np.int32 for ids in (row.prompt_ids, *row.responses))

    def test_of_equal_rewards_the_earlier_answer_is_taken(self) -> None:
        (row,) = pair_rows(rollout_of([["a", "b", "c", "d"]], [[0, 1, 1, 0]]), Rollouts())
        assert letters(row) == ["b", "a"]

    def test_every_right_one_against_every_wrong_one(self) -> None:
        rows = pair_rows(rollout_of([["a", "b", "c", "d"]], [[0, 1, 1, 0.5]]), Rollouts(pairs="right-wrong"))
        assert [letters(row) for row in rows] == [["b", "a"], ["c", "a"]]
        assert [row.id for row in rows] == ["p0 (1)", "p0 (2)"]

    @pytest.mark.parametrize("pairs", ["best-worst", "right-wrong"])
    @pytest.mark.parametrize(
        ("texts", "rewards"),
        [
            (["a", "b"], [0.5, 0.5]),
            (["a", "a"], [1.0, 0.0]),
            (["a", ""], [1.0, 0.0]),
            (["a", "b"], [math.nan, math.nan]),
            (["a", "b"], [1.0, math.nan]),
        ],
        ids=["a tie", "identical answers", "an empty one", "no reward", "one reward"],
    )
    def test_no_pair(self, texts: list[str], rewards: list[float], pairs: Any) -> None:
        rollout = rollout_of([texts, ["x", "y"]], [rewards, [1.0, 0.0]])
        rows = pair_rows(rollout, Rollouts(pairs=pairs))
        assert [letters(row) for row in rows] == [["x", "y"]]
        assert figures(rollout, rows, pairs=True)["sampled/pairs"] == 0.5

    def test_an_empty_answer_that_is_worst_leaves_the_next_one(self) -> None:
        (row,) = pair_rows(rollout_of([["a", "", "c", "d"]], [[1.0, 0.0, 0.5, 0.7]]), Rollouts())
        assert letters(row) == ["a", "c"]

    def test_unfinished_answers_are_left_out_where_that_is_asked(self) -> None:
        rollout = rollout_of([["a", "b", "c"]], [[1.0, 0.5, 0.0]], unfinished=[(0, 0)])
        assert letters(pair_rows(rollout, Rollouts())[0]) == ["a", "c"]
        (row,) = pair_rows(rollout, Rollouts(skip_unfinished=True))
        assert letters(row) == ["b", "c"]


class TestJudged:
    def test_above_the_mean_is_desirable_and_below_it_is_not(self) -> None:
        """At the mean (but for rounding), without words or without a reward an answer is neither."""
        rollout = rollout_of(
            [["a", "b", "c"], ["d", "e", "f"], ["g", "", "h"]],
            [[0.1, 0.2, 0.3], [0.1, 0.1, 0.1], [1, 0, math.nan]],
        )
        rows = judged_answers(rollout, Rollouts(), with_divergence=False)
        assert [letters(row) for row in rows] == [["", "a"], ["c", ""]]
        assert [row.id for row in rows] == ["p0 (1)", "p0 (3)"]
        beside = judged_answers(rollout, Rollouts(), with_divergence=True)
        assert [letters(row) for row in beside] == [["", "a", "a"], ["c", "", "c"]]


class TestOpponents:
    OWN = rollout_of([["a", "b", "c", "d", "e", ""], ["f"] * 6], [[1, 0, 1, math.nan, 1, 1], [0] * 6])
    OTHER = rollout_of([["x", "y", "z", "w", "e", "v"], ["g"] * 6], [[0, 1, 1, 0, 0, 0], [0] * 6])

    def test_each_sample_against_the_answer_of_its_number(self) -> None:
        """The third is a tie, the fourth has no reward, the fifth are the same and the sixth says nothing."""
        rows = opposed_rows(self.OWN, self.OTHER, Rollouts())
        assert [letters(row) for row in rows] == [["a", "x"], ["y", "b"]]
        assert [row.id for row in rows] == ["p0 (1)", "p0 (2)"]
        # Which of the two is the opponent's.
        assert [row.values["opponent"].tolist() for row in rows] == [[0, 1], [1, 0]]  # type: ignore[union-attr]

    def test_a_sample_is_as_good_as_it_is_likely_to_be_preferred(self) -> None:
        rollout = replace(
            rollout_of([["a", "b"]], [[1, 0]]), against=rollout_of([["x", "y", ""]], [[0, 2, math.nan]])
        )
        settings = settings_for("nash_md", {"samples": 2})
        (row,) = sample_rows(rollout, settings)
        # sigma(1) and sigma(-1); 1/2 and sigma(-2).
        by_hand = [(0.7311 + 0.2689) / 2 - 0.5, (0.5 + 0.1192) / 2 - 0.5]
        assert row.values["advantages"].tolist() == pytest.approx(by_hand, abs=1e-4)  # type: ignore[union-attr]
        found = figures(rollout, [row], pairs=False)
        assert found["preferred"] == pytest.approx(np.mean(by_hand) + 0.5, abs=1e-4)
        assert found["reward"] == 0.5
        assert found["reward/against"] == 1
        (line,) = records(rollout, step=1)
        assert line["samples"] == ["a", "b"]
        assert line["against"]["rewards"] == [0, 2, None]

    def test_without_an_opponent_the_group_is_its_own(self) -> None:
        settings = settings_for("nash_md", {"samples": 2, "against": "policy"})
        (row,) = sample_rows(rollout_of([["a", "b"]], [[1, 0]]), settings)
        assert row.values["advantages"].tolist() == pytest.approx([0.2311, -0.2311], abs=1e-4)  # type: ignore[union-attr]

    def test_a_penalty_comes_off_what_it_is_worth(self) -> None:
        settings = settings_for("rloo", {"samples": 2, "advantages": "preference", "kl": 0.1})
        (row,) = sample_rows(rollout_of([["a", "b"]], [[1, 0]]), settings, falling(1.0), falling(1.5))
        # .5 + 1 of two tokens.
        assert row.values["advantages"].tolist() == pytest.approx([0.0811, -0.3811], abs=1e-4)  # type: ignore[union-attr]

    def test_all_answers_to_a_prompt_are_rewarded_together(self) -> None:
        prompts = [Prompt(f"p{i}", [], {}, [i]) for i in range(3)]

        def saying(letter: str) -> Any:
            return lambda given, seeds: [[Completion([ord(letter), 48 + s, END], True)] * 2 for s in seeds]

        calls: list[Any] = []

        def reward(_: Any, completions: Sequence[str], row: Any) -> list[float]:
            calls.append(list(completions))
            return [float(text[0] == "a") for text in completions]

        rollout = roll_out(
            prompts, [1, 2, 3], saying("a"), lambda c: "".join(map(chr, c.token_ids[:-1])),
            Rewarder({"own": (reward, 1.0)}), (saying("b"), [4, 5, 6]),
        )  # fmt: skip
        assert calls == [["a1", "a1", "b4", "b4"], ["a2", "a2", "b5", "b5"], ["a3", "a3", "b6", "b6"]]
        assert rollout.texts == [["a1"] * 2, ["a2"] * 2, ["a3"] * 2]
        assert rollout.rewards.tolist() == [[1, 1]] * 3
        part = rollout.part(1, 2)
        assert part.against is not None
        assert part.against.texts == [["b5", "b5"]]
        assert part.against.rewards.tolist() == [[0, 0]]


class TestSamples:
    def test_a_row_a_prompt_with_an_advantage_a_sample(self) -> None:
        rows = sample_rows(
            rollout_of([["a", "bb", "c", "d"], ["e", "f", "g", "h"]], [[1, 0, 0, 0], [0, 0, 2, 0]]), samples()
        )
        assert [letters(row) for row in rows] == [["a", "bb", "c", "d"], ["e", "f", "g", "h"]]
        first, second = (row.values["advantages"] for row in rows)
        # .75 and -.25 over .5, twice as much over twice as much, but for the 1e-4 that is added to it.
        np.testing.assert_allclose(first, np.array([0.75, -0.25, -0.25, -0.25]) / 0.5001, rtol=1e-6)
        np.testing.assert_allclose(second, np.array([-0.5, -0.5, 1.5, -0.5]) / 1.0001, rtol=1e-6)
        assert first.dtype == np.float32  # type: ignore[union-attr]
        assert "behaviour" not in rows[0].values

    def test_what_does_not_count_is_left_empty_and_changes_no_other(self) -> None:
        rollout = rollout_of(
            [["a", "b", "c", "d"], ["e", "f", "g", "h"]],
            [[1, 0, 0.5, 7], [math.nan] * 4],
            unfinished=[(0, 3)],
        )
        (row,) = sample_rows(rollout, samples(skip_unfinished=True, advantages="centered"))
        assert letters(row) == ["a", "b", "c", ""]
        assert row.values["advantages"].tolist() == [0.5, -0.5, 0.0, 0.0]  # type: ignore[union-attr]

    def test_an_unfinished_answer_counts_unless_it_is_skipped(self) -> None:
        rollout = rollout_of([["a", "b"]], [[1, 0]], unfinished=[(0, 1)])
        assert letters(sample_rows(rollout, samples())[0]) == ["a", "b"]

    @pytest.mark.parametrize(("skip", "left"), [(False, ["p0", "p1"]), (True, ["p1"])])
    def test_groups_of_equal_reward(self, skip: bool, left: list[str]) -> None:
        rollout = rollout_of([["a", "b"], ["c", "d"]], [[1, 1], [1, 0]])
        assert [row.id for row in sample_rows(rollout, samples(skip_equal=skip))] == left

    def test_nothing_to_learn_from_is_no_row(self) -> None:
        rollout = rollout_of([["a", "b"]], [[math.nan, math.nan]])
        scored: list[int] = []

        def score(rows: Sequence[Row]) -> list[list[Array]]:
            scored.append(len(rows))
            return []

        for advantages in ("group", "returns"):
            settings = samples(advantages=advantages, kl=0.1)
            assert sample_rows(rollout, settings, score, score) == []
        assert scored == [0] * 4
        empty = roll_out([], [], lambda *_: [], str, Rewarder({"own": (lambda *_: [], 1.0)}))
        assert sample_rows(empty, samples()) == []
        assert pair_rows(empty, Rollouts()) == []


def falling(level: float) -> Any:
    """A model for which the t-th token of every response has the log-prob -level * (t + 1)."""
    return lambda rows: [
        [-level * np.arange(1, len(ids) + 1, dtype=np.float32) for ids in row.responses] for row in rows
    ]


class TestPenalty:
    # Two tokens and an end against one and an end: d_t = -1 (t + 1) + 1.5 (t + 1), so .5, 1, 1.5 and .5, 1.
    ROLLOUT = rollout_of([["ab", "c"]], [[1.0, 0.0]])

    def test_it_is_summed_over_the_response_before_responses_are_compared(self) -> None:
        settings = samples(advantages="leave-one-out", kl=0.1)
        (row,) = sample_rows(self.ROLLOUT, settings, falling(1.0), falling(1.5))
        # r' = 1 - .1 * 3 and 0 - .1 * 1.5.
        assert row.values["advantages"].tolist() == pytest.approx([0.85, -0.85])  # type: ignore[union-attr]
        behaviour: Any = row.values["behaviour"]
        assert [each.tolist() for each in behaviour] == [[-1, -2, -3], [-1, -2]]

    def test_or_stays_with_its_token_and_is_whitened(self) -> None:
        settings = samples(advantages="returns", kl=0.1)
        (row,) = whitened_rows(sample_rows(self.ROLLOUT, settings, falling(1.0), falling(1.5)))
        raw = np.array([1 - 0.3, 1 - 0.25, 1 - 0.15, -0.15, -0.1])
        by_hand = (raw - raw.mean()) / raw.std()
        advantages: Any = row.values["advantages"]
        assert [len(each) for each in advantages] == [3, 2]
        np.testing.assert_allclose(np.concatenate(advantages), by_hand, rtol=1e-6)

    def test_the_form_with_a_baseline(self) -> None:
        # The specification's example: groups [1, 0] and [1, 1], answers of 2, 1, 1 and 4 tokens.
        rollout = rollout_of([["a", ""], ["", "abc"]], [[1, 0], [1, 1]])
        rows = whitened_rows(sample_rows(rollout, samples(advantages="baseline-returns")))
        found = [advantages[0] for row in rows for advantages in row.values["advantages"]]  # type: ignore[union-attr]
        assert np.round(found, 4).tolist() == pytest.approx([1.4596, -1.8766, -0.2085, -0.2085])

    def test_estimates_with_a_value_model_are_whitened_and_the_returns_kept(self) -> None:
        # The specification's example, without its mean and spread: values .5, .6, .7 and a reward of 1 at the end.
        rollout = rollout_of([["ab"]], [[1.0]])
        settings = settings_for("ppo", {"samples": 1})
        expected = np.array([0.5, 0.6, 0.7], dtype=np.float32)
        (row,) = whitened_rows(sample_rows(rollout, settings, score_values=lambda rows: [[expected]]))
        raw = np.array([0.46575, 0.385, 0.3])
        values: Any = row.values
        np.testing.assert_allclose(values["advantages"][0], (raw - raw.mean()) / raw.std(), atol=1e-6)
        np.testing.assert_allclose(values["returns"][0], raw + expected, rtol=1e-6)

    def test_groups_that_are_skipped_are_not_whitened_over(self) -> None:
        rollout = rollout_of([["a", ""], ["", "abc"]], [[1, 0], [1, 1]])
        (row,) = whitened_rows(sample_rows(rollout, samples(advantages="baseline-returns", skip_equal=True)))
        # .5, .5, -.5: mean 1/6, std sqrt(2)/3.
        by_hand = [(v - 1 / 6) / (math.sqrt(2) / 3) for v in (0.5, 0.5, -0.5)]
        np.testing.assert_allclose(np.concatenate(row.values["advantages"]), by_hand, rtol=1e-6)  # type: ignore[arg-type]

    def test_whitening_takes_its_sums_over_ranks(self) -> None:
        """A rank whose sums come twice has the same mean and spread; one without rows is asked for its own too."""
        rows = sample_rows(self.ROLLOUT, samples(advantages="returns"))
        once, twice = whitened_rows(rows), whitened_rows(rows, lambda sums: 2 * sums)
        for a, b in zip(once[0].values["advantages"], twice[0].values["advantages"], strict=True):  # type: ignore[arg-type]
            assert a.tolist() == b.tolist()
            assert a.dtype == np.float32
        calls: list[Array] = []
        whitened_rows([], lambda sums: calls.append(sums) or sums)  # type: ignore[func-returns-value]
        assert len(calls) == 2


class TestFigures:
    def test_of_lengths_and_of_how_much_answers_differ(self) -> None:
        rollout = rollout_of([["a", "bbb", "a", "c"], ["d"] * 4], [[1, 0, 0, 1], [1, 1, 1, 1]])
        found = figures(rollout, [], pairs=False)
        # Of letters and an end.
        assert found["sampled/tokens"] == (2 + 4 + 2 + 2 + 4 * 2) / 8
        assert found["sampled/tokens/max"] == 4
        assert found["sampled/distinct"] == (3 / 4 + 1 / 4) / 2
        assert found["sampled/identical"] == 0.5
        assert found["reward/equal"] == 0.5

    def test_answers_that_differ_and_are_worth_the_same_are_not_identical(self) -> None:
        found = figures(rollout_of([["a", "b"], ["c", "d"]], [[1, 1], [1, 0]]), [], pairs=False)
        assert (found["reward/equal"], found["sampled/identical"]) == (0.5, 0)

    def test_one_sample_alone_is_compared_with_nothing(self) -> None:
        found = figures(rollout_of([["a"]], [[1]]), [], pairs=False)
        assert math.isnan(found["sampled/distinct"])
        assert math.isnan(found["sampled/identical"])

    def test_entropy_is_a_mean_over_tokens(self) -> None:
        rollout = rollout_of([["a", "bbb"]], [[1, 0]])
        assert math.isnan(figures(rollout, [], pairs=False)["sampled/entropy"])
        short, long = rollout.completions[0]
        known = [[replace(short, entropy=1.0), replace(long, entropy=2.5)]]
        found = figures(replace(rollout, completions=known), [], pairs=False)
        assert found["sampled/entropy"] == (2 * 1.0 + 4 * 2.5) / 6


class TestRollOut:
    def test_every_prompt_is_sampled_decoded_and_rewarded(self) -> None:
        prompts = [Prompt(f"p{i}", [], {"gold": chr(97 + i)}, [i]) for i in range(3)]
        asked: list[Any] = []

        def sampler(given: Sequence[Prompt], seeds: Sequence[int]) -> list[list[Completion]]:
            asked.append((list(given), list(seeds)))
            return [[Completion([97, END], True), Completion([98, 98], False)] for _ in given]

        def exact(_: Any, completions: Sequence[str], row: Any) -> list[float]:
            if row["gold"] == "c":
                raise ValueError("no gold")
            return [float(text == row["gold"]) for text in completions]

        rollout = roll_out(
            prompts,
            [5, 6, 7],
            sampler,
            lambda completion: "".join(chr(i) for i in completion.token_ids if i != END),
            Rewarder({"exact": (exact, 2.0)}, on_error="skip"),
        )
        assert asked == [(prompts, [5, 6, 7])]
        assert rollout.texts == [["a", "bb"]] * 3
        assert rollout.rewards[:2].tolist() == [[2.0, 0.0], [0.0, 0.0]]
        assert np.isnan(rollout.rewards[2]).all()
        first, _, last = records(rollout, step=4)
        assert first == {
            "step": 4, "prompt": "p0", "messages": [], "samples": ["a", "bb"], "finished": [True, False],
            "tokens": [2, 2], "rewards": [2.0, 0.0],
        }  # fmt: skip
        assert last["rewards"] == [None, None]
        assert "ValueError: no gold" in last["skipped"]
        found = figures(rollout, [], pairs=False)
        assert found["reward"] == 0.5
        assert found["reward/std"] == 0.5
        assert found["reward/equal"] == 0.5
        assert found["reward/skipped"] == pytest.approx(1 / 3)
        assert found["sampled/tokens"] == 2
        assert found["sampled/finished"] == 0.5
        assert "sampled/pairs" not in found
        assert rollout.part(1, 3).prompts == prompts[1:]
        assert len(rollout.part(1, 3).parts["exact"]) == 2

    def test_seeds_differ_by_seed_step_and_prompt(self) -> None:
        seeds = {sample_seed(seed, step, item) for seed in range(5) for step in range(5) for item in range(5)}
        assert len(seeds) == 125
        assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)


class TestSettings:
    @pytest.mark.parametrize(
        ("loss", "given", "message"),
        [
            ("grpo", None, "loss 'grpo' learns from the policy's own samples: give rollouts"),
            ("grpo", {"sample": 4}, "rollouts.*sample.*samples"),
            ("grpo", {"samples": 0}, "samples"),
            ("grpo", {"samples": 1}, "samples = 1 gives loss 'grpo' nothing to compare"),
            ("rloo", {"samples": 1}, "nothing to compare"),
            ("reinforce_pp/baseline", {"samples": 1}, "nothing to compare"),
            ("reinforce_pp", {"samples": 1, "advantages": "group"}, "nothing to compare"),
            ("dpo", {"samples": 1}, "nothing to compare"),
            ("dpo", {"advantages": "group"}, "advantages is for objectives on samples"),
            ("dpo", {"kl": 0.1}, "kl is for objectives on samples"),
            ("dpo", {"skip_equal": True}, "skip_equal is for objectives on samples"),
            ("dpo", {"pairs": "all"}, "pairs"),
            ("grpo", {"pairs": "right-wrong"}, "pairs is for objectives on pairs"),
            ("grpo", {"temperature": 0.9}, "temperature 1 and top_p 1"),
            ("grpo", {"top_p": 0.9}, "temperature 1 and top_p 1"),
            ("dpo", {"temperature": 0}, "temperature"),
            ("dpo", {"timeout": 0}, "timeout"),
            ("rloo", {"advantages": "returns"}, "one advantage a response"),
            ("rloo", {"advantages": "gae"}, "one advantage a response"),
            ("grpo", {"value": {"decay": 0.9}}, "value is for advantages: gae"),
            ("xpo", None, "loss 'xpo' learns from the policy's own samples: give rollouts"),
            (
                "xpo",
                {"against": "policy"},
                "loss 'xpo' learns from an opponent's answers: give against: reference",
            ),
            ("xpo", {"pairs": "right-wrong"}, "pairs is for samples that are compared with each other"),
            ("xpo", {"mixture": 0.3}, "mixture is the reference's share in against: mixture"),
            ("nash_md", {"mixture": 1}, "mixture"),
            ("kto", {"pairs": "right-wrong"}, "judges each sample by the mean reward of its group"),
            ("kto", {"against": "reference"}, "judges each sample by the mean reward of its group"),
            ("kto", {"samples": 1}, "nothing to compare"),
            ("nash_md", {"skip_equal": True}, "skip_equal is for samples that are compared with each other"),
            (
                "nash_md",
                {"advantages": "returns"},
                "nash_md takes one advantage|is what advantages: preference",
            ),
            ("nash_md", {"advantages": "group", "against": "policy", "samples": 1}, "nothing to compare"),
            ("nash_md", {"epochs": 2}, "reads no behaviour"),
            ("nash_md", {"steps_per_rollout": 2}, "reads no behaviour"),
            (f"{__name__}:reinforce", {"epochs": 2}, "reads no behaviour"),
            ("grpo", {"against": "reference"}, "advantages: preference compare with, and these are 'group'"),
        ],
    )
    def test_what_is_wrong_is_refused_by_name(self, loss: str, given: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            settings_for(loss, given)

    @pytest.mark.parametrize(
        ("loss", "advantages"),
        [
            ("grpo", "group"), ("grpo/gspo", "group"), ("grpo/dapo", "group"), ("grpo/dr", "centered"),
            ("rloo", "leave-one-out"), ("reinforce_pp", "returns"), ("reinforce_pp/baseline", "baseline-returns"),
            ("ppo", "gae"),
        ],
    )  # fmt: skip
    def test_advantages_are_those_that_a_loss_was_published_with(self, loss: str, advantages: str) -> None:
        settings = settings_for(loss, {})
        assert settings.advantages == advantages
        other = settings_for(loss, {"advantages": "centered"})
        assert other.advantages == "centered"

    @pytest.mark.parametrize(
        ("loss", "given", "passes"),
        [("ppo", {}, 4), ("ppo", {"epochs": 1}, 1), ("grpo", {}, 1), ("dpo", {}, 1)],
    )
    def test_ppo_alone_learns_from_a_rollout_several_times_unless_told(
        self, loss: str, given: Any, passes: int
    ) -> None:
        settings = settings_for(loss, given)
        assert settings.passes == passes

    def test_pairs_may_be_sampled_at_any_temperature(self) -> None:
        settings = settings_for("dpo", {"temperature": 0.8, "top_p": 0.95, "samples": 5})
        assert settings.advantages is None

    def test_one_sample_is_enough_where_nothing_is_compared(self) -> None:
        for loss in ("reinforce_pp", "ppo", "xpo", "nash_md"):
            assert settings_for(loss, {"samples": 1}).samples == 1
