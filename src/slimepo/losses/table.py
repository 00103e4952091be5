"""The table of objectives, and what can be read off a signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from slimepo.errors import InputError
from slimepo.imports import find_function
from slimepo.losses.dpo import chi_po, dpo, ipo, lpo, rpo
from slimepo.losses.kto import kto
from slimepo.losses.presets import PRESETS
from slimepo.losses.sft import sft
from slimepo.losses.simpo import cpo, orpo, simpo
from slimepo.losses.slime import slime
from slimepo.types import LossOutput, PairLogps
from slimepo.words import nearest

LossFunction = Callable[..., LossOutput]


class Objective(NamedTuple):
    """A loss function, what it reads, and option values that stand in front of its own defaults.

    `positions`: the responses of a row that it reads, 0 being the chosen one (what is not read is never computed).
    `judged`: it learns from answers judged one by one, so that a row has one of the two and a pair counts as two rows.
    """

    function: LossFunction
    positions: tuple[int, ...] = (0, 1)
    judged: bool = False
    preset: Mapping[str, Any] = {}

    @property
    def asks(self) -> tuple[str, ...]:
        """What it is given beside the policy's log-probs: every further parameter without a default.

        `reference`: log-probs of a reference model; `divergence`: the mean log-ratio to it of answers to other
        prompts, over the whole step; any other name: a value of the rows.
        """
        parameters = [*inspect.signature(self.function).parameters.values()][1:]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return tuple(p.name for p in parameters if p.default is p.empty and p.kind in named)


LOSSES: dict[str, Objective] = {
    "sft": Objective(sft, positions=(0,)),
    "slime": Objective(slime),
    "dpo": Objective(dpo),
    "ipo": Objective(ipo),
    "simpo": Objective(simpo),
    "cpo": Objective(cpo),
    "orpo": Objective(orpo),
    "kto": Objective(kto, judged=True),
    "rpo": Objective(rpo),
    "lpo": Objective(lpo),
    "chi_po": Objective(chi_po),
}


def find_objective(name: str) -> Objective:
    """The objective of that name in `LOSSES`, a preset of one (`slime/without-hard`), or a user's own by import path.

    Raises:
        InputError: no such name (with the nearest one) or nothing callable at that path.

    Example:
        >>> from slimepo.losses import find_objective
        >>> find_objective("slime/without-hard").preset
        {'hard_gate': 'one'}
    """
    if name in LOSSES:
        return LOSSES[name]
    if ":" in name:
        return Objective(find_function(name, "loss"))
    base, _, preset = name.partition("/")
    if base in LOSSES and preset in PRESETS.get(base, {}):
        return LOSSES[base]._replace(preset=PRESETS[base][preset])
    known = [*LOSSES, *(f"{base}/{preset}" for base, presets in PRESETS.items() for preset in presets)]
    raise InputError(
        f"unknown loss {name!r}{nearest(name, known)}; known: {', '.join(known)}, "
        "or your own function as package.module:function or file.py:function"
    )


def hyperparameters(function: LossFunction) -> dict[str, Any]:
    """Name and default of every hyperparameter: the signature's keyword-only parameters with a default.

    Example:
        >>> from slimepo.losses import hyperparameters, simpo
        >>> hyperparameters(simpo)
        {'beta': 2.0, 'gamma': 0.5, 'nll_weight': 0.0}
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def bind(name: str, options: Mapping[str, Any]) -> LossFunction:
    """The objective `name` with its hyperparameters set, checked on a made-up pair before any model is loaded.

    Raises:
        InputError: an unknown name, a value of the wrong type, or one that the objective refuses.

    Example:
        >>> import torch
        >>> from slimepo.losses import bind
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> loss = bind("simpo", {"beta": 1.0})
        >>> loss(pairs).loss  # softplus(-(2 - 0.5))
        tensor([0.2014])
    """
    objective = find_objective(name)
    function = objective.function
    known = hyperparameters(function)
    for key in options:
        if key not in known:
            raise InputError(
                f"loss {name!r} has no hyperparameter {key!r}{nearest(key, known)}; it has: {', '.join(known)}"
            )
    try:
        hints = get_type_hints(function)
    except NameError:
        # Annotations that only a type checker can resolve: values are then taken as they are.
        hints = {}
    values = {}
    for key, value in {**objective.preset, **options}.items():
        try:
            values[key] = TypeAdapter(hints.get(key, Any)).validate_python(value)
        except ValidationError as error:
            raise InputError(f"loss {name!r}: {key} = {value!r}: {error.errors()[0]['msg']}") from error
    bound = functools.partial(function, **values)
    _try_out(name, bound, objective.asks)
    return bound


def _try_out(name: str, bound: LossFunction, asks: Sequence[str]) -> None:
    """Call an objective on made-up pairs, of which one is padded. Raises InputError where training would fail."""
    pairs = _made_up_pairs()
    known = {
        "reference": _made_up_pairs(),
        "behaviour": _made_up_pairs(),
        "divergence": torch.zeros(()),
        "weight": torch.ones(2),
    }
    if not known.keys() >= set(asks):
        # Of what shape the values of a user's rows are, these rows alone can say.
        return
    try:
        with torch.enable_grad():
            output = bound(pairs, **{ask: known[ask] for ask in asks})
    except InputError as error:
        raise InputError(f"loss {name!r}: {error}") from error
    except Exception as error:
        # A user's function can fail in any way; better here than after the model is loaded.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"loss {name!r} fails on made-up pairs: {reason}") from error
    if not isinstance(output, LossOutput) or output.loss.shape != pairs.chosen.shape[:1]:
        raise InputError(f"loss {name!r} must return a slimepo.LossOutput whose loss has one value a pair")
    values = [output.loss, *output.token_loss.values()]
    if not all(torch.isfinite(value).all() for value in values):
        raise InputError(f"loss {name!r} is not finite on made-up pairs")
    if not any(value.requires_grad for value in values):
        raise InputError(f"loss {name!r} lets no gradient through to the log-probs of the policy")


def _made_up_pairs() -> PairLogps:
    mask = torch.tensor([[True, True], [True, False]])
    # 0 where there is no token, as in training.
    chosen, rejected = -1.0 * mask, -2.0 * mask
    return PairLogps(chosen.requires_grad_(), mask, rejected.requires_grad_(), mask)
