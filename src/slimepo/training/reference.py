"""Log-probs of the reference model: the policy with its adapters off, a frozen second model, or a cache.

The reference is the model that training starts from, or another one if it is asked for. Where an objective reads no
reference, nothing here runs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from slimepo.data.batch import PairBatch, StepCollator, collate, given_sides, length, pair_logps
from slimepo.data.chat import load_tokenizer
from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError
from slimepo.losses.table import nearest
from slimepo.training.attention import install, path_of
from slimepo.training.folder import cache_folder
from slimepo.training.layout import choose_layout, probe, to_device
from slimepo.training.logps import causal_lm, install_logps, plain_forward, policy_logps
from slimepo.training.models import load_model
from slimepo.training.precision import measuring
from slimepo.types import PairLogps

SOURCES = ("auto", "adapters-off", "copy", "cache")

# Rows that are cut into batches together; packing takes the square of their number.
_CUT_AT_ONCE = 512
# Changes when what a cache file holds changes.
_CACHE_VERSION = 1
# In the names of the parameters that peft adds: LoRA's, IA3's, and copies of modules that train whole.
_OF_ADAPTERS = ("lora_", "ia3_", "modules_to_save")

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Reference:
    """Where reference log-probs come from, and why from there.

    `forward` yields the reference's forward pass; `cached` says that it is used before training alone, and
    `without_adapters` that the policy's adapters have no part in it.
    """

    source: str
    reason: str
    forward: Callable[[], AbstractContextManager[Forward]]
    cached: bool = False
    without_adapters: bool = False


def choose_reference(
    model: nn.Module,
    wanted: str,
    layout: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **load_options: Any,
) -> Reference:
    """The reference for a policy that has not been trained yet.

    Args:
        model: the policy, with `install_logps` done and its layout chosen.
        wanted: one of SOURCES, or the folder or Hub id of another model. "auto" switches adapters off where the
            policy without them is what training starts from, and computes the log-probs beforehand elsewhere.
        layout: the layout of the batches.
        tokenizer: the policy's, which another model's is compared with where that has one.
        load_options: for loading another model.

    Raises:
        InputError: the policy has no adapters to switch off, or they make a difference before training; another
            model that does not fit.
    """
    if wanted == "copy":
        return Reference("copy", "a frozen copy of the policy", frozen(copy.deepcopy(model)))
    if wanted not in SOURCES:
        other = _load(wanted, model, layout, load_options)
        if tokenizer is not None:
            _check_tokens(wanted, tokenizer)
        return Reference(wanted, "a frozen model", frozen(other))
    obstacle = _why_not_adapters_off(model)
    if wanted == "cache" or (wanted == "auto" and obstacle is not None):
        reason = "computed before training" + (f", as {obstacle}" if wanted == "auto" else "")
        forward = frozen(model) if obstacle else lambda: adapters_off(model)
        return Reference("cache", reason, forward, True, obstacle is None)
    if obstacle is None:
        return Reference("adapters-off", "the policy without its adapters", lambda: adapters_off(model))
    raise InputError(f"reference 'adapters-off': {obstacle}; use reference 'copy' or 'cache'")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[Forward]:
    """Inside, the yielded forward is the policy's without adapters, in eval mode; a trained head is off as well.

    The head's weight is the policy's again outside, so the forward must not be used there.
    """
    peft_model: Any = model
    # Switching adapters on again, peft lets all of their parameters train, those that the user froze among them.
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with frozen(model)() as forward, peft_model.disable_adapter():
            yield forward
    finally:
        for parameter, before in trains:
            parameter.requires_grad_(before)


def frozen(model: nn.Module) -> Callable[[], AbstractContextManager[Forward]]:
    """A context in which the yielded forward is `model`'s in eval mode, without gradients."""

    @contextmanager
    def context() -> Iterator[Forward]:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield plain_forward(model)
        finally:
            model.train(training)

    return context


def reference_logps(reference: Reference, batch: PairBatch) -> PairLogps:
    """Reference log-probs of a batch's response tokens, detached: those known beforehand, or computed now.

    Raises:
        InputError: they had to be known beforehand and are not.
    """
    if batch["reference"] is not None:
        return pair_logps(batch["reference"], batch)
    if reference.cached:
        raise InputError(
            f"row {batch['row_ids'][0]}: its reference log-probs were not computed before training; "
            "give the trainer these rows when it is made, or use reference 'copy'"
        )
    with reference.forward() as forward:
        return policy_logps(forward, batch)


def with_reference(
    rows: Sequence[TokenizedPair],
    reference: Reference,
    model: nn.Module,
    collator: StepCollator,
    precision: Callable[[], AbstractContextManager[Any]],
    accelerator: Any,
    folder: Path | None = None,
) -> tuple[list[TokenizedPair], bool]:
    """The rows with their reference log-probs, and whether these came from the cache in `folder`.

    Every rank computes a share; the main process writes the file. `model` names the weights in the file's key;
    `precision` is the autocast that they are computed under, which is to be the one that reads them.
    """
    folder = folder or cache_folder("reference")
    kind = _device(model).type
    with precision():
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
    path: Path | None = None
    if accelerator.is_main_process:
        # The key reads every weight; only the process that has the file needs it.
        path = folder / f"{_key(model, reference, rows, autocast)}.npy"
    known = _broadcast(_read(path, rows) if path else None, accelerator)
    cached = known is not None
    if known is None:
        if path is not None:
            _make_folder(folder)
        mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
        with precision(), reference.forward() as forward:
            computed = _compute([rows[i] for i in mine], forward, collator, _device(model))
        everyone = _gather(dict(zip(mine, computed, strict=True)), accelerator)
        known = [everyone[i] for i in range(len(rows))]
        if path is not None:
            _write(path, known)
    return [replace(row, reference=logps) for row, logps in zip(rows, known, strict=True)], cached


Known = dict[str, np.ndarray]


def _compute(
    rows: Sequence[TokenizedPair], forward: Forward, collator: StepCollator, device: torch.device
) -> list[Known]:
    """Log-probs of every response of each row, and of its mismatched answer."""
    result: list[Known] = [{} for _ in rows]
    for index in _batches(rows, collator):
        batch = to_device(collator.batch([rows[i] for i in index]), device)
        for part, name in ((batch, None), (batch["mismatched"], "mismatched")):
            if part is None:
                continue
            flat = policy_logps(forward, part)
            for side in part["sides"]:
                values, mask = getattr(flat, side).float().cpu(), getattr(flat, f"{side}_mask").cpu()
                for place, row in enumerate(index):
                    if mask[place].any():
                        result[row][name or side] = values[place][mask[place]].numpy()
    return result


def _batches(rows: Sequence[TokenizedPair], collator: StepCollator) -> Iterator[list[int]]:
    """Which rows are computed together: those of similar length, no more than a micro-batch of training holds."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i], collator.sides), reverse=True)
    for start in range(0, len(order), _CUT_AT_ONCE):
        part = order[start : start + _CUT_AT_ONCE]
        for index in collator.cut([rows[i] for i in part]):
            yield [part[i] for i in index]


def _key(model: nn.Module, reference: Reference, rows: Sequence[TokenizedPair], precision: str) -> str:
    """What the log-probs are a function of: weights and configuration of the reference, token ids, precision."""
    digest = hashlib.blake2b(digest_size=16)
    config = causal_lm(model).config.to_dict()
    for name in (
        "_name_or_path",
        "transformers_version",
        "_attn_implementation",
        "attn_implementation",
        "dtype",
    ):
        config.pop(name, None)
    digest.update(json.dumps([_CACHE_VERSION, precision, config], sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if reference.without_adapters and any(part in name for part in _OF_ADAPTERS):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    for row in rows:
        parts = [
            row.prompt,
            row.chosen,
            row.rejected,
            row.prompt[:0] if row.mismatched is None else row.mismatched,
        ]
        for part in parts:
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part, dtype="<i4").data)
    return digest.hexdigest()


def _names(row: TokenizedPair) -> list[tuple[str, int]]:
    """The responses of a row in the order in which a cache file holds them, and their lengths."""
    names = [(side, len(getattr(row, side))) for side in given_sides(row)]
    return names if row.mismatched is None else [*names, ("mismatched", len(row.mismatched))]


def _read(path: Path, rows: Sequence[TokenizedPair]) -> list[Known] | None:
    if not path.exists():
        return None
    flat = np.load(path)
    if len(flat) != sum(size for row in rows for _, size in _names(row)):
        raise InputError(f"{path} is damaged: it holds another number of log-probs; delete it")
    known, start = [], 0
    for row in rows:
        of_row: Known = {}
        for name, size in _names(row):
            of_row[name] = flat[start : start + size]
            start += size
        known.append(of_row)
    return known


def _make_folder(folder: Path) -> None:
    """Make sure that what is about to be computed can be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"the cache of reference log-probs cannot be written ({error}); set SLIMEPO_CACHE to another folder"
        ) from error


def _write(path: Path, known: Sequence[Known]) -> None:
    flat = np.concatenate([values for of_row in known for values in of_row.values()])
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, flat)
    os.replace(file.name, path)


def _gather(part: dict[int, Known], accelerator: Any) -> dict[int, Known]:
    if accelerator.num_processes == 1:
        return part
    from accelerate.utils import gather_object

    return {index: known for of_rank in gather_object([part]) for index, known in of_rank.items()}


def _broadcast(known: list[Known] | None, accelerator: Any) -> list[Known] | None:
    if accelerator.num_processes == 1:
        return known
    from accelerate.utils import broadcast_object_list

    (known,) = broadcast_object_list([known])
    return known


def _why_not_adapters_off(model: nn.Module) -> str | None:
    """What speaks against the policy without adapters as the reference; None where nothing does."""
    if not hasattr(model, "disable_adapter"):
        return "the policy has no adapters"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outside = [name for name in trained if not any(part in name for part in _OF_ADAPTERS)]
    if outside:
        return f"{outside[0]} trains outside the adapters"
    device = _device(model)
    batch = to_device(collate(probe(causal_lm(model).config.get_text_config().vocab_size)), device)
    with measuring(model) as forward:
        with_adapters = policy_logps(forward, batch)
        with adapters_off(model) as without:
            plain = policy_logps(without, batch)
    same = torch.allclose(with_adapters.chosen, plain.chosen, atol=1e-3) and torch.allclose(
        with_adapters.rejected, plain.rejected, atol=1e-3
    )
    return None if same else "the adapters have been trained before"


def _load(name: str, policy: nn.Module, layout: str, options: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = load_model(name, **options)
    except InputError as error:
        sources = f"{', '.join(SOURCES)}{nearest(name, list(SOURCES))}"
        raise InputError(f"reference {name!r} is none of {sources}, and as another model: {error}") from error
    ours, theirs = (causal_lm(m).config.get_text_config().vocab_size for m in (policy, model))
    if ours != theirs:
        raise InputError(
            f"reference {name!r} has a vocabulary of {theirs} tokens and the policy one of {ours}; "
            "the reference must read the same tokens"
        )
    install_logps(model)
    if layout != "padded":
        choose_layout(model, layout, attention="side_by_side")
        # The path that the policy takes, measured or asked for; what that cannot compute goes side by side.
        install(causal_lm(model), path_of(causal_lm(policy)))
    model.requires_grad_(False)
    model.to(_device(policy))
    return model


def _check_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference in whose tokenizer a token has another id than in the policy's."""
    try:
        theirs = load_tokenizer(name).get_vocab()
    except InputError:
        # A folder may hold a model alone; there is nothing to compare then.
        return
    ours = tokenizer.get_vocab()
    moved = next((token for token, number in theirs.items() if ours.get(token, number) != number), None)
    if moved is not None:
        raise InputError(
            f"reference {name!r} has the id {theirs[moved]} for {moved!r} and the policy's tokenizer {ours[moved]}; "
            "the reference must read the same tokens"
        )


def _device(model: nn.Module) -> torch.device:
    return causal_lm(model).get_input_embeddings().weight.device  # type: ignore[no-any-return]
