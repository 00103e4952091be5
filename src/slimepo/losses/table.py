"""The table of objectives, and what can be read off a signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from slimepo.errors import InputError
from slimepo.imports import find_function
from slimepo.losses.anchored import cal_dpo, dpo_shift, dpop, lpo, rpo
from slimepo.losses.composed import (
    Part,
    option_key,
    shares_of,
    sum_name,
    weighted_by_wpo,
    weighted_sum,
    with_wpo_weights,
)
from slimepo.losses.dpo import chi_po, discopop, dpo, exo_pair, hinge, ipo, robust
from slimepo.losses.informed import aot, aot_unpaired, reward_aware_rpo, xpo
from slimepo.losses.kto import kto
from slimepo.losses.pointwise import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from slimepo.losses.policy_gradient import grpo, nash_md, ppo, reinforce_pp, rloo
from slimepo.losses.presets import PRESETS
from slimepo.losses.sft import sft
from slimepo.losses.simpo import alpha_po, bopo, cpo, orpo, simper, simpo, slic, tpo
from slimepo.losses.slime import slime
from slimepo.types import LossOutput, PairLogps, SampleLogps
from slimepo.words import nearest

LossFunction = Callable[..., LossOutput]


class Objective(NamedTuple):
    """A loss function, what it reads, and option values that stand in front of its own defaults.

    `positions`: the responses of a row that it reads, 0 being the chosen one (what is not read is never computed);
    None: all of them, samples of the policy, which it is given as `SampleLogps`.
    `judged`: it learns from answers judged one by one, so that a row has one of the two and a pair counts as two rows.
    `anchor`: the option that weighs the likelihood of the chosen answer itself, where it has one.
    `asks_where`: a parameter with the default None, and the option that it is of use with where that is not 0.
    """

    function: LossFunction
    positions: tuple[int, ...] | None = (0, 1)
    judged: bool = False
    preset: Mapping[str, Any] = {}
    anchor: str | None = None
    asks_where: Mapping[str, str] = {}

    @property
    def asks(self) -> tuple[str, ...]:
        """What it is given beside the policy's log-probs: every further parameter without a default.

        `reference`: log-probs of a reference model; `behaviour`: log-probs when the response was sampled; `divergence`:
        the mean log-ratio to the reference of answers to other prompts, over the whole step; `gold`: log-probs of the
        last response that it reads; `collision`: the log of the sum of the policy's squared probabilities, at each
        token; any other name: a value of the rows.
        """
        parameters = [*inspect.signature(self.function).parameters.values()][1:]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        asked = [p.name for p in parameters if p.default is p.empty and p.kind in named]
        options = {**hyperparameters(self.function), **self.preset}
        return (*asked, *(name for name, switch in self.asks_where.items() if options[switch]))


LOSSES: dict[str, Objective] = {
    "sft": Objective(sft, positions=(0,)),
    "slime": Objective(slime, anchor="chosen_weight"),
    "dpo": Objective(dpo),
    "sigmoid_norm": Objective(dpo, preset={"length_normalized": True}),
    "robust": Objective(robust),
    "exo_pair": Objective(exo_pair),
    "hinge": Objective(hinge),
    "discopop": Objective(discopop),
    "ipo": Objective(ipo),
    "chi_po": Objective(chi_po),
    "nca_pair": Objective(nca_pair),
    "bco_pair": Objective(bco_pair),
    "sppo_hard": Objective(sppo_hard),
    "apo_zero": Objective(apo_zero),
    "apo_down": Objective(apo_down),
    "kto": Objective(kto, judged=True, asks_where={"divergence": "reference_point"}),
    "rpo": Objective(rpo, anchor="eta"),
    "dpop": Objective(dpop, anchor="penalty"),
    "cal_dpo": Objective(cal_dpo),
    "dpo_shift": Objective(dpo_shift),
    "lpo": Objective(lpo, anchor="hinge_weight"),
    "simpo": Objective(simpo, anchor="nll_weight"),
    "alpha_po": Objective(alpha_po, anchor="nll_weight"),
    "simper": Objective(simper),
    "cpo": Objective(cpo, anchor="nll_weight"),
    "slic": Objective(slic, anchor="nll_weight"),
    "orpo": Objective(orpo, anchor="nll_weight"),
    "tpo": Objective(tpo, positions=(0, 1, 2)),
    "bopo": Objective(bopo),
    "reward_aware_rpo": Objective(reward_aware_rpo),
    "aot": Objective(aot),
    "aot_unpaired": Objective(aot_unpaired),
    "xpo": Objective(xpo),
    "grpo": Objective(grpo, positions=None, asks_where={"reference": "kl"}),
    "rloo": Objective(rloo, positions=None),
    "reinforce_pp": Objective(reinforce_pp, positions=None, asks_where={"reference": "kl"}),
    "ppo": Objective(ppo, positions=None),
    "nash_md": Objective(nash_md, positions=None),
}


def find_objective(loss: str | Mapping[str, float], options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of that name in `LOSSES`, a preset of one (`slime/without-hard`), or a user's own by import path.

    A mapping, or a name such as `0.8*dpo+1*sft`, is a weighted sum of such; `wpo(dpo)` has WPO's weights on its pairs.
    `options` stand on top of the preset's, and those of a sum by its parts, `{dpo: {beta: 0.2}}`; what the objective
    asks for may depend on them.

    Raises:
        InputError: no such name (with the nearest one) or nothing callable at that path.

    Example:
        >>> from slimepo.losses import find_objective
        >>> find_objective("slime/without-hard").preset
        {'hard_gate': 'one'}
    """
    name = sum_name(loss)
    if shares := shares_of(name):
        return _sum(name, shares, options or {})
    if weighted := weighted_by_wpo(name):
        return _with_wpo_weights(weighted, options or {})
    if ":" in name:
        function = find_function(name, "loss")
        # What a function of one's own reads, the type of its first parameter says; pairs, where it has none.
        first = next(iter(inspect.signature(function).parameters), "")
        positions = None if _hints(function).get(first) is SampleLogps else (0, 1)
        own = Objective(function, positions, preset=dict(options or {}))
        return own._replace(positions=(0, 1, 2)) if "gold" in own.asks else own
    base, slash, preset = name.partition("/")
    if base in LOSSES and (not slash or preset in PRESETS.get(base, {})):
        values = PRESETS[base][preset] if slash else {}
        objective = LOSSES[base]
        return objective._replace(preset={**objective.preset, **values, **(options or {})})
    known = [*LOSSES, *(f"{base}/{preset}" for base, presets in PRESETS.items() for preset in presets)]
    raise InputError(
        f"unknown loss {name!r}{nearest(name, known)}; known: {', '.join(known)}, "
        "or your own function as package.module:function or file.py:function"
    )


def weighs_rows(loss: str) -> bool:
    """Whether an objective of ours asks for weights of rows; what a weight is to a user's own, the user knows."""
    return ":" not in loss and "weight" in find_objective(loss).asks


def _with_wpo_weights(name: str, options: Mapping[str, Any]) -> Objective:
    """The objective `name` with WPO's weights on its pairs."""
    if shares_of(name):
        raise InputError(f"loss 'wpo({name})': weigh the parts of a sum, as in 0.8*wpo(dpo)+1*sft")
    objective = find_objective(name, options)
    why_not = {
        objective.positions != (0, 1)
        or objective.judged: "does not compare a chosen answer with a rejected one",
        objective.function in (aot, aot_unpaired): "sorts answers, whose weights would go to others",
        "weight" in objective.asks: "takes the weight of a row itself",
    }
    if True in why_not:
        raise InputError(f"loss 'wpo({name})': {name} {why_not[True]}; leave wpo( ) out")
    return objective._replace(function=with_wpo_weights(objective.function))


def _sum(name: str, shares: Mapping[str, float], options: Mapping[str, Any]) -> Objective:
    """The objective that is a weighted sum: it reads and asks for what any of its parts does."""
    keys = {option_key(part): part for part in shares}
    if len(keys) < len(shares):
        raise InputError(
            f"loss {name!r}: two of its parts would share their options: sum objectives of their own"
        )
    for key, of_part in options.items():
        if key not in keys:
            parts = ", ".join(keys)
            raise InputError(
                f"loss {name!r} has no part {key!r}{nearest(key, keys)}; its options stand by part: {parts}"
            )
        if not isinstance(of_part, Mapping):
            raise InputError(
                f"loss {name!r}: {key} = {of_part!r}: give the options of {keys[key]}, {{option: value}}"
            )
    found = {key: find_objective(part, options.get(key)) for key, part in keys.items()}
    for key, objective in found.items():
        alone = {
            objective.positions is None: "reads samples of the policy",
            objective.judged: "reads answers judged one by one",
            "weight" in objective.asks: "takes the weight of a row itself",
        }
        if len(found) > 1 and True in alone:
            raise InputError(
                f"loss {name!r}: {keys[key]} {alone[True]}, and cannot be summed with other objectives"
            )
    total = weighted_sum(
        {
            key: Part(
                shares[part],
                bind(part, options.get(key, {})),
                found[key].asks,
                {**hyperparameters(found[key].function), **found[key].preset},
            )
            for key, part in keys.items()
        }
    )
    positions = {position for objective in found.values() for position in objective.positions or ()}
    only = next(iter(found.values()))
    return Objective(total, tuple(sorted(positions)) or None, only.judged, preset=dict(options))


def with_anchor_times(loss: str, options: Mapping[str, Any], factor: float) -> tuple[str, dict[str, Any]]:
    """A loss, by its name and its options, whose anchor on the chosen answer weighs `factor` times as much.

    In a sum, `sft` is the anchor.

    Raises:
        InputError: the objective has none, or its weight is 0.

    Example:
        >>> from slimepo.losses.table import with_anchor_times
        >>> with_anchor_times("slime", {"threshold": 2.0}, 4), with_anchor_times("1*dpo+0.5*sft", {}, 4)
        (('slime', {'threshold': 2.0, 'chosen_weight': 0.4}), ('1.0*dpo+2.0*sft', {}))
    """
    shares, objective = shares_of(loss), find_objective(loss, options)
    values = {**hyperparameters(objective.function), **objective.preset}
    key, weight = (
        ("sft", shares["sft"]) if "sft" in shares else (objective.anchor, values.get(objective.anchor or ""))
    )
    if weight is None:
        known = ", ".join(f"{name} ({each.anchor})" for name, each in LOSSES.items() if each.anchor)
        raise InputError(
            f"loss {loss!r} has no anchor on the chosen answer that could be raised; these have: {known}, and a sum "
            "with sft, as in 1*dpo+0.2*sft"
        )
    if weight == 0:
        raise InputError(
            f"loss {loss!r}: its anchor {key} is 0, and so is any multiple of it: give it a weight"
        )
    if key in shares:
        return sum_name({**shares, key: weight * factor}), dict(options)
    return loss, {**options, str(key): weight * factor}


def hyperparameters(function: LossFunction) -> dict[str, Any]:
    """Name and default of every hyperparameter: the signature's keyword-only parameters with a default.

    Example:
        >>> from slimepo.losses import hyperparameters, simpo
        >>> hyperparameters(simpo)
        {'beta': 2.0, 'gamma': 0.5, 'label_smoothing': 0.0, 'nll_weight': 0.0}
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def bind(loss: str | Mapping[str, float], options: Mapping[str, Any]) -> LossFunction:
    """The objective of that name with its hyperparameters set, checked on made-up rows before any model is loaded.

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
    name, objective = sum_name(loss), find_objective(loss, options)
    function = objective.function
    if shares_of(name):
        # Its parts have their options already.
        return function
    known = hyperparameters(function)
    for key in options:
        if key not in known:
            raise InputError(
                f"loss {name!r} has no hyperparameter {key!r}{nearest(key, known)}; it has: {', '.join(known)}"
            )
    hints = _hints(function)
    values = {}
    for key, value in objective.preset.items():
        try:
            values[key] = TypeAdapter(hints.get(key, Any)).validate_python(value)
        except ValidationError as error:
            raise InputError(f"loss {name!r}: {key} = {value!r}: {error.errors()[0]['msg']}") from error
    bound = functools.partial(function, **values)
    _try_out(name, bound, objective)
    return bound


def _hints(function: LossFunction) -> dict[str, Any]:
    """The types of the parameters; nothing where only a type checker can resolve them."""
    try:
        return get_type_hints(function)
    except NameError:
        return {}


def _try_out(name: str, bound: LossFunction, objective: Objective) -> None:
    """Call an objective on made-up rows, of which one is padded. Raises InputError where training would fail."""
    made_up = _made_up_pairs if objective.positions else _made_up_samples
    rows = made_up()
    known = {
        "reference": made_up(),
        "behaviour": made_up(),
        "divergence": torch.zeros(()),
        "weight": torch.ones(2),
        "collision": made_up(),
    }
    if objective.positions is None:
        known["advantages"] = torch.ones(2)
    else:
        known["opponent"] = known["rewards"] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        known["gold"] = _made_up_samples()
    if not known.keys() >= set(objective.asks):
        # Of what shape the values of a user's rows are, these rows alone can say.
        return
    try:
        with torch.enable_grad():
            output = bound(rows, **{ask: known[ask] for ask in objective.asks})
    except InputError as error:
        raise InputError(f"loss {name!r}: {error}") from error
    except Exception as error:
        # A user's function can fail in any way; better here than after the model is loaded.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"loss {name!r} fails on made-up rows: {reason}") from error
    if not isinstance(output, LossOutput) or output.loss.shape != (2,):
        what = "pair" if objective.positions else "response"
        raise InputError(f"loss {name!r} must return a slimepo.LossOutput whose loss has one value a {what}")
    values = [output.loss, *output.token_loss.values()]
    if not all(torch.isfinite(value).all() for value in values):
        raise InputError(f"loss {name!r} is not finite on made-up rows")
    if not any(value.requires_grad for value in values):
        raise InputError(f"loss {name!r} lets no gradient through to the log-probs of the policy")


def _made_up_pairs() -> PairLogps:
    mask = torch.tensor([[True, True], [True, False]])
    # 0 where there is no token, as in training.
    chosen, rejected = -1.0 * mask, -2.0 * mask
    return PairLogps(chosen.requires_grad_(), mask, rejected.requires_grad_(), mask)


def _made_up_samples() -> SampleLogps:
    mask = torch.tensor([[True, True], [True, False]])
    return SampleLogps((-1.0 * mask).requires_grad_(), mask)
