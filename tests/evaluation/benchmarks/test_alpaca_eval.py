"""AlpacaEval 2: prompts, order, preferences and win rates, against published annotations and by hand."""

import csv
import gzip
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.benchmarks import alpaca_eval, alpaca_length
from slimepo.evaluation.judge.request import JudgeReply, Measure, Unscored
from slimepo.evaluation.rows import read_rows

TEMPLATE = (
    "<|im_start|>system\nBe fair.\n<|im_end|>\n"
    "<|im_start|>user\nQ {instruction} m {output_1} M {output_2}\n<|im_end|>\n"
)


def output(instruction: str, text: str, model: str) -> dict[str, Any]:
    return {"instruction": instruction, "output": text, "generator": model, "dataset": "d"}


BASELINE = [output("one", "short", "base"), output("two", "same", "base"), output("three", "x", "base")]
OURS = [output("three", "yy", "ours"), output("one", "longer", "ours"), output("two", "same", "ours")]


@pytest.fixture(scope="module")
def folder(official_data: Path) -> Path:
    return official_data / "eval" / "alpaca_eval"


@pytest.fixture(scope="module")
def annotations(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "full_annotations" / "alpaca-7b.annotations.json.gz")


@pytest.fixture(scope="module")
def all_rows(folder: Path, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The annotations of six models; of five only the lengths of the outputs are known."""
    compact = [
        {
            "generator_1": "gpt4_1106_preview",
            "generator_2": row["model"],
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "output_1": "x" * row["len_baseline"],
            "output_2": "x" * row["len_model"],
            "preference": row["preference"],
        }
        for row in read_rows(folder / "annotations_compact_5models.jsonl.gz")
    ]
    return annotations + compact


@pytest.fixture(scope="module")
def leaderboard(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "weighted_alpaca_eval_gpt4_turbo_leaderboard_6models.csv").open() as file:
        return {row[""]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def length_data(folder: Path) -> alpaca_length.LengthData:
    with gzip.open(folder / "df_gamed_surrogate.csv.gz", "rt") as file:
        return alpaca_length.length_data(list(csv.DictReader(file)))


def test_requests_and_preferences_are_the_published_ones(
    folder: Path, annotations: list[dict[str, Any]]
) -> None:
    ours = read_rows(folder / "full_annotations" / "alpaca-7b.model_outputs.json.gz")
    baseline = read_rows(folder / "baseline_gpt4_1106_preview.model_outputs.json.gz")
    requests = alpaca_eval.judge_requests(
        ours, baseline, template=(folder / "alpaca_eval_clf.txt").read_text()
    )
    assert [sum(r.swapped for r in requests), sum(not r.swapped for r in requests)] == [403, 399]
    replies = {}
    for request in requests:
        (first,) = annotations[int(request.question_id)]["raw_completion"]["logprobs"]["content"]
        replies[request.key] = [JudgeReply("m", {t["token"]: t["logprob"] for t in first["top_logprobs"]})]
    rows = alpaca_eval.annotation_rows(ours, baseline, replies, "weighted_alpaca_eval_gpt4_turbo")
    assert len(rows) == 805
    for row, theirs in zip(rows, annotations, strict=True):
        assert row["preference"] == pytest.approx(theirs["preference"], abs=1e-9)
        for name in (
            "instruction",
            "output_1",
            "output_2",
            "generator_1",
            "generator_2",
            "annotator",
            "dataset",
        ):
            assert row[name] == theirs[name]


def test_raw_win_rates_and_standard_errors_are_the_published_ones(
    all_rows: list[dict[str, Any]], leaderboard: dict[str, dict[str, str]]
) -> None:
    scores = alpaca_eval.score(all_rows)
    assert scores.keys() == leaderboard.keys()
    for model, official in leaderboard.items():
        measures = scores[model].measures
        assert measures["win_rate"].value == pytest.approx(float(official["win_rate"]), abs=1e-9)
        assert measures["win_rate"].standard_error == pytest.approx(
            float(official["standard_error"]), abs=1e-9
        )
        assert measures["discrete_win_rate"].value == pytest.approx(
            float(official["discrete_win_rate"]), abs=1e-9
        )
        assert int(measures["average_length"].value) == int(official["avg_length"])


# How far the fit is off, in points, where the stand-in for upstream's gamed rows is felt: it has their sufficient
# statistics and not the rows, so the folds, which choose among penalties that differ in the seventh digit, see others.
BY_THE_STAND_IN = {"FuseChat-Llama-3.2-3B-Instruct": 0.0084, "alpaca-7b": -0.0144}


def test_length_controlled_win_rates_are_the_published_ones(
    all_rows: list[dict[str, Any]],
    leaderboard: dict[str, dict[str, str]],
    length_data: alpaca_length.LengthData,
) -> None:
    pytest.importorskip("sklearn")
    scores = alpaca_eval.score(all_rows, length_data=length_data)
    for model, official in leaderboard.items():
        controlled = scores[model].measures["length_controlled"]
        wanted = float(official["length_controlled_winrate"]) + BY_THE_STAND_IN.get(model, 0.0)
        assert controlled.value == pytest.approx(wanted, abs=0.0002)
        if official["lc_standard_error"]:
            assert controlled.standard_error == pytest.approx(float(official["lc_standard_error"]), abs=0.001)
        assert scores[model].headline == "length_controlled"


def test_published_weights_give_the_published_win_rates(
    folder: Path, leaderboard: dict[str, dict[str, str]]
) -> None:
    with (folder / "instruction_difficulty_recovered.csv").open() as file:
        difficulty = np.array([float(row["instruction_difficulty"]) for row in csv.DictReader(file)])
    names = ("np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)")
    with (folder / "glm_weights_length_controlled_v1_6models.csv").open() as file:
        for row in csv.DictReader(file):
            shares = alpaca_length.predictions([float(row[name]) for name in names], difficulty)
            assert 100 * shares.mean() == pytest.approx(
                float(leaderboard[row[""]]["length_controlled_winrate"]), abs=1e-6
            )


def test_requests_follow_the_baseline_s_order_and_skip_identical_outputs() -> None:
    requests = alpaca_eval.judge_requests(OURS, BASELINE, template=TEMPLATE)
    assert [r.question_id for r in requests] == ["0", "2"]
    for request, (instruction, base, ours) in zip(
        requests, [("one", "short", "longer"), ("three", "x", "yy")], strict=True
    ):
        first, second = (ours, base) if request.swapped else (base, ours)
        assert [dict(m) for m in request.messages] == [
            {"role": "system", "content": "Be fair."},
            {"role": "user", "content": f"Q {instruction} m {first} M {second}"},
        ]
        assert (
            request.swapped == random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]
        )


def test_placeholders_in_texts_are_filled_where_they_first_stand_as_upstream_does() -> None:
    messages = alpaca_eval.fill_template(TEMPLATE, "say {output_1}", "A", "B")
    assert messages[1]["content"] == "Q say A m {output_1} M B"


@given(*[st.text(alphabet=st.characters(exclude_characters="{<"))] * 3)
def test_texts_come_through_unchanged(instruction: str, first: str, second: str) -> None:
    messages = alpaca_eval.fill_template(TEMPLATE, instruction, first, second)
    assert messages[1]["content"] == f"Q {instruction} m {first} M {second}".strip()


def test_a_template_that_is_not_the_official_form_is_refused() -> None:
    with pytest.raises(InputError, match="must name instruction, output_1, output_2 once each"):
        alpaca_eval.fill_template(TEMPLATE.replace("{output_1}", "{output_2}"), "", "", "")
    with pytest.raises(InputError, match="must begin with <|im_start|>".replace("|", r"\|")):
        alpaca_eval.fill_template("{instruction}{output_1}{output_2}", "", "", "")


def test_outputs_that_do_not_match_the_baseline_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2 and 3; the model lacks 'two'\)"):
        alpaca_eval.judge_requests(OURS[:2], BASELINE, template=TEMPLATE)


def test_a_preference_by_hand() -> None:
    # P(m) = 1/4, P(M) = 1/2: m has a third of both.
    logprobs = {"m": math.log(0.25), "M": math.log(0.5), "The": math.log(0.25)}
    assert alpaca_eval.parse_logprobs(logprobs, swapped=False) == pytest.approx(5 / 3)
    assert alpaca_eval.parse_logprobs(logprobs, swapped=True) == pytest.approx(4 / 3)


def test_a_missing_letter_counts_as_impossible_and_two_as_unscored() -> None:
    assert alpaca_eval.parse_logprobs({"m": -3.0}, swapped=False) == 1
    assert alpaca_eval.parse_logprobs({"M": -3.0}, swapped=False) == 2
    assert isinstance(alpaca_eval.parse_logprobs({"The": -0.1}, swapped=False), Unscored)


LOGPROB = st.floats(-2000, 0)


@given(LOGPROB, LOGPROB, st.floats(-1000, 0))
def test_preferences_stand_between_1_and_2_and_swapping_mirrors_them(
    m: float, other: float, shift: float
) -> None:
    logprobs = {"m": m, "M": other}
    preference = alpaca_eval.parse_logprobs(logprobs, swapped=False)
    mirrored = alpaca_eval.parse_logprobs(logprobs, swapped=True)
    shifted = alpaca_eval.parse_logprobs({"m": m + shift, "M": other + shift}, swapped=False)
    assert isinstance(preference, float)
    assert isinstance(mirrored, float)
    assert 1 <= preference <= 2
    assert preference + mirrored == pytest.approx(3)
    assert shifted == pytest.approx(preference, abs=1e-9)
    assert (preference > 1.5) <= (other >= m)


@pytest.mark.parametrize(
    ("text", "plain", "swapped"),
    [("m", 1.0, 2.0), (" 'M'.", 2.0, 1.0), ("Both", None, None), ("", None, None)],
)
def test_letters(text: str, plain: float | None, swapped: float | None) -> None:
    for turned, expected in ((False, plain), (True, swapped)):
        preference = alpaca_eval.parse_letter(text, turned)
        assert (None if isinstance(preference, Unscored) else preference) == expected


def annotated(**replies: JudgeReply) -> list[dict[str, Any]]:
    keyed = {f"alpaca-eval-2/ours/{position.removeprefix('at')}/": [r] for position, r in replies.items()}
    return alpaca_eval.annotation_rows(OURS, BASELINE, keyed, "judge")


def test_a_score_by_hand() -> None:
    certain = JudgeReply("m", {"m": 0.0})
    rows = annotated(at0=certain, at2=certain)
    first = [r.swapped for r in alpaca_eval.judge_requests(OURS, BASELINE, template=TEMPLATE)]
    assert [row["preference"] for row in rows] == [1.0 + first[0], 1.5, 1.0 + first[1]]
    measures = alpaca_eval.score(rows)["ours"].measures
    values = [float(first[0]), 0.5, float(first[1])]
    mean = sum(values) / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert measures["win_rate"].value == pytest.approx(100 * mean)
    assert measures["win_rate"].standard_error == pytest.approx(100 * deviation / math.sqrt(3))
    assert measures["average_length"] == Measure((6 + 4 + 2) / 3, 3, unit="characters")


def test_a_judge_about_to_say_something_else_gives_no_preference() -> None:
    thinks = JudgeReply("<think>", {"<think>": -1e-8, "m": -20.0, "M": -21.0})
    (first, *_) = annotated(at0=thinks)
    assert first["preference"] is None
    assert first["unscored"] == "the judge would not begin with m or M, but with '<think>'"


def test_why_nothing_is_scored_is_said() -> None:
    rows = [
        row
        for row in annotated(at0=JudgeReply("", error="refused"), at2=JudgeReply("Both"))
        if not row["preference"]
    ]
    with pytest.raises(
        UnscoredError, match=r"from 1 to 2: refused \(1\); the judge's answer is neither m nor M \(1\)"
    ):
        alpaca_eval.score(rows)


def test_letters_without_log_probabilities_are_unofficial() -> None:
    scores = alpaca_eval.score(annotated(at0=JudgeReply("m"), at2=JudgeReply("M")))["ours"]
    assert not scores.official
    assert scores.notes == (alpaca_eval.UNOFFICIAL_BINARY,)
    assert {row["preference"] for row in annotated(at0=JudgeReply("m"), at2=JudgeReply("m"))} <= {
        1.0,
        1.5,
        2.0,
    }


def test_what_has_no_preference_is_unscored_with_its_reason() -> None:
    rows = annotated(at0=JudgeReply("", error="timed out"))
    scores = alpaca_eval.score(rows)["ours"]
    assert scores.scored == 1
    assert scores.unscored == (Unscored("timed out", "0"), Unscored("not judged", "2"))
    with pytest.raises(UnscoredError, match="no annotation of ours"):
        alpaca_eval.score([row | {"preference": None} for row in rows])


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InputError, match="AlpacaEval annotation 1 has no 'generator_2'"):
        alpaca_eval.score([{"generator_1": "base", "preference": 1.0}])


def test_an_old_draw_is_a_draw_and_mixed_annotators_are_refused() -> None:
    rows = [row | {"preference": 0} for row in annotated()]
    assert alpaca_eval.score(rows)["ours"].measures["win_rate"].value == 50
    with pytest.raises(InputError, match="differ in their annotator"):
        alpaca_eval.score([rows[0], rows[1] | {"annotator": "other"}])


def test_without_differences_in_length_there_is_no_control_and_the_baseline_is_even() -> None:
    columns = ("index", "preference", "std_delta_len", "instruction_difficulty")
    gamed = [(at, 0.3, 1.0 - at, 0.5) for at in range(4)]
    length_data = alpaca_length.length_data([dict(zip(columns, row, strict=True)) for row in gamed])
    rows = [row | {"preference": 1.9, "output_2": row["output_1"]} for row in annotated()]
    scores = alpaca_eval.score(rows, length_data=length_data)["ours"]
    assert scores.headline == "win_rate"
    assert scores.notes == (
        "no length-controlled win rate: all length differences are equal",
        "3 of 4 instructions; difficulties go by position",
    )
    own = [row | {"generator_2": "base"} for row in rows]
    assert alpaca_eval.score(own, length_data=length_data)["base"].measures["length_controlled"].value == 50
