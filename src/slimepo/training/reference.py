"""Log-probs of the reference model: the policy with its adapters off, a frozen second model, or a cache.

The reference is the model that training starts from, or another one if it is asked for. Where an objective reads no
reference, nothing here runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from slimepo.data.batch import Batch, collate, to_device
from slimepo.data.chat import load_tokenizer
from slimepo.errors import BadFilesError, InputError
from slimepo.model.adapters import OF_ADAPTERS
from slimepo.model.attention.interface import install, path_of
from slimepo.model.load import load_model
from slimepo.model.logps import causal_lm, install_logps, policy_logps, response_logps
from slimepo.model.modes import Forward, scoring
from slimepo.model.tryout import choose_layout, probe
from slimepo.training.config import PreferenceConfig
from slimepo.types import REFERENCE_SOURCES
from slimepo.words import nearest


@dataclass(frozen=True)
class Reference:
    """Where reference log-probs come from, and why from there.

    `forward` yields the forward pass of `model` as the reference; `cached` says that it is used before training alone,
    and `without_adapters` that the policy's adapters have no part in it.
    """

    source: str
    reason: str
    model: nn.Module
    forward: Callable[[], AbstractContextManager[Forward]]
    cached: bool = False
    without_adapters: bool = False

    def seen_by(self, policy: nn.Module) -> Reference:
        """The same with another copy of the policy, where it is the policy itself, without adapters or at the start."""
        if not (self.without_adapters or self.cached) or policy is self.model:
            return self
        adapters = not self.without_adapters
        forward = functools.partial(scoring, policy, adapters=adapters, own_precision=False)
        return replace(self, model=policy, forward=forward)


def choose_reference(
    model: nn.Module,
    wanted: str | nn.Module,
    layout: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **load_options: Any,
) -> Reference:
    """The reference for a policy that has not been trained yet.

    Args:
        model: the policy, with `install_logps` done and its layout chosen.
        wanted: one of REFERENCE_SOURCES, or another model: its folder or Hub id, or itself. "auto" switches adapters
            off where the policy without them is what training starts from, and computes the log-probs beforehand
            elsewhere.
        layout: the layout of the batches.
        tokenizer: the policy's, which another model's is compared with where that has one.
        load_options: for loading another model.

    Raises:
        InputError: the policy has no adapters to switch off, or they make a difference before training; another
            model that does not fit.
    """

    # In the precision of the steps that read what it says.
    def ambient(of: nn.Module, adapters: bool = True) -> Callable[[], AbstractContextManager[Forward]]:
        return functools.partial(scoring, of, adapters=adapters, own_precision=False)

    if isinstance(wanted, nn.Module):
        name = getattr(causal_lm(wanted).config, "_name_or_path", "") or type(wanted).__name__
        other = _fitted(wanted, name, model, layout)
        return Reference(name, "a frozen model", other, ambient(other))
    if wanted == "copy":
        other = copy.deepcopy(model)
        return Reference("copy", "a frozen copy of the policy", other, ambient(other))
    if wanted not in REFERENCE_SOURCES:
        other = _fitted(_load(wanted, load_options), wanted, model, layout)
        if tokenizer is not None:
            _check_tokens(wanted, tokenizer)
        return Reference(wanted, "a frozen model", other, ambient(other))
    obstacle = _why_not_adapters_off(model)
    policy = ambient(model, adapters=obstacle is not None)
    if wanted == "cache" or (wanted == "auto" and obstacle is not None):
        reason = "computed before training" + (f", as {obstacle}" if wanted == "auto" else "")
        return Reference("cache", reason, model, policy, True, obstacle is None)
    if obstacle is None:
        return Reference(
            "adapters-off", "the policy without its adapters", model, policy, without_adapters=True
        )
    raise InputError(f"reference 'adapters-off': {obstacle}; use reference 'copy' or 'cache'")


def reference_for(
    args: PreferenceConfig,
    given: nn.Module | str | None,
    model: nn.Module,
    layout: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Reference | None:
    """The reference of a run: `choose_reference` by its settings; None where nothing reads one.

    given: another model, in place of the settings' `reference`.
    """
    sampling, asked = args.sampling, args.reads_reference
    if not asked and not sampling:
        return None
    wanted = given if isinstance(given, nn.Module) else args.reference if asked else "auto"
    if wanted == "auto" and args.sync_reference:
        wanted = "copy"
    reference = choose_reference(model, wanted, layout, tokenizer, **args.model_init_kwargs)
    if sampling and reference.cached:
        # Rows that do not exist yet are in no cache. What is but looked at is worth no second model, unless asked.
        return choose_reference(model, "copy", layout) if asked or sampling.watch_kl else None
    return reference


def reference_logps(reference: Reference, batches: Sequence[Batch]) -> list[Tensor]:
    """Reference log-probs `[N]` of the batches' response tokens, detached: those known beforehand, or computed now.

    Adapters are switched off once for all of the batches: that costs as much as small batches do.

    Raises:
        InputError: they had to be known beforehand and are not.
    """
    unknown = [batch for batch in batches if "reference" not in batch["token_values"]]
    if unknown and reference.cached:
        raise InputError(
            f"row {unknown[0]['row_ids'][0]}: its reference log-probs were not computed before training, as those of "
            "eval_dataset and of the rows that the run's steps read; give the trainer these rows as eval_dataset "
            "when it is made, or use reference 'copy'"
        )
    opened: AbstractContextManager[Any] = reference.forward() if unknown else nullcontext()
    with opened as forward:
        return [
            batch["token_values"]["reference"]
            if "reference" in batch["token_values"]
            else response_logps(forward, batch)
            for batch in batches
        ]


def _why_not_adapters_off(model: nn.Module) -> str | None:
    """What speaks against the policy without adapters as the reference; None where nothing does."""
    if not hasattr(model, "disable_adapter"):
        return "the policy has no adapters"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outside = [name for name in trained if not any(part in name for part in OF_ADAPTERS)]
    if outside:
        return f"{outside[0]} trains outside the adapters"
    device = device_of(model)
    batch = to_device(collate(probe(model)), device)
    with scoring(model) as forward:
        with_adapters = policy_logps(forward, batch)
        with scoring(model, adapters=False) as without:
            plain = policy_logps(without, batch)
    # A new adapter adds zeros, but for the last digits where it divides by a norm; a trained one may add little.
    same = torch.allclose(with_adapters.chosen, plain.chosen, rtol=0, atol=1e-5) and torch.allclose(
        with_adapters.rejected, plain.rejected, rtol=0, atol=1e-5
    )
    return None if same else "the adapters have been trained before"


def _load(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = load_model(name, **options)
        return model
    except BadFilesError:
        raise
    except InputError as error:
        sources = f"{', '.join(REFERENCE_SOURCES)}{nearest(name, list(REFERENCE_SOURCES))}"
        raise InputError(f"reference {name!r} is none of {sources}, and as another model: {error}") from error


def _fitted(model: nn.Module, name: str, policy: nn.Module, layout: str) -> nn.Module:
    """Another model, frozen and giving log-probs; InputError where it reads other tokens than the policy."""
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
    model.to(device_of(policy))
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


def device_of(model: nn.Module) -> torch.device:
    return causal_lm(model).get_input_embeddings().weight.device  # type: ignore[no-any-return]
