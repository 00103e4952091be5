"""Generation in left-padded batches: many prompts of any lengths through any transformers causal language model."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.model.cache import growing, selectable
from slimepo.model.grammar import Constraint, cut, taken
from slimepo.model.modes import Forward, scoring

# Dropping rows copies the cache, so it waits until a good part of the batch has nothing more to say.
_DROP_WHEN_DONE = 0.3
# A batch is read to the length of its longest prompt. At most half of that is padding, but for short prompts, which
# cost about one pass over the weights whatever their length.
_SHORT = 32


@dataclass(frozen=True)
class Completion:
    """What the model said: token ids, with the end token where it was reached (`finished`).

    `logps`: the log-prob of each token, from an engine that gives them; NaN for one that it could not give. `entropy`:
    of the model where each token was drawn, mean in nats, where it was asked for.
    """

    token_ids: list[int]
    finished: bool
    logps: list[float] | None = None
    entropy: float | None = None


def completion_text(tokenizer: Any, completion: Completion) -> str:
    """A completion as text, without its end token."""
    ids = completion.token_ids[:-1] if completion.finished else completion.token_ids
    return str(tokenizer.decode(ids))


class Mixture(NamedTuple):
    """Another model to draw tokens with: from softmax((1 - share) z + share z'), z the logits of the first, z' its own.

    `opened` yields its forward in the mode that it answers in; the first model may be in another one then.
    """

    model: Any
    opened: Callable[[], AbstractContextManager[Forward]]
    share: float


@dataclass(frozen=True)
class _Settings:
    end_ids: Tensor
    max_new_tokens: int
    temperature: float
    samples: int
    top_p: float
    entropy: bool


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_rows: int = 256,
    entropy: bool = False,
    mixture: Mixture | None = None,
    constraints: Sequence[Callable[[], Constraint]] | None = None,
    progress: Callable[[int], None] | None = None,
    done: Collection[int] = (),
    finished: Callable[[Sequence[int], Sequence[Sequence[Completion]]], None] | None = None,
) -> list[list[Completion]]:
    """Complete every prompt `samples` times; one list of completions a prompt, in the order of the prompts.

    prompts: token ids, not empty. Prompts of like lengths run together, padded on the left, and each is read once
    however many samples it has. A batch holds `batch_rows` rows (prompts x samples; at least one prompt), less as
    rows finish. Where padding would change what a model says (a state along the row, no position ids, rotary
    embeddings that go by the longest row), prompts of one exact length run together.
    temperature 0 takes the likeliest token each time; otherwise tokens are drawn from
    softmax(logits / temperature), cut to the likeliest tokens that reach a mass of `top_p`.
    seed: one for all prompts, or one for each.
    mixture: draw from the geometric mixture of the model and another one, token by token; with a share of 1 from that
    one alone.
    constraints: for each prompt what makes the constraint of one of its answers (see `slimepo.model.grammar`); tokens
    that it does not allow are left out before temperature and top_p, and near the limit an answer is closed.
    entropy: keep how uncertain the model was, whatever temperature, top_p and constraints drew from it.
    progress: called with the number of prompts that a finished batch held.
    finished: called with the places of a finished batch's prompts and their completions, so that these can be kept;
    done: places of prompts whose completions were kept by a run that was cut short. Batches that hold only such are
    passed by (their completions stay empty), and all others give the samples that the whole run would have given.

    A sample is a function of the seed, its prompt and its number among the prompt's samples (those of a prompt that
    is given twice are numbered on), whatever else is in the batch and whatever `batch_rows` and `max_new_tokens` are;
    greedy completions are one of the prompt alone. Other batches round logits otherwise, so this holds but for
    ties (and draws) within rounding.
    The model runs in evaluation mode without gradients and gets its mode back.
    Raises InputError for an empty prompt, a setting out of range, or a model without a key-value cache.
    """
    _refuse_bad_settings(prompts, end_token_ids, max_new_tokens, temperature, samples, top_p, batch_rows)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise InputError(
            f"generate: {len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one a prompt"
        )
    if constraints is not None and len(constraints) != len(prompts):
        raise InputError(
            f"generate: {len(constraints)} constraints for {len(prompts)} prompts: give one a prompt"
        )
    end_ids = torch.tensor(sorted(end_token_ids), device=next(model.parameters()).device)
    settings = _Settings(end_ids, max_new_tokens, temperature, samples, top_p, entropy)
    completions: list[list[Completion]] = [[] for _ in prompts]
    times: Counter[tuple[int, tuple[int, ...]]] = Counter()
    numbers = []  # of each prompt's samples
    for source in zip(seeds, map(tuple, prompts), strict=True):
        numbers.append(range(times[source] * samples, (times[source] + 1) * samples))
        times[source] += 1
    with scoring(model, own_precision=False):
        models = [model] if mixture is None else [model, mixture.model]
        pads = len({len(prompt) for prompt in prompts}) > 1 and all(
            _takes_padding(each, prompts[0][0]) for each in models
        )
        spoken = model if mixture is None else _Mixed(model, mixture)
        for batch in _batches(prompts, max(1, batch_rows // samples), pads):
            if set(done).issuperset(batch):
                continue
            drawn = batch if temperature else []
            draws = [
                _draws(seeds[i], prompts[i], number, max_new_tokens) for i in drawn for number in numbers[i]
            ]
            made = [constraints[i]() for i in batch for _ in range(samples)] if constraints else []
            rows = _complete(spoken, [prompts[index] for index in batch], settings, draws, made)
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


def _batches(prompts: Sequence[Sequence[int]], most: int, pads: bool) -> Iterator[list[int]]:
    """Indices of prompts of like lengths (of one length unless the model `pads`), `most` at a time, sorted."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), list(prompts[index])))
    batch: list[int] = []
    for index in order:
        if batch:
            shortest = len(prompts[batch[0]])
            longest = max(_SHORT, 2 * shortest) if pads else shortest
            if len(batch) == most or len(prompts[index]) > longest:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def _draws(seed: int, prompt: Sequence[int], number: int, steps: int) -> np.ndarray:
    """Uniform draws `[steps]` from [0, 1) for one sample of a prompt."""
    digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=16).digest()
    key = [seed % 2**64, int.from_bytes(digest, "big"), number]
    return np.random.default_rng(key).random(steps, dtype=np.float32)


def _complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: _Settings,
    draws: Sequence[np.ndarray],
    constraints: Sequence[Constraint],
) -> list[Completion]:
    """`samples` completions a prompt, side by side; `draws` has one array a completion, none where greedy.

    constraints: one a completion, or none at all.
    """
    device, limit = settings.end_ids.device, settings.max_new_tokens
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    padded = min(map(len, prompts)) < longest
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    # 0 on the padding, 1 on the prompt and on everything that will be generated.
    mask = (torch.arange(longest + limit, device=device) >= (longest - lengths)[:, None]).long()
    # No mask and no positions where nothing is padded: attention is plain causal then, which is faster.
    places: dict[str, Tensor] = {}
    if padded:
        # Padding gets position 0: nobody sees it, but a table of positions is looked up there too.
        position_ids = (mask[:, :longest].cumsum(dim=1) - 1).clamp_min(0)
        places = {"attention_mask": mask[:, :longest], "position_ids": position_ids}
    logits, cache = _read_prompts(model, ids, places, settings.samples)
    lengths, mask = (t.repeat_interleave(settings.samples, dim=0) for t in (lengths, mask))
    uniform = torch.from_numpy(np.stack(draws)).to(device) if draws else None
    rows = torch.arange(len(logits), device=device)
    tokens = torch.full((len(logits), limit), -1, device=device)
    # The sum over the tokens of each row.
    entropy = torch.zeros(len(logits), device=device) if settings.entropy else None
    done = torch.zeros(len(logits), dtype=torch.bool, device=device)
    if droppable := selectable(cache):
        growing(cache)
    for step in range(limit):
        states = enumerate(zip(rows.tolist(), done.tolist(), strict=True)) if constraints else ()
        going = {at: constraints[row] for at, (row, ended) in states if not ended}
        chosen = _choose(cut(logits, going), settings, None if uniform is None else uniform[rows, step])
        chosen = taken(chosen, going, limit - step - 1)
        tokens[rows, step] = chosen.masked_fill(done, -1)
        if entropy is not None:
            of_rows = torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1)
            entropy[rows] += of_rows.masked_fill(done, 0.0)
        done = done | torch.isin(chosen, settings.end_ids)
        finished = int(done.sum())
        if finished == len(done) or step + 1 == limit:
            break
        if droppable and finished >= _DROP_WHEN_DONE * len(done):
            keep = (~done).nonzero().squeeze(1)
            for layer in cache.layers:
                layer.batch_select_indices(keep)
            rows, chosen, done, lengths, mask = (t[keep] for t in (rows, chosen, done, lengths, mask))
        if padded:
            position_ids = (lengths + step)[:, None]
            places = {"attention_mask": mask[:, : longest + step + 1], "position_ids": position_ids}
        output = model(input_ids=chosen[:, None], use_cache=True, **places, **{_cache_name(model): cache})
        logits = output.logits[:, -1]
    return _completions(tokens, settings.end_ids, entropy)


def _read_prompts(model: Any, prompts: Tensor, places: dict[str, Tensor], samples: int) -> tuple[Tensor, Any]:
    """Logits of the first new token, `[rows * samples, vocabulary]`, and the cache for that many rows."""
    # Spares the logits of all prompt tokens but the last, where the model knows how.
    last_alone = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
    output = model(input_ids=prompts, use_cache=True, **places, **last_alone)
    cache = getattr(output, _cache_name(model), None)
    if cache is None:
        raise InputError(f"{type(model).__name__} returns no key-value cache, and generation needs one")
    if samples == 1:
        return output.logits[:, -1], cache
    if selectable(cache):
        for layer in cache.layers:
            layer.batch_repeat_interleave(samples)
        return output.logits[:, -1].repeat_interleave(samples, dim=0), cache
    return _read_prompts(model, prompts.repeat_interleave(samples, dim=0), {}, 1)


class _Mixed:
    """Two models as one; what it calls its cache holds the layers of both, so that rows are dropped from both."""

    def __init__(self, model: Any, mixture: Mixture) -> None:
        own = Mixture(model, lambda: nullcontext(model), 1 - mixture.share)
        self.parts = [mixture] if mixture.share == 1 else [own, mixture]

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 0, **places: Any
    ) -> Any:
        logits: Any = 0
        caches = []
        for number, (model, opened, share) in enumerate(self.parts):
            given = {} if past_key_values is None else {_cache_name(model): past_key_values.parts[number]}
            if logits_to_keep and "logits_to_keep" in _parameters(model):
                given["logits_to_keep"] = logits_to_keep
            with opened() as forward:
                output = forward(input_ids=input_ids, **places, **given)
            logits = logits + share * output.logits[:, -1:].float()
            caches.append(getattr(output, _cache_name(model), None))
        # A cache without layers is one that no row can be selected from, and so are both together.
        layers = [layer for cache in caches for layer in getattr(cache, "layers", None) or [None]]
        both = None if None in caches else SimpleNamespace(parts=caches, layers=layers)
        return SimpleNamespace(logits=logits, past_key_values=both)

    def __call__(self, **given: Any) -> Any:
        return self.forward(**given)


def _parameters(model: Any) -> Collection[str]:
    """The names of the forward's parameters, inside peft's wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inner.forward).parameters


def _cache_name(model: Any) -> str:
    """What the model calls its cache: `past_key_values`, or `cache` since transformers 5.24."""
    return "cache" if "cache" in _parameters(model) else "past_key_values"


def _takes_padding(model: Any, token: int) -> bool:
    """Whether a row says the same with padding on its left: its cache is that of plain attention, and positions are
    given to it, and are all that its rotary embeddings go by."""
    if not {"attention_mask", "position_ids"} <= set(_parameters(model)):
        return False
    # These change their frequencies with the largest position of the batch.
    rotary = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    if "dynamic" in rotary or "longrope" in rotary:
        return False
    # Llama 4 scales queries by their place in the line, padding counted.
    if any(getattr(module, "attn_temperature_tuning", False) for module in model.modules()):
        return False
    # What a cache is made of only a pass tells; one of one token costs what a token of an answer does.
    ids = torch.tensor([[token]], device=next(model.parameters()).device)
    return selectable(getattr(model(input_ids=ids, use_cache=True), _cache_name(model), None))


def _choose(logits: Tensor, settings: _Settings, uniform: Tensor | None) -> Tensor:
    """One token a row from logits `[rows, vocabulary]`: the likeliest, or the one at a `uniform` number `[rows]`."""
    if uniform is None:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / settings.temperature).softmax(dim=-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while the mass before it is short of top_p, so the likeliest always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    # Inverse transform sampling: one number a row, and logits that round otherwise give another token only where it
    # falls within rounding of a boundary. `right` steps over tokens without probability.
    mass = probabilities.cumsum(dim=-1)
    return torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).squeeze(1)


def _completions(tokens: Tensor, end_ids: Tensor, entropy: Tensor | None) -> list[Completion]:
    ends = set(end_ids.tolist())
    rows = [[token for token in row if token >= 0] for row in tokens.tolist()]
    sums = [None] * len(rows) if entropy is None else entropy.tolist()
    return [
        Completion(row, row[-1] in ends, entropy=None if total is None else total / len(row))
        for row, total in zip(rows, sums, strict=True)
    ]
