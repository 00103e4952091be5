"""Generation in batches without padding: many short prompts through any transformers causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from slimepo.errors import InputError

# Dropping rows copies the cache, so it waits until a good part of the batch has nothing more to say.
_DROP_WHEN_DONE = 0.3


@dataclass(frozen=True)
class Completion:
    """What the model said: token ids, with the end token where it was reached (`finished`)."""

    token_ids: list[int]
    finished: bool


@dataclass(frozen=True)
class _Settings:
    end_ids: Tensor
    max_new_tokens: int
    temperature: float
    samples: int
    top_p: float


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    top_p: float = 1.0,
    seed: int = 0,
    batch_rows: int = 256,
    progress: Callable[[int], None] | None = None,
    done: Collection[int] = (),
    finished: Callable[[Sequence[int], Sequence[Sequence[Completion]]], None] | None = None,
) -> list[list[Completion]]:
    """Complete every prompt `samples` times; one list of completions a prompt, in the order of the prompts.

    prompts: token ids, not empty. Prompts of one exact length run together, so that nothing is ever padded, and
    each is read once however many samples it has. A batch holds `batch_rows` rows (prompts x samples; at least
    one prompt), less as rows finish.
    temperature 0 takes the likeliest token each time; otherwise tokens are drawn from
    softmax(logits / temperature), cut to the likeliest tokens that reach a mass of `top_p`.
    progress: called with the number of prompts that a finished batch held.
    finished: called with the places of a finished batch's prompts and their completions, so that these can be kept;
    done: places of prompts whose completions were kept by a run that was cut short. Batches that hold only such are
    passed by (their completions stay empty), and all others give the samples that the whole run would have given.

    Batches are made from the sorted prompts, each with its own generator. So the same prompts in any order, with
    the same seed, `samples` and `batch_rows`, on the same machine, give the same samples; another `batch_rows`
    draws others. Greedy completions do not depend on the order or the batch, but for ties within rounding.
    The model runs in evaluation mode without gradients and gets its mode back.
    Raises InputError for an empty prompt, a setting out of range, or a model without a key-value cache.
    """
    _refuse_bad_settings(prompts, end_token_ids, max_new_tokens, temperature, samples, top_p, batch_rows)
    device = next(model.parameters()).device
    end_ids = torch.tensor(sorted(end_token_ids), device=device)
    settings = _Settings(end_ids, max_new_tokens, temperature, samples, top_p)
    completions: list[list[Completion]] = [[] for _ in prompts]
    with _evaluating(model), torch.no_grad():
        known = set(done)
        for number, batch in enumerate(_batches(prompts, max(1, batch_rows // samples))):
            if known.issuperset(batch):
                continue
            ids = torch.tensor([list(prompts[index]) for index in batch], device=device)
            # Distinct for every (seed, batch) that anybody runs, and known in advance.
            generator = torch.Generator(device=device).manual_seed((seed * 1_000_003 + number) % 2**63)
            rows = _complete(model, ids, settings, generator)
            for place, index in enumerate(batch):
                completions[index] = rows[place * samples : (place + 1) * samples]
            if finished is not None:
                finished(batch, [completions[index] for index in batch])
            if progress is not None:
                progress(len(batch))
    return completions


def _refuse_bad_settings(
    prompts: Sequence[Sequence[int]],
    end_token_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
    samples: int,
    top_p: float,
    batch_rows: int,
) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {index} is empty: a prompt needs one token at least")
    bounds = {
        "end_token_ids": (len(end_token_ids) > 0, "one id at least"),
        "max_new_tokens": (max_new_tokens >= 1, "1 or more"),
        "temperature": (temperature >= 0, "0 (greedy) or more"),
        "samples": (samples >= 1, "1 or more"),
        "top_p": (0 < top_p <= 1, "more than 0 and at most 1"),
        "batch_rows": (batch_rows >= 1, "1 or more"),
    }
    for name, (fits, allowed) in bounds.items():
        if not fits:
            raise InputError(f"generate: {name} must be {allowed}")
    if samples > 1 and temperature == 0:
        raise InputError("generate: samples > 1 at temperature 0 are all the same: set a temperature")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _batches(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Indices of prompts of one length, `most` at a time; sorted by content so that order means nothing."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), list(prompts[index])))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == most or len(prompts[index]) != len(prompts[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _complete(
    model: Any, prompts: Tensor, settings: _Settings, generator: torch.Generator
) -> list[Completion]:
    """Complete prompts `[rows, length]`; `samples` completions a row, side by side."""
    logits, cache = _read_prompts(model, prompts, settings.samples)
    count = logits.shape[0]
    tokens = torch.full((count, settings.max_new_tokens), -1, device=prompts.device)
    rows = torch.arange(count, device=prompts.device)
    done = torch.zeros(count, dtype=torch.bool, device=prompts.device)
    droppable = _selectable(cache)
    for step in range(settings.max_new_tokens):
        chosen = _choose(logits, settings, generator)
        tokens[rows, step] = chosen.masked_fill(done, -1)
        done = done | torch.isin(chosen, settings.end_ids)
        finished = int(done.sum())
        if finished == len(done) or step + 1 == settings.max_new_tokens:
            break
        if droppable and finished >= _DROP_WHEN_DONE * len(done):
            keep = (~done).nonzero().squeeze(1)
            for layer in cache.layers:
                layer.batch_select_indices(keep)
            rows, chosen, done = rows[keep], chosen[keep], done[keep]
        output = model(input_ids=chosen[:, None], past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1], output.past_key_values
    return _completions(tokens, settings.end_ids)


def _read_prompts(model: Any, prompts: Tensor, samples: int) -> tuple[Tensor, Any]:
    """Logits of the first new token, `[rows * samples, vocabulary]`, and the cache for that many rows."""
    output = model(input_ids=prompts, use_cache=True, **_last_logits_only(model))
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise InputError(f"{type(model).__name__} returns no key-value cache, and generation needs one")
    if samples == 1:
        return output.logits[:, -1], cache
    if _selectable(cache):
        for layer in cache.layers:
            layer.batch_repeat_interleave(samples)
        return output.logits[:, -1].repeat_interleave(samples, dim=0), cache
    return _read_prompts(model, prompts.repeat_interleave(samples, dim=0), 1)


def _last_logits_only(model: Any) -> dict[str, int]:
    """The argument that spares the logits of all prompt tokens but the last, where the model knows it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


def _selectable(cache: Any) -> bool:
    """Whether rows of this cache can be repeated and dropped: true of plain attention layers.

    Other layers (recurrent states, quantised or indexed caches) keep what a plain selection would miss.
    """
    layers = getattr(cache, "layers", [])
    return len(layers) > 0 and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def _choose(logits: Tensor, settings: _Settings, generator: torch.Generator) -> Tensor:
    """One token a row from logits `[rows, vocabulary]`."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / settings.temperature).softmax(dim=-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while the mass before it is short of top_p, so the likeliest always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def _completions(tokens: Tensor, end_ids: Tensor) -> list[Completion]:
    ends = set(end_ids.tolist())
    rows = [[token for token in row if token >= 0] for row in tokens.tolist()]
    return [Completion(row, bool(row) and row[-1] in ends) for row in rows]
