"""An offline judge: an HTTP server that speaks the OpenAI protocol and fails where its script says so."""

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdefSECRET"
VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")


@dataclass(frozen=True)
class Say:
    """Answer with this text."""

    text: str | None
    finish_reason: str = "stop"
    thoughts: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Slow:
    """Answer with this text after so many seconds."""

    text: str
    seconds: float


@dataclass(frozen=True)
class Fail:
    """Answer with this status, headers and error message; `{key}` stands for the key that the caller sent."""

    status: int
    message: str = "scripted failure"
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None


@dataclass(frozen=True)
class Raw:
    """Answer 200 with a body that is no chat completion."""

    body: bytes


@dataclass(frozen=True)
class Hang:
    """Say nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Drip:
    """Send the answer byte by byte, so many seconds apart."""

    seconds: float


@dataclass
class MockJudge:
    """`script` is used up first, one entry a call; then every call gets a verdict that fits its prompt."""

    url: str
    script: deque[Any] = field(default_factory=deque)
    calls: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    delay: float = 0.0
    logprobs: bool = True
    models: tuple[str, ...] = ("mock",)
    refuses: dict[str, str] = field(default_factory=dict)
    under_way: int = 0
    most_under_way: int = 0
    lock: Any = field(default_factory=threading.Lock)

    @property
    def judge(self) -> str:
        return f"mock@{self.url}"

    def next(self, body: dict[str, Any], key: str) -> Any:
        with self.lock:
            self.calls.append(body)
            self.times.append(time.monotonic())
            self.keys.add(key)
            return self.script.popleft() if self.script else None


def verdict(messages: list[dict[str, str]]) -> str:
    """A fixed verdict for each prompt: a rating, a letter, or one of Arena-Hard's five."""
    text = "\n".join(message["content"] for message in messages)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    if "[[rating]]" in text:
        return f"It answers the question. Rating: [[{1 + number % 10}]]"
    if "model identifier" in text:
        return "mM"[number % 2]
    return f"Both have merits. My final verdict is: [[{VERDICTS[number % 5]}]]"


def completion(body: dict[str, Any], said: Say, logprobs: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": said.finish_reason,
        "message": {"role": "assistant", "content": said.text, "refusal": said.refusal},
    }
    if said.thoughts is not None:
        choice["message"]["reasoning_content"] = said.thoughts
    if body.get("logprobs") and logprobs:
        other = "M" if said.text == "m" else "m"
        tops = [
            {"token": said.text, "logprob": -0.1, "bytes": None},
            {"token": other, "logprob": -2.5, "bytes": None},
        ]
        choice["logprobs"] = {
            "content": [{"token": said.text, "logprob": -0.1, "bytes": None, "top_logprobs": tops}]
        }
    prompt = sum(len(message["content"]) for message in body["messages"])
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": len(said.text or ""),
        "total_tokens": prompt + len(said.text or ""),
    }
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mock: MockJudge

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.mock.models]
        self._send(200, json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        mock = self.mock
        answer = mock.next(body, key)
        with mock.lock:
            mock.under_way += 1
            mock.most_under_way = max(mock.most_under_way, mock.under_way)
        try:
            self._answer(body, key, answer)
        except (BrokenPipeError, ConnectionResetError):
            pass  # The caller has gone: killed, or out of patience.
        finally:
            with mock.lock:
                mock.under_way -= 1

    def _answer(self, body: dict[str, Any], key: str, answer: Any) -> None:
        time.sleep(self.mock.delay)
        if isinstance(answer, Hang):
            time.sleep(answer.seconds)
            answer = None
        if isinstance(answer, Slow):
            time.sleep(answer.seconds)
            answer = Say(answer.text)
        named = [*body, *(message["role"] for message in body["messages"])]
        refused = next((words for name, words in self.mock.refuses.items() if name in named), None)
        if refused:
            answer = Fail(400, refused)
        if isinstance(answer, Fail):
            error = {"message": answer.message.replace("{key}", key), "type": "x", "code": answer.code}
            self._send(answer.status, json.dumps({"error": error}).encode(), answer.headers)
        elif isinstance(answer, Raw):
            self._send(200, answer.body)
        elif isinstance(answer, Drip):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b" ")
                time.sleep(answer.seconds)
        else:
            said = answer or Say(verdict(body["messages"]))
            self._send(200, json.dumps(completion(body, said, self.mock.logprobs)).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[MockJudge]:
    """A mock judge on a free port of this machine."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    # A client that goes away is no news; the standard library would print a traceback into what a test reads.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    mock = MockJudge(f"http://127.0.0.1:{server.server_address[1]}/v1")
    handler.mock = mock  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield mock
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
