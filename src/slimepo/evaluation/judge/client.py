"""One chat completion from an OpenAI-compatible endpoint: retries, waiting as told, and a key that is never shown."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import importlib.util
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import SplitResult, urlsplit

from slimepo.errors import InputError
from slimepo.evaluation.thoughts import split_thoughts
from slimepo.redaction import keep_secret, redact
from slimepo.types import Message

_OPENAI_KEY = "OPENAI_API_KEY"
_RETRIED = (408, 409, 425, 429)
# Wrong for one call is wrong for all: the key, the address, the model's name, the account.
_STOPS_THE_RUN = (401, 402, 403, 404)
_LONGEST_WAIT_S = 600.0
_LONGEST_REASON = 300
# What servers and models refuse of a request, by the words of the refusal, and can do without.
_REFUSALS = {
    "max_tokens": r"max_completion_tokens|\bmax_tokens\b.*(support|unknown|unrecogni|unexpected|permitted|extra)",
    "temperature": r"\btemperature\b",
    "logprobs": r"log_?probs",
    "seed": r"\bseed\b",
    "system": r"\b(system|developer)\b.{0,30}\b(role|message|prompt|instruction)|\brole.{0,30}\bsystem\b"
    "|roles must alternate",
}
# Statuses of such refusals; some servers' templates fail with a 500.
_REFUSED = (400, 422, 500)
_KEY_LIKE = re.compile(r"\b(?:sk|key|rk|pk)-[\w*.-]{4,}|\bBearer\s+\S+", re.IGNORECASE)


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible API; `base_url` "" is the `openai` library's own default.

    The key is not in here: it is read from the environment variable `key_variable` when a call is made; "" sends none.
    """

    model: str
    base_url: str = ""
    key_variable: str = _OPENAI_KEY

    @property
    def name(self) -> str:
        return "@".join(part for part in (self.model, self.base_url) if part)


@dataclass(frozen=True)
class ChatRequest:
    """One call: messages and what shapes the answer. `top_logprobs` asks for that many per token (0: none)."""

    messages: list[Message]
    temperature: float
    max_tokens: int
    top_logprobs: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """What came back. `top_logprobs` maps the likeliest tokens at the first position to log-probabilities in nats.

    `text` is the answer alone, `thoughts` what was thought before it (see `slimepo.evaluation.thoughts`), `refusal`
    what the protocol's field of that name says. `finish_reason` is the server's (stop, length, content_filter), `model`
    the name the server gives itself; token counts are None where the server sends none. `choice` is the raw choice of
    the protocol, kept where log-probabilities were asked for. `without` names what was refused of the request and left
    out: temperature, logprobs, system (the system message then stands in the first of the user).
    """

    text: str
    finish_reason: str
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    top_logprobs: dict[str, float] | None = None
    choice: dict[str, Any] | None = None
    thoughts: str = ""
    refusal: str = ""
    without: Sequence[str] = ()

    @property
    def lack(self) -> str:
        """Why this is no answer; empty where it is one."""
        if self.finish_reason == "content_filter":
            return "the server's content filter took the reply"
        # A first token of white space, or of a thought, may have log-probabilities of letters beside it.
        if self.text.strip() or (self.top_logprobs and not self.thoughts):
            return ""
        if self.refusal:
            return f"it refuses: {self.refusal}"
        ended = f"finish_reason {self.finish_reason or 'not told'}"
        return f"{'thoughts without an answer' if self.thoughts else 'an empty reply'} ({ended})"


@dataclass(frozen=True)
class Retries:
    """`attempts` calls in all; waits of `first_wait_s` doubling up to `longest_wait_s`, less up to half at random.

    A server's Retry-After counts instead of the computed wait. `timeout_s` is for one attempt.
    """

    attempts: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    timeout_s: float = 180.0


class CallFailed(Exception):
    """A call is given up. `stops` says that no other call can succeed either; `status` is 0 without an answer.

    `parameter` is what the server names as the reason, where it does.
    """

    def __init__(self, reason: str, status: int = 0, *, stops: bool = False, parameter: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.stops = stops
        self.parameter = parameter


class _Told(Exception):
    """An answer with status 200 that is an error: the server's words, and the status that it means, if it says so."""

    def __init__(self, words: str, status: int, code: str) -> None:
        super().__init__(words)
        self.status = status
        self.code = code


def parse_endpoint(text: str, key_variable: str | None = None) -> Endpoint:
    """An endpoint from `name`, `name@URL` or `URL` (which serves one model; see `served_model`).

    Without `key_variable` OPENAI_API_KEY goes to OpenAI's own API only, and a server given by URL gets no key. A bare
    name is at OPENAI_BASE_URL where that is set, and says so, because another server is another judge.

    Raises:
        InputError: the URL holds a password or a query, which may be a key, or is none of HTTP's; the message does
            not repeat it.
    """
    if key_variable and not re.fullmatch(r"[A-Za-z_]\w*", key_variable, re.ASCII):
        raise InputError(
            "--key-variable is the name of an environment variable, such as JUDGE_KEY, not the key itself"
        )
    match = re.fullmatch(r"(?:(.*?)@)?(https?://.*)", text)
    if match is None and re.search(r"://|(^|@)[\w.-]+:\d{4,5}(/|$)", text):
        raise InputError("an endpoint's URL begins with http:// or https://: give NAME@http://HOST:PORT/PATH")
    name, url = (match[1] or "", match[2]) if match else (text, os.environ.get("OPENAI_BASE_URL", "").strip())
    if not url:
        return Endpoint(name, "", key_variable or _OPENAI_KEY)
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or not parts.hostname or not _port_is_valid(parts):
        raise InputError(
            "an endpoint's URL must be http(s)://HOST[:PORT]/PATH without user, password or query: "
            "put the key into an environment variable and name that with --key-variable"
        )
    openai_own = match is None or (parts.scheme, parts.hostname) == ("https", "api.openai.com")
    return Endpoint(name, url.rstrip("/"), key_variable or (_OPENAI_KEY if openai_own else ""))


def _port_is_valid(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def is_endpoint(text: str) -> bool:
    """Whether a model is given by URL."""
    return bool(re.search(r"(^|@)https?://", text))


class ChatClient:
    """Calls of one endpoint. Make it and use it inside one event loop; `close` at the end."""

    def __init__(self, endpoint: Endpoint, retries: Retries) -> None:
        import openai

        self.endpoint = endpoint
        self.retries = retries
        self._key = check_endpoint(endpoint)
        # What the endpoint refuses of requests; known once the first call has come back.
        self._refused: frozenset[str] = frozenset()
        self._first = asyncio.Lock()
        self._settled = False
        self._not_before = 0.0
        # Set where no further call is wanted: what is under way may end, and is not tried again.
        self.ends = asyncio.Event()
        # The library's own retries are off: ours are counted, bounded and the same for every server.
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=endpoint.base_url or None,
            max_retries=0,
            timeout=retries.timeout_s,
        )

    async def close(self) -> None:
        await self._client.close()

    async def served_model(self) -> str:
        """The one model that the endpoint serves.

        Raises:
            InputError: it serves several (they are named), none, or does not answer.
        """

        async def call() -> list[str]:
            return [model.id for model in (await self._client.models.list()).data]

        try:
            names: list[str] = await self._attempt(call)
        except CallFailed as failed:
            raise InputError(f"{self.endpoint.base_url}: {failed.reason}; give NAME@URL") from None
        if len(names) != 1:
            raise InputError(
                f"{self.endpoint.base_url} serves {', '.join(names) or 'no model'}: give NAME@{self.endpoint.base_url}"
            )
        return names[0]

    async def ask(self, request: ChatRequest) -> Reply:
        """One reply.

        Raises:
            CallFailed: a final refusal (400, 401, ...), or every attempt failed. Its text never holds the key.
        """

        if self._settled:
            return await self._ask(request)
        # One call goes ahead and learns what the endpoint takes, so that the others are not refused for the same.
        async with self._first:
            if not self._settled:
                try:
                    return await self._ask(request)
                finally:
                    self._settled = True
        return await self._ask(request)

    async def _ask(self, request: ChatRequest) -> Reply:
        refused = self._refused
        while True:
            arguments = {"model": self.endpoint.model, **_arguments(request, refused)}

            async def call(arguments: dict[str, Any] = arguments) -> Reply:
                completion = await self._client.chat.completions.create(**arguments)
                return _reply(completion, keep_choice=request.top_logprobs > 0)

            try:
                reply: Reply = await self._attempt(call)
            except CallFailed as failed:
                more = _refused_part(failed, request, refused)
                if more is None:
                    raise
                refused |= {more}
            else:
                # Only what helped is left out from now on.
                self._refused |= refused
                return replace(
                    reply, without=tuple(sorted(refused & _asked(request) - {"max_tokens", "seed"}))
                )

    async def _attempt(self, call: Any) -> Any:
        import openai

        for attempt in range(1, self.retries.attempts + 1):
            while (left := self._not_before - time.monotonic()) > 0 and not self.ends.is_set():
                await self._pause(left)
            if self.ends.is_set() and attempt > 1:
                raise CallFailed(f"{self.endpoint.name}: not tried again")
            headers: Mapping[str, str] = {}
            status, code, parameter = 0, "", ""
            try:
                # The library's limit is for each wait of a call; a server that drips would never reach it.
                async with asyncio.timeout(self.retries.timeout_s):
                    return await call()
            except openai.APIStatusError as error:
                status, headers, code = error.status_code, error.response.headers, error.code or ""
                parameter = str(error.param or "")
                told = error.body.get("message") if isinstance(error.body, dict) else None
                text = str(told or error.body or error.message)
            except _Told as error:
                status, code, text = error.status, error.code, str(error)
            except (openai.APITimeoutError, TimeoutError):
                text = f"no answer within {self.retries.timeout_s:g} s"
            except openai.APIConnectionError as error:
                text = f"no connection ({type(error.__cause__).__name__ if error.__cause__ else 'unknown'})"
            except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as error:
                # An answer that is no chat completion: some servers send errors that way for a while.
                body = getattr(error, "doc", "")
                text = f"no chat completion in the answer ({type(error).__name__}){body and f': {body}'}"
            # Outside the except blocks, so that no exception that could hold a header is chained to ours.
            await self._pause(self._wait_or_give_up(status, headers, code, text, parameter, attempt))
        raise AssertionError("the last attempt raises")

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until no further call is wanted."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ends.wait(), seconds)

    def _wait_or_give_up(
        self, status: int, headers: Mapping[str, str], code: str, text: str, parameter: str, attempt: int
    ) -> float:
        """Seconds until the next attempt; raises CallFailed where there is nothing to wait for."""
        place = f"{self.endpoint.name}: " + (f"HTTP {status}: " if status else "")
        reason = place + scrub(text, self._key)
        if code == "insufficient_quota":
            raise CallFailed(reason, status, stops=True)
        if status and status not in _RETRIED and status < 500:
            raise CallFailed(reason, status, stops=status in _STOPS_THE_RUN, parameter=parameter)
        if attempt == self.retries.attempts or self.ends.is_set():
            tries = f"{attempt} attempt{'s' if attempt > 1 else ''}"
            raise CallFailed(f"{reason} (gave up after {tries})", status, parameter=parameter)
        told = retry_after(headers)
        if told is not None and told > _LONGEST_WAIT_S:
            raise CallFailed(f"{reason} (the server asks to wait {told:.0f} s)", status, stops=True)
        if told:
            # All calls of this client wait: the limit is the account's, not the call's.
            self._not_before = max(self._not_before, time.monotonic() + told)
            return told
        wait: float = min(self.retries.longest_wait_s, self.retries.first_wait_s * 2 ** (attempt - 1))
        return wait * random.uniform(0.5, 1.0)


def check_endpoint(endpoint: Endpoint) -> str:
    """The key from the environment, "" where a server of one's own needs none.

    Raises:
        InputError: the openai library is not installed, or OpenAI's own API, or a variable that was named, has no key.
    """
    if importlib.util.find_spec("openai") is None:
        raise InputError(
            f"{endpoint.name} needs the openai library, which is not installed: pip install 'slimepo[eval]'"
        )
    if not endpoint.key_variable:
        return ""
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not key and (not endpoint.base_url or endpoint.key_variable != _OPENAI_KEY):
        raise InputError(f"no key for {endpoint.name}: set the environment variable {endpoint.key_variable}")
    return keep_secret(key)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: retry-after-ms, or Retry-After in seconds or as a date."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) / scale)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            pass
    return None


def scrub(text: str, key: str) -> str:
    """One line without the key and without anything that looks like one (servers repeat parts of it)."""
    if key:
        text = text.replace(key, "[key]")
    line = redact(_KEY_LIKE.sub("[key]", " ".join(text.split())))
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "…"


def _asked(request: ChatRequest) -> set[str]:
    """What of `_REFUSALS` a request holds."""
    asked = {"max_tokens", "temperature"}
    asked |= {"logprobs"} if request.top_logprobs else set()
    asked |= {"seed"} if request.seed is not None else set()
    return asked | ({"system"} if request.messages[0]["role"] == "system" else set())


def _arguments(request: ChatRequest, refused: frozenset[str]) -> dict[str, Any]:
    """The protocol's arguments of a request, without what the endpoint refuses."""
    messages, parts = list(request.messages), _asked(request) - refused
    if "system" in refused and messages[0]["role"] == "system":
        first, second, *rest = messages
        messages = [Message(role="user", content=f"{first['content']}\n\n{second['content']}"), *rest]
    limit = "max_tokens" if "max_tokens" in parts else "max_completion_tokens"
    arguments: dict[str, Any] = {"messages": messages, limit: request.max_tokens}
    arguments |= {"temperature": request.temperature} if "temperature" in parts else {}
    arguments |= {"seed": request.seed} if "seed" in parts else {}
    return arguments | (
        {"logprobs": True, "top_logprobs": request.top_logprobs} if "logprobs" in parts else {}
    )


def _refused_part(failed: CallFailed, request: ChatRequest, refused: frozenset[str]) -> str | None:
    """What else of the request the server does not take, by its own words; None where it is something else."""
    if failed.status not in _REFUSED:
        return None
    parts = [part for part in _REFUSALS if part in _asked(request) - refused]
    for words in (failed.parameter, failed.reason):
        for part in parts:
            if re.search(_REFUSALS[part], words, re.IGNORECASE):
                return part
    return None


def _reply(completion: Any, keep_choice: bool) -> Reply:
    choices = getattr(completion, "choices", None)
    if not choices or getattr(choices[0], "error", None):
        raise _told(choices[0] if choices else completion)
    choice, usage = choices[0], completion.usage
    tokens = getattr(choice.logprobs, "content", None) if choice.logprobs else None
    message = choice.message
    content: Any = message.content or ""
    apart: list[Any] = []
    if not isinstance(content, str):
        # Parts with a type each: text, or a thought, whose own text may be in parts again.
        parts = [part for part in content if isinstance(part, dict)]
        apart = [_part_text(part) for part in parts if part.get("type") != "text"]
        content = "".join(_part_text(part) for part in parts if part.get("type") == "text")
    apart += [getattr(message, name, None) for name in ("reasoning_content", "reasoning")]
    inside, text = split_thoughts(content)
    if not text.strip():
        # A lone mark is a thought too, one that was cut off at once.
        inside = inside or content.strip()
    return Reply(
        text=text,
        finish_reason=choice.finish_reason or "",
        model=completion.model or "",
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
        top_logprobs={top.token: top.logprob for top in tokens[0].top_logprobs} if tokens else None,
        choice=choice.model_dump() if keep_choice else None,
        thoughts="\n".join(
            dict.fromkeys(each for each in (*apart, inside) if isinstance(each, str) and each)
        ),
        refusal=getattr(message, "refusal", None) or "",
    )


def _part_text(part: Any) -> str:
    """The text of a part of a message's content, however deep it lies."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "".join(map(_part_text, part))
    return _part_text(part.get("text") or part.get("thinking") or "") if isinstance(part, dict) else ""


def _told(answer: Any) -> _Told:
    """The error in an answer that is no chat completion, in the server's words where it has some."""
    body: Any = answer if isinstance(answer, str) else getattr(answer, "model_extra", None) or {}
    error = body if isinstance(body, str) else body.get("error") or body
    named = error if isinstance(error, dict) else {}
    words = named.get("message") or named.get("detail") or (error if isinstance(error, str) else "")
    code = str(named.get("code") or (body.get("code") if isinstance(body, dict) else "") or "")
    status = int(code) if code.isdecimal() and 400 <= int(code) < 600 else 0
    told = f": {words}" if words else ""
    return _Told(f"no chat completion in the answer{told}", status, code)
