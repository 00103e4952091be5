"""One call: what is retried, what is final, how long it waits, and that the key never shows."""

import asyncio
import time
import traceback
from email.utils import formatdate
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.evaluation.judge.client import (
    CallFailed,
    ChatClient,
    ChatRequest,
    Endpoint,
    Reply,
    Retries,
    is_endpoint,
    parse_endpoint,
    retry_after,
    scrub,
)
from tests.evaluation.mock_judge import KEY, Drip, Fail, Hang, MockJudge, Raw, Say

QUICK = Retries(attempts=4, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=0.5)
REQUEST = ChatRequest([{"role": "user", "content": "Say [[rating]]."}], 0.0, 16)


def ask(mock: MockJudge, request: ChatRequest = REQUEST, retries: Retries = QUICK) -> Reply:
    async def once() -> Reply:
        client = ChatClient(parse_endpoint(mock.judge, "OPENAI_API_KEY"), retries)
        try:
            return await client.ask(request)
        finally:
            await client.close()

    return asyncio.run(once())


def test_a_plain_call(mock: MockJudge) -> None:
    mock.script.append(Say("[[7]]", "length"))
    reply = ask(mock)
    assert (reply.text, reply.finish_reason, reply.model) == ("[[7]]", "length", "mock")
    assert (reply.prompt_tokens, reply.completion_tokens) == (len("Say [[rating]]."), 5)
    assert reply.top_logprobs is None
    assert mock.calls[0]["max_tokens"] == 16
    assert "logprobs" not in mock.calls[0]
    assert "seed" not in mock.calls[0]
    assert mock.keys == {KEY}


def test_logprobs_and_the_raw_choice_where_asked_for(mock: MockJudge) -> None:
    mock.script.append(Say("m"))
    reply = ask(mock, ChatRequest(REQUEST.messages, 1.0, 1, top_logprobs=5, seed=3))
    assert reply.top_logprobs == {"m": -0.1, "M": -2.5}
    assert reply.choice is not None
    assert reply.choice["logprobs"]["content"][0]["top_logprobs"][1]["token"] == "M"
    assert (mock.calls[0]["logprobs"], mock.calls[0]["top_logprobs"], mock.calls[0]["seed"]) == (True, 5, 3)


@pytest.mark.parametrize(
    "failure",
    [
        Fail(500), Fail(502), Fail(503), Fail(529), Fail(408), Fail(409), Fail(429), Hang(0.8), Drip(0.1),
        Raw(b'{"error": "overloaded"}'), Raw(b"not json"), Raw(b'{"choices": []}'),
    ],
    ids=str,
)  # fmt: skip
def test_passing_failures_are_tried_again(mock: MockJudge, failure: Any) -> None:
    mock.script += [failure, failure, Say("[[3]]")]
    assert ask(mock).text == "[[3]]"
    assert len(mock.calls) == 3


def test_it_gives_up_after_the_last_attempt(mock: MockJudge) -> None:
    mock.script += [Fail(500, "out of order")] * 10
    with pytest.raises(CallFailed, match=r"HTTP 500: out of order \(gave up after 4 attempts\)") as failed:
        ask(mock)
    assert not failed.value.stops
    assert len(mock.calls) == 4


@pytest.mark.parametrize(
    ("status", "stops"), [(400, False), (422, False), (401, True), (403, True), (404, True)]
)
def test_refusals_are_final_at_once(mock: MockJudge, status: int, stops: bool) -> None:
    mock.script.append(Fail(status, "no"))
    with pytest.raises(CallFailed, match=f"HTTP {status}: no") as failed:
        ask(mock)
    assert (failed.value.stops, len(mock.calls)) == (stops, 1)


def test_an_empty_account_is_final_although_it_is_a_429(mock: MockJudge) -> None:
    mock.script.append(Fail(429, "You exceeded your current quota", code="insufficient_quota"))
    with pytest.raises(CallFailed, match="quota") as failed:
        ask(mock)
    assert (failed.value.stops, len(mock.calls)) == (True, 1)


def test_retry_after_is_honoured_and_holds_for_all_calls(mock: MockJudge) -> None:
    mock.script += [Fail(429, headers={"Retry-After": "0.4"})]

    async def several() -> None:
        client = ChatClient(parse_endpoint(mock.judge), QUICK)
        first = asyncio.ensure_future(client.ask(REQUEST))
        while not client._not_before:  # The refusal has not arrived yet.
            await asyncio.sleep(0.01)
        await asyncio.gather(first, *(client.ask(REQUEST) for _ in range(3)))
        await client.close()

    asyncio.run(several())
    assert len(mock.times) == 5
    assert min(mock.times[1:]) - mock.times[0] >= 0.39


def test_a_server_that_asks_to_wait_for_hours_ends_the_run(mock: MockJudge) -> None:
    mock.script.append(Fail(429, headers={"Retry-After": "86400"}))
    with pytest.raises(CallFailed, match="asks to wait 86400 s") as failed:
        ask(mock)
    assert failed.value.stops


def test_the_backoff_doubles_up_to_its_cap(mock: MockJudge) -> None:
    mock.script += [Fail(500)] * 5
    ask(mock, retries=Retries(attempts=6, first_wait_s=0.1, longest_wait_s=0.2, timeout_s=5))
    waits = [b - a for a, b in zip(mock.times, mock.times[1:], strict=False)]
    # Up to half of a wait is left away at random.
    assert waits[0] >= 0.05
    assert all(0.1 <= wait < 0.5 for wait in waits[1:])


def test_retry_after_as_seconds_milliseconds_and_date() -> None:
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after": "9", "retry-after-ms": "250"}) == 0.25
    date = formatdate(time.time() + 30, usegmt=True)
    assert 28 < (retry_after({"retry-after": date}) or 0) <= 30
    assert retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_models_that_know_the_limit_under_its_new_name_only(mock: MockJudge) -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    mock.script += [Fail(400, message), Say("[[1]]")]
    assert ask(mock).text == "[[1]]"
    assert "max_tokens" not in mock.calls[1]
    assert mock.calls[1]["max_completion_tokens"] == 16


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_no_key_in_what_is_raised_or_in_its_traceback(mock: MockJudge, status: int) -> None:
    mock.script += [Fail(status, "Incorrect API key provided: {key}. Or was it sk-te****CRET?")] * 4
    with pytest.raises(CallFailed) as failed:
        ask(mock)
    text = "".join(traceback.format_exception(failed.value))
    assert "SECRET" not in text
    assert "CRET" not in text
    assert "[key]" in str(failed.value)


def test_scrubbing() -> None:
    assert scrub("a\nb hunter2 c", "hunter2") == "a b [key] c"
    assert scrub("Bearer abc.def sent", "") == "[key] sent"
    assert len(scrub("long " * 1000, "")) <= 301
    assert scrub("the task-based risk-free-answer", "") == "the task-based risk-free-answer"


def test_keys_come_from_the_environment_only(mock: MockJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="no key for gpt-4: set the environment variable OPENAI_API_KEY"):
        ChatClient(Endpoint("gpt-4"), QUICK)
    with pytest.raises(InputError, match="MY_KEY"):
        ChatClient(Endpoint("m", mock.url, "MY_KEY"), QUICK)
    ask(mock)  # A server of one's own needs none.
    assert mock.keys == {"none"}


def test_the_ways_to_name_an_endpoint() -> None:
    assert parse_endpoint("gpt-4") == Endpoint("gpt-4")
    assert parse_endpoint("a/b@http://h:1/v1/", "K") == Endpoint("a/b", "http://h:1/v1", "K")
    assert parse_endpoint("https://h/v1", "K") == Endpoint("", "https://h/v1", "K")
    assert [parse_endpoint(text).name for text in ("m", "m@http://h", "http://h")] == [
        "m",
        "m@http://h",
        "http://h",
    ]
    assert is_endpoint("x@https://h/v1")
    assert is_endpoint("http://h/v1")
    assert not is_endpoint("runs/a@b/model")


def test_openais_key_goes_to_openai_only() -> None:
    assert parse_endpoint("m@http://h/v1").key_variable == ""
    assert parse_endpoint("m@https://api.openai.com.h/v1").key_variable == ""
    assert parse_endpoint("m@http://api.openai.com/v1").key_variable == ""
    assert parse_endpoint("m@https://api.openai.com/v1").key_variable == "OPENAI_API_KEY"


def test_no_key_is_sent_to_a_server_unless_its_variable_is_named(mock: MockJudge) -> None:
    async def once(endpoint: Endpoint) -> None:
        client = ChatClient(endpoint, QUICK)
        await client.ask(REQUEST)
        await client.close()

    asyncio.run(once(parse_endpoint(mock.judge)))
    assert mock.keys == {"none"}


def test_a_bare_name_at_another_base_url_is_another_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://h/v1")
    assert parse_endpoint("gpt-4") == Endpoint("gpt-4", "http://h/v1")
    assert parse_endpoint("gpt-4").name == "gpt-4@http://h/v1"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:pass@h/v1",
        "https://h/v1?api-key=pass",
        "http://h:pass@/v1",
        "http://h:port/v1",
        "http://h:99999",
    ],
)
def test_a_key_in_a_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InputError, match="without user, password or query") as error:
        parse_endpoint(f"m@{url}")
    assert "pass@" not in str(error.value)
    assert "api-key" not in str(error.value)


def test_a_server_of_one_model_needs_no_name(mock: MockJudge) -> None:
    async def names() -> str:
        client = ChatClient(parse_endpoint(mock.url), QUICK)
        return await client.served_model()

    assert asyncio.run(names()) == "mock"
    mock.models = ("a", "b")
    with pytest.raises(InputError, match="serves a, b: give NAME@"):
        asyncio.run(names())


@pytest.mark.parametrize(
    "text", ["localhost:8000/v1", "m@127.0.0.1:8000", "m@ftp://h/v1", "htp://user:secret@h"]
)
def test_an_address_without_http_is_no_models_name(text: str) -> None:
    with pytest.raises(InputError, match="begins with http:// or https://") as caught:
        parse_endpoint(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["gpt-4o", "ft:gpt-4o-2024-08-06:org::abc123", "llama3.1:70b", "org/model", "a@b"]
)
def test_names_of_models_may_hold_colons(name: str) -> None:
    assert parse_endpoint(name) == Endpoint(name)
