"""What is kept beside a score, and the two guards: too much unscored, and columns that do not compare."""

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.judge.request import (
    Identity,
    JudgeRequest,
    Measure,
    Sampling,
    Scores,
    Unscored,
    columns,
    one_column,
    refuse_unscored,
    scores_of_row,
    sha256_of,
)
from slimepo.types import Message

IDENTITY = Identity("mt-bench", "gpt-4", "single-v1", "abc", None, "def", {"references": "x"})
SCORES = Scores(
    "ours",
    IDENTITY,
    "overall",
    "1-10",
    {"overall": Measure(6.5, 95, 6.0, 7.0)},
    95,
    (Unscored("no", "1"),) * 5,
)


def test_a_request_is_known_by_its_item_and_by_its_prompt() -> None:
    request = JudgeRequest(
        "mt-bench", "ours", "81", "turn-1", "single-v1", (Message(role="user", content="é"),), Sampling(0, 9)
    )
    other = replace(request, messages=(Message(role="user", content="e"),))
    assert request.key == other.key == "mt-bench/ours/81/turn-1"
    assert request.prompt_sha256 != other.prompt_sha256
    assert request.prompt_sha256 == sha256_of([{"content": "é", "role": "user"}])


def test_up_to_the_limit_a_score_stands() -> None:
    assert refuse_unscored(SCORES, 0.05) is SCORES
    with pytest.raises(UnscoredError, match=r"5 of 100 items of ours have no score .*most often: no \(5\)"):
        refuse_unscored(SCORES, 0.049)
    with pytest.raises(UnscoredError):
        refuse_unscored(replace(SCORES, scored=0, unscored=()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("judge", "other"),
        ("prompts", "z"),
        ("baseline", "b"),
        ("questions", None),
        ("rules", "v2"),
        ("settings", {}),
    ],
)
def test_scores_with_another_identity_do_not_share_a_column(field: str, value: object) -> None:
    other = replace(SCORES, model="theirs", identity=replace(IDENTITY, **{field: value}))
    assert one_column([SCORES, replace(SCORES, model="theirs")])
    with pytest.raises(InputError, match=f"ours and theirs were not scored alike: {field}"):
        one_column([SCORES, other])


def test_unofficial_scores_do_not_share_a_column_with_official_ones() -> None:
    with pytest.raises(InputError, match="only one of them is official"):
        one_column([SCORES, replace(SCORES, official=False)])


def test_scores_are_put_into_columns_that_compare() -> None:
    other = replace(SCORES, identity=replace(IDENTITY, judge="other"))
    trial = replace(SCORES, official=False)
    theirs = replace(SCORES, model="theirs")
    found = columns([SCORES, other, trial, theirs])
    assert found == [[SCORES, theirs], [other], [trial]]
    assert all(one_column(column) for column in found)


def test_scores_survive_a_json_file() -> None:
    assert scores_of_row(json.loads(json.dumps(asdict(SCORES)))) == SCORES
    with pytest.raises(InputError, match="no benchmark scores"):
        scores_of_row({"model": "ours"})


def test_hashes_do_not_depend_on_the_order_of_keys() -> None:
    texts = [{"a": 1, "b": "\ud800"}, {"b": "\ud800", "a": 1}]
    assert all(sha256_of(x) == sha256_of(y) for x, y in pairwise(texts))
