"""The judge: requests in, replies out, every reply kept on disk the moment it arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError
from slimepo.evaluation.judge.client import (
    CallFailed,
    ChatClient,
    ChatRequest,
    Endpoint,
    Reply,
    Retries,
    check_endpoint,
    parse_endpoint,
)
from slimepo.evaluation.judge.request import FollowUp, JudgeReply, JudgeRequest, sha256_of
from slimepo.files import append_json_lines, json_lines
from slimepo.terminal import Report, counted
from slimepo.types import Message

if TYPE_CHECKING:
    from rich.console import Console

LOCAL = "hf:"
# English text has about four characters a token in the usual vocabularies.
CHARACTERS_PER_TOKEN = 4
# That many calls given up with not one reply: the endpoint is not there, or takes no such request.
_FAILURES_TO_STOP = 5

# Every benchmark's prompts have a system message; not every chat template takes one.
PROBE = [Message(role="system", content="You are a judge."), Message(role="user", content="Which is better?")]


@dataclass(frozen=True)
class Judge:
    """Who judges: a model behind an endpoint, or a local one (`local` is its folder or Hub id, greedy).

    `name` goes into files, scores and the cache's keys. `weights` is a hash of a local judge's files.
    """

    name: str
    endpoint: Endpoint | None = None
    local: str = ""
    weights: str = ""


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens, as the user gives them; None where nobody said."""

    prompt: float | None = None
    completion: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Calls:
    """How the judge is called, and where its replies are kept; `known` are those of the cache once it has been read."""

    cache: Path
    concurrency: int = 8
    retries: Retries = Retries()  # noqa: RUF009 (frozen)
    prices: Prices = Prices()
    known: dict[str, Reply] | None = None


@dataclass
class Usage:
    """What a run of calls took; `unknown` calls came back without token counts."""

    made: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unknown: int = 0

    def line(self, prices: Prices) -> str:
        parts = [f"{self.made:,} calls", f"{self.cached:,} from the cache"]
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.made:
            parts.append(f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens")
        if self.unknown:
            parts.append(f"{self.unknown:,} calls without token counts")
        cost = prices.cost(self.prompt_tokens, self.completion_tokens)
        if cost is not None:
            parts.append(f"${cost:,.2f}" + (" at least" if self.unknown else ""))
        return "judge: " + ", ".join(parts)


def open_judge(text: str, key_variable: str | None = None, retries: Retries | None = None) -> Judge:
    """The judge of `--judge`: `hf:PATH`, `NAME` (OpenAI's own API), `NAME@URL`, or the URL of a server of one model.

    Raises:
        InputError: no such judge, or no key for it.
    """
    if text.startswith(LOCAL):
        from slimepo.evaluation.answerers import model_name, weights_hash

        check_judge(text)
        place = text.removeprefix(LOCAL)
        weights = weights_hash(place)
        # Two folders of one name are two judges.
        return Judge(
            f"{LOCAL}{model_name(place)}@{weights.removeprefix('commit ')[:8]}", None, place, weights
        )
    endpoint = parse_endpoint(text, key_variable)

    async def served_model() -> str:
        limits = retries or Retries()
        client = ChatClient(endpoint, replace(limits, attempts=min(2, limits.attempts)))
        try:
            return await client.served_model()
        finally:
            await client.close()

    if not endpoint.model:
        endpoint = replace(endpoint, model=asyncio.run(served_model()))
    return Judge(endpoint.name, endpoint)


def check_judge(text: str, key_variable: str | None = None) -> None:
    """Nothing, where a judge can be had as far as can be known before it is asked, or loaded.

    Raises:
        InputError: there is no such local model or it takes no system message, the URL is none, the variable with the
            key is not set, or the openai library is missing.
    """
    if not text.startswith(LOCAL):
        check_endpoint(parse_endpoint(text, key_variable))
    elif not text.removeprefix(LOCAL):
        raise InputError(f"the judge {LOCAL} names no model: give {LOCAL}FOLDER or {LOCAL}HUB-ID")
    else:
        from slimepo.evaluation.answerers import prompt_ids
        from slimepo.model.chat import model_chat

        prompt_ids(model_chat(text.removeprefix(LOCAL)), PROBE)


def call_id(judge: Judge, request: JudgeRequest) -> str:
    """The cache's key of a call: judge, hash of the messages, settings. The same call is never made twice."""
    return sha256_of([judge.name, judge.weights, request.prompt_sha256, asdict(request.sampling)])


def judge_all(
    judge: Judge,
    requests: Sequence[JudgeRequest],
    calls: Calls,
    console: Console,
    follow_up: FollowUp | None = None,
) -> dict[str, list[JudgeReply]]:
    """Every request's replies in order of attempts, keyed by `request.key`; only what the cache lacks is asked.

    A call that fails for good, or whose reply is no answer (empty, filtered, a thought that was cut off), gives a reply
    with `error`, and is made again by the next run.
    `follow_up` names the next attempt of an item, or None.

    Raises:
        InputError: the endpoint refuses or fails every call (a wrong key, no such model, no quota, no connection).
    """
    replies: dict[str, list[JudgeReply]] = {request.key: [] for request in requests}
    usage, waiting = Usage(), list(requests)
    try:
        while waiting:
            for request, reply in zip(waiting, _ask(judge, waiting, calls, usage, console), strict=True):
                replies[request.key].append(reply)
            nexts = (follow_up(r, replies[r.key]) for r in waiting) if follow_up else iter(())
            waiting = [request for request in nexts if request is not None]
    finally:
        console.print(usage.line(calls.prices))
    return replies


def missing(judge: Judge, requests: Sequence[JudgeRequest], cache: Path) -> list[JudgeRequest]:
    """The requests that the cache has no reply to, each call once."""
    known = read_replies(cache)
    return list({call_id(judge, r): r for r in requests if call_id(judge, r) not in known}.values())


def read_replies(cache: Path) -> dict[str, Reply]:
    """The replies that are answers, by call; one that is none was paid for too, and stays in the file."""
    replies = ((row["id"], Reply(**row["reply"])) for row in json_lines(cache, strict=True))
    return {id_: reply for id_, reply in replies if not reply.lack}


def estimate_line(requests: Sequence[JudgeRequest], to_make: Sequence[JudgeRequest], prices: Prices) -> str:
    """Calls, tokens (guessed from characters) and the most they can cost, for `--dry-run`."""
    prompt = sum(
        len(m["content"]) // CHARACTERS_PER_TOKEN + CHARACTERS_PER_TOKEN for r in to_make for m in r.messages
    )
    most = sum(request.sampling.max_tokens for request in to_make)
    line = (
        f"judge: {len(requests):,} calls, {len(to_make):,} to make: about {prompt:,} prompt tokens (characters / "
        f"{CHARACTERS_PER_TOKEN}), at most {most:,} completion tokens"
    )
    cost = prices.cost(prompt, most)
    if cost is None:
        return f"{line}; give --price-prompt and --price-completion for the cost"
    return f"{line}; ${prices.cost(prompt, 0):,.2f} for the prompts, ${cost:,.2f} at most"


def _ask(
    judge: Judge, requests: Sequence[JudgeRequest], calls: Calls, usage: Usage, console: Console
) -> list[JudgeReply]:
    known = read_replies(calls.cache) if calls.known is None else calls.known
    ids = [call_id(judge, request) for request in requests]
    to_make = {id_: r for id_, r in zip(ids, requests, strict=True) if id_ not in known or known[id_].lack}
    usage.cached += len(requests) - len(to_make)
    errors: dict[str, str] = {}

    def keep(id_: str, request: JudgeRequest, reply: Reply) -> None:
        row = {
            "id": id_,
            "judge": judge.name,
            "prompt_sha256": request.prompt_sha256,
            "sampling": asdict(request.sampling),
            "item": request.key,
            "reply": asdict(reply),
            "tstamp": time.time(),
        }
        append_json_lines(calls.cache, [row])
        known[id_] = reply
        usage.made += 1
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            usage.unknown += 1
        else:
            usage.prompt_tokens += reply.prompt_tokens
            usage.completion_tokens += reply.completion_tokens

    if to_make:
        with counted(console, "judging") as report:
            if judge.endpoint is None:
                errors = _ask_local(judge, to_make, keep, report)
            else:
                errors = asyncio.run(_ask_endpoint(judge.endpoint, to_make, calls, keep, report))
    usage.failed += len(errors)
    replies = []
    for id_ in ids:
        if id_ in errors:
            replies.append(JudgeReply("", error=errors[id_]))
            continue
        told = known[id_]
        thought, lack = bool(told.thoughts), told.lack
        if lack:
            replies.append(JudgeReply("", error=f"{judge.name}: {lack}", choice=told.choice, thought=thought))
        else:
            without = tuple(told.without)
            replies.append(JudgeReply(told.text, told.top_logprobs, None, told.choice, thought, without))
    return replies


Keep = Callable[[str, JudgeRequest, Reply], None]


async def _ask_endpoint(
    endpoint: Endpoint, to_make: Mapping[str, JudgeRequest], calls: Calls, keep: Keep, report: Report
) -> dict[str, str]:
    """Make the calls, `concurrency` at a time; the reasons of those that failed, by id."""
    client = ChatClient(endpoint, calls.retries)
    queue = iter(to_make.items())
    errors: dict[str, str] = {}
    ended: CallFailed | None = None
    replied = 0

    async def work() -> None:
        nonlocal replied, ended
        for id_, request in queue:
            if ended:
                return
            try:
                reply = await client.ask(ChatRequest(list(request.messages), *astuple(request.sampling)))
            except CallFailed as failed:
                errors[id_] = failed.reason
                hopeless = not replied and len(errors) >= _FAILURES_TO_STOP
                if (failed.stops or hopeless) and ended is None:
                    # What is under way is paid for: its replies are waited for, and kept.
                    ended = failed
                    client.ends.set()
            else:
                replied += 1
                keep(id_, request, reply)
            report(replied + len(errors), len(to_make))

    workers = [asyncio.ensure_future(work()) for _ in range(min(calls.concurrency, len(to_make)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await client.close()
    if ended:
        what = "the judge refuses" if ended.stops or ended.status == 400 else "the judge gives no reply"
        raise InputError(f"{what}: {ended.reason}; replies so far are in {calls.cache}")
    return errors


def _ask_local(
    judge: Judge, to_make: Mapping[str, JudgeRequest], keep: Keep, report: Report
) -> dict[str, str]:
    """A local model's greedy verdicts; the reasons of the requests that it could not take, by id."""
    from slimepo.evaluation.answerers import Ask, open_hf

    model = open_hf(judge.local)
    errors: dict[str, str] = {}
    items = list(to_make.items())
    for start in range(0, len(items), model.chunk):
        chunk = items[start : start + model.chunk]
        asks = [Ask(list(request.messages), 0.0, request.sampling.max_tokens) for _, request in chunk]
        for (id_, request), turn in zip(chunk, model.answer(asks), strict=True):
            if turn.tokens == 0:
                errors[id_] = f"{judge.name}: the prompt of {turn.prompt_tokens} tokens fills its context"
            else:
                reply = Reply(turn.text, turn.stop, judge.name, turn.prompt_tokens, turn.tokens)
                keep(id_, request, replace(reply, thoughts=turn.thoughts))
        report(start + len(chunk), len(items))
    return errors
