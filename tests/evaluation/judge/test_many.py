"""Many calls: bounded, kept the moment they arrive, never made twice, counted and priced."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimepo.errors import InputError
from slimepo.evaluation.judge.client import Retries
from slimepo.evaluation.judge.many import (
    Calls,
    Judge,
    Prices,
    call_id,
    estimate_line,
    judge_all,
    missing,
    open_judge,
)
from slimepo.evaluation.judge.request import JudgeReply, JudgeRequest, Sampling
from tests.evaluation.conftest import printed
from tests.evaluation.mock_judge import KEY, Fail, MockJudge, Raw, Say, Slow

QUICK = Retries(attempts=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=1.0)


GREEDY = Sampling(0.0, 64)


def request(number: int, sampling: Sampling = GREEDY, part: str = "turn-1") -> JudgeRequest:
    messages = ({"role": "user", "content": f"Question {number}. End with [[rating]]."},)
    return JudgeRequest("mt-bench", "m", str(number), part, "single-v1", messages, sampling)  # type: ignore[arg-type]


REQUESTS = [request(number) for number in range(12)]


def calls(tmp_path: Path, **changes: Any) -> Calls:
    return replace(Calls(tmp_path / "calls.jsonl", 4, QUICK), **changes)


def test_every_request_gets_its_own_reply(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    mock.delay = 0.2  # Long enough for four calls to meet on a busy machine.
    replies = judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS, calls(tmp_path), console)
    assert list(replies) == [r.key for r in REQUESTS]
    alone = judge_all(
        open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS[5:6], calls(tmp_path / "other"), console
    )
    assert replies[REQUESTS[5].key] == alone[REQUESTS[5].key]
    assert mock.most_under_way == 4


def test_nothing_is_asked_twice(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    judge = open_judge(mock.judge, "OPENAI_API_KEY")
    first = judge_all(judge, REQUESTS, calls(tmp_path), console)
    # Neither by the next run nor for another item with the same prompt.
    same = [*REQUESTS, replace(REQUESTS[0], question_id="other")]
    second = judge_all(judge, same, calls(tmp_path), console)
    assert len(mock.calls) == 12
    assert second == first | {"mt-bench/m/other/turn-1": first[REQUESTS[0].key]}
    assert "judge: 0 calls, 13 from the cache" in printed(console)


def test_two_items_with_the_same_prompt_share_a_call(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    twins = [REQUESTS[0], replace(REQUESTS[0], question_id="twin")]
    replies = judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), twins, calls(tmp_path), console)
    assert len(mock.calls) == 1
    assert replies[twins[0].key] == replies[twins[1].key]


def test_judge_prompt_and_settings_make_a_call() -> None:
    judge = Judge("mock@http://h/v1")
    others = [
        call_id(Judge("mock@http://g/v1"), REQUESTS[0]),
        call_id(replace(judge, weights="x"), REQUESTS[0]),
        call_id(judge, REQUESTS[1]),
        call_id(judge, replace(REQUESTS[0], sampling=Sampling(0.5, 64))),
        call_id(judge, replace(REQUESTS[0], sampling=Sampling(0.0, 65))),
        call_id(judge, replace(REQUESTS[0], sampling=Sampling(0.0, 64, 5))),
    ]
    assert len({call_id(judge, REQUESTS[0]), *others}) == 7


def test_a_failed_call_is_unscored_and_made_again_next_time(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.script += [Say("[[5]]"), *[Fail(500, "broken")] * 3]
    one = calls(tmp_path, concurrency=1)
    replies = judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS[:3], one, console)
    errors = [replies[r.key][0].error for r in REQUESTS[:3]]
    assert errors[0] is None
    assert errors[2] is None
    assert errors[1] is not None
    assert "HTTP 500: broken (gave up after 3 attempts)" in errors[1]
    assert "1 failed" in printed(console)
    again = judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS[:3], one, console)
    assert [again[r.key][0].error for r in REQUESTS[:3]] == [None] * 3
    assert len(mock.calls) == 1 + 3 + 1 + 1


def test_a_judge_that_says_nothing_of_use_is_kept_as_it_is(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.script += [Say("I would rather not."), Say("[[", "length")]
    for _ in range(2):
        replies = judge_all(
            open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS[:2], calls(tmp_path, concurrency=1), console
        )
        assert [replies[r.key] for r in REQUESTS[:2]] == [
            [JudgeReply("I would rather not.")], [JudgeReply("[[")],
        ]  # fmt: skip
    assert len(mock.calls) == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (Say(None, "length"), r"an empty reply \(finish_reason length\)"),
        (Say(" \n"), r"an empty reply \(finish_reason stop\)"),
        (Say("[[5]] or", "content_filter"), "content filter took the reply"),
        (Say(None, refusal="I must not judge this."), "it refuses: I must not judge this"),
        (Say("<think>[[2]] or", "length"), r"thoughts without an answer \(finish_reason length\)"),
        (Say(None, "length", thoughts="[[3]]?"), "thoughts without an answer"),
    ],
    ids=str,
)
def test_a_reply_that_is_none_is_asked_for_again_by_the_next_run(
    mock: MockJudge, tmp_path: Path, console: Console, said: Say, reason: str
) -> None:
    judge, one = open_judge(mock.judge), calls(tmp_path)
    mock.script.append(said)
    (reply,) = judge_all(judge, REQUESTS[:1], one, console)[REQUESTS[0].key]
    assert reply.text == ""
    assert re.search(reason, reply.error or "")
    assert missing(judge, REQUESTS[:1], one.cache) == REQUESTS[:1]
    (reply,) = judge_all(judge, REQUESTS[:1], one, console)[REQUESTS[0].key]
    assert (reply.error, reply.text[-1]) == (None, "]")
    # Both were paid for, and both are kept.
    assert len(one.cache.read_text().splitlines()) == 2


def test_thoughts_are_kept_apart(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    mock.script += [Say("<think>[[2]] is harsh.</think> Rating: [[9]]"), Say("[[4]]", thoughts="Hm, [[1]].")]
    one = calls(tmp_path, concurrency=1)
    replies = judge_all(open_judge(mock.judge), REQUESTS[:2], one, console)
    told = [replies[r.key][0] for r in REQUESTS[:2]]
    assert [(reply.text, reply.thought) for reply in told] == [("Rating: [[9]]", True), ("[[4]]", True)]
    kept = [json.loads(line)["reply"]["thoughts"] for line in one.cache.read_text().splitlines()]
    assert kept == ["[[2]] is harsh.", "Hm, [[1]]."]


@pytest.mark.parametrize("concurrency", [1, 3, 8])
@pytest.mark.parametrize(
    ("parameter", "message", "without"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", ()),
        ("max_tokens", "max_tokens: Extra inputs are not permitted", ()),
        ("temperature", "'temperature' does not support 0 with this model.", ("temperature",)),
        ("system", "System role not supported", ("system",)),
    ],
)
def test_what_an_endpoint_refuses_of_a_request_is_settled_by_the_first_call(
    mock: MockJudge, tmp_path: Path, console: Console,
    concurrency: int, parameter: str, message: str, without: tuple[str, ...],
) -> None:  # fmt: skip
    mock.delay, mock.refuses = 0.02, {parameter: message}
    asked = [replace(r, messages=({"role": "system", "content": "Be fair."}, *r.messages)) for r in REQUESTS]
    replies = judge_all(open_judge(mock.judge), asked, calls(tmp_path, concurrency=concurrency), console)
    assert len(mock.calls) == 13
    for request in asked:
        (reply,) = replies[request.key]
        assert (reply.error, reply.without) == (None, without)
    last = mock.calls[-1]
    if parameter == "system":
        assert [m["role"] for m in last["messages"]] == ["user"]
        assert last["messages"][0]["content"].startswith("Be fair.\n\nQuestion")
    else:
        assert parameter not in last
    assert ("max_completion_tokens" in last) == (parameter == "max_tokens")


def test_a_refusal_of_something_else_changes_no_request(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.script += [
        Fail(400, "max_tokens is too large: 64"),
        *[Fail(400, "a question about temperature")] * 2,
    ]
    replies = judge_all(open_judge(mock.judge), REQUESTS, calls(tmp_path, concurrency=1), console)
    errors = [reply.error or "" for each in replies.values() for reply in each]
    assert "too large" in errors[0]
    # What was left out on trial and did not help is sent again.
    assert all("temperature" in call and "max_tokens" in call for call in mock.calls[3:])


def test_replies_under_way_when_the_run_stops_are_kept(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.script += [Say("[[1]]"), Fail(402, "no credit"), *[Slow("[[2]]", 0.3)] * 3]
    one = calls(tmp_path, concurrency=4)
    with pytest.raises(InputError, match="no credit"):
        judge_all(open_judge(mock.judge), REQUESTS, one, console)
    assert len(missing(open_judge(mock.judge), REQUESTS, one.cache)) == len(REQUESTS) - (len(mock.calls) - 1)


def test_a_wrong_key_stops_everything_at_once(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    mock.script += [Fail(401, "Incorrect API key provided: {key}")] * 50
    with pytest.raises(InputError, match=r"the judge refuses: .*HTTP 401") as error:
        judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS, calls(tmp_path, concurrency=2), console)
    assert len(mock.calls) <= 2
    assert KEY not in str(error.value) + printed(console)
    assert str(error.value).count("\n") == 0


def test_one_bad_request_is_one_unscored_item(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    mock.script += [Fail(400, "too long")]
    replies = judge_all(
        open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS, calls(tmp_path, concurrency=1), console
    )
    assert sum(reply[0].error is not None for reply in replies.values()) == 1
    assert len(mock.calls) == 12


def test_a_judge_that_takes_no_request_is_left_alone(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.script += [Fail(400, "no such task")] * 50
    with pytest.raises(InputError, match="no such task"):
        judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS, calls(tmp_path, concurrency=1), console)
    assert len(mock.calls) == 5


def test_a_judge_that_never_replies_is_given_up_soon(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.script += [Fail(503, "loading")] * 50
    one = calls(tmp_path, concurrency=1)
    with pytest.raises(InputError, match=r"the judge gives no reply: .*503: loading"):
        judge_all(open_judge(mock.judge), REQUESTS, one, console)
    assert len(mock.calls) == 5 * one.retries.attempts


def test_replies_before_a_stop_are_kept(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    mock.script += [Say("[[1]]"), Say("[[2]]"), Fail(403, "no more")]
    judge, one = open_judge(mock.judge, "OPENAI_API_KEY"), calls(tmp_path, concurrency=1)
    with pytest.raises(InputError, match="no more"):
        judge_all(judge, REQUESTS, one, console)
    assert len(missing(judge, REQUESTS, one.cache)) == 10


def test_a_follow_up_is_a_second_reply(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    def follow_up(asked: JudgeRequest, replies: Any) -> JudgeRequest | None:
        if len(replies) > 1 or "[[" in replies[0].text:
            return None
        more = {"role": "user", "content": "Go on. [[rating]]"}
        return replace(asked, messages=(*asked.messages, more), attempt=1)  # type: ignore[arg-type]

    mock.script += [Say("hm"), Say("[[2]]"), Say("[[3]]")]
    judge, one = open_judge(mock.judge, "OPENAI_API_KEY"), calls(tmp_path, concurrency=1)
    replies = judge_all(judge, REQUESTS[:2], one, console, follow_up)
    assert [[r.text for r in replies[q.key]] for q in REQUESTS[:2]] == [["hm", "[[3]]"], ["[[2]]"]]
    assert judge_all(judge, REQUESTS[:2], one, console, follow_up) == replies
    assert len(mock.calls) == 3


def test_logprobs_survive_the_cache(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    asked = [request(1, Sampling(1.0, 1, 5), part="")]
    mock.script.append(Say("m"))
    first = judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), asked, calls(tmp_path), console)[asked[0].key]
    assert first[0].top_logprobs == {"m": -0.1, "M": -2.5}
    assert first[0].choice is not None
    assert (
        judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), asked, calls(tmp_path), console)[asked[0].key]
        == first
    )


def test_usage_and_cost_are_said(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    mock.script += [Say("[[1]]")] * 2
    prices = Prices(1_000_000.0, 2_000_000.0)  # One dollar a prompt token, two a completion token.
    judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS[:2], calls(tmp_path, prices=prices), console)
    characters = sum(len(r.messages[0]["content"]) for r in REQUESTS[:2])
    line = f"judge: 2 calls, 0 from the cache, {characters} prompt and 10 completion tokens, ${characters + 20:.2f}"
    assert line in printed(console)


def test_no_price_no_cost_and_servers_without_counts(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    body = {
        "model": "mock",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "[[1]]"}}],
    }
    mock.script.append(Raw(json.dumps(body).encode()))
    judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS[:1], calls(tmp_path), console)
    assert "1 calls without token counts" in printed(console)
    assert "$" not in printed(console)


def test_the_estimate_counts_what_is_missing(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    judge = open_judge(mock.judge, "OPENAI_API_KEY")
    judge_all(judge, REQUESTS[:2], calls(tmp_path), console)
    to_make = missing(judge, REQUESTS, tmp_path / "calls.jsonl")
    line = estimate_line(REQUESTS, to_make, Prices(10, 30))
    assert "12 calls, 10 to make" in line
    assert f"at most {10 * 64:,} completion tokens" in line
    assert "$" in line
    assert "--price-prompt" in estimate_line(REQUESTS, to_make, Prices())


def test_a_half_written_cache_line_costs_one_call(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    judge, cache = open_judge(mock.judge, "OPENAI_API_KEY"), tmp_path / "calls.jsonl"
    before = judge_all(judge, REQUESTS, calls(tmp_path), console)
    cache.write_bytes(cache.read_bytes()[:-30])
    assert judge_all(judge, REQUESTS, calls(tmp_path), console) == before
    assert len(mock.calls) == 13


KILLED = """
import sys
from pathlib import Path
from tests.evaluation.judge.test_many import REQUESTS, request
from slimepo.evaluation.judge.many import Calls, judge_all, open_judge
from slimepo.terminal import make_console
judge = open_judge(sys.argv[1], "OPENAI_API_KEY")
judge_all(judge, [request(n) for n in range(40)], Calls(Path(sys.argv[2]), 4), make_console())
"""


def test_kill_9_half_way_loses_nothing_that_had_arrived(
    mock: MockJudge, tmp_path: Path, console: Console
) -> None:
    mock.delay = 0.05
    cache = tmp_path / "calls.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, mock.judge, str(cache)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(mock.calls) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    asked = len(mock.calls)
    assert 20 <= asked < 40
    kept = 40 - len(missing(open_judge(mock.judge, "OPENAI_API_KEY"), [request(n) for n in range(40)], cache))
    # What the server had answered is there, but for the calls that were under way.
    assert asked - 5 <= kept <= asked
    judge_all(
        open_judge(mock.judge, "OPENAI_API_KEY"), [request(n) for n in range(40)], calls(tmp_path), console
    )
    assert len(mock.calls) == asked + 40 - kept
    assert f"{40 - kept} calls, {kept} from the cache" in printed(console)


def test_no_key_in_any_file(mock: MockJudge, tmp_path: Path, console: Console) -> None:
    mock.script += [Fail(500, "your key {key} is fine, we are not")] * 3
    judge_all(open_judge(mock.judge, "OPENAI_API_KEY"), REQUESTS, calls(tmp_path), console)
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in printed(console)


def test_a_bare_url_is_asked_for_its_model(mock: MockJudge) -> None:
    assert open_judge(mock.url).name == mock.judge
