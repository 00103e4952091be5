"""TRL's names for what is called otherwise here: the fields of its configs and the arguments of its trainers.

`TRL_NAMES` and `TRL_ARGUMENTS` are the whole of it: what a name stands for, or what to do instead. Nothing else in the
package knows these names. The fields are those of TRL 1.16's configs for DPO, KTO, CPO, ORPO, TPO and SFT, and of older
versions whose scripts are still about.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from slimepo.errors import InputError
from slimepo.losses import find_objective, hyperparameters
from slimepo.losses.composed import option_key, shares_of, sum_name
from slimepo.words import nearest


class Name(NamedTuple):
    """What a field of TRL's configs stands for.

    `kind` is its type on a command line; `ours` the setting that takes its value, a dot leading into a dictionary;
    `values` the settings of values that have some, none where a value asks for what is done anyway; `instead` the way
    out for any other value.
    """

    kind: Any
    ours: str = ""
    values: Mapping[Any, Mapping[str, Any]] = {}
    instead: str = ""


_OWN = "no objective here has it: write yours (loss = 'file.py:function', see docs/objectives.md)"
_LENGTHS = "give max_length, which holds prompt and response together, and max_prompt_length"
_IN_TILES = "the head is always computed in tiles, without a tensor of all logits: leave it out"
_TOKENIZER = "set it on the tokenizer and give that as processing_class"
_ONE_ANSWER = "a row trains its last answer and nothing before it; make a row of each answer that is to train"
_NO_SEQ2SEQ = "encoder-decoder models are not supported"
_MADE_ONCE = "rows are tokenised once, in this process: leave it out"
_BATCHES = (
    "layout, max_tokens_per_batch and per_device_eval_batch_size decide how rows are batched: leave it out"
)
_ADAPTERS = "adapters are switched off for the reference (reference = 'adapters-off'): leave it out"

TRL_NAMES: Mapping[str, Name] = {
    # The objective.
    "loss_type": Name(list[str], instead="give loss"),
    "loss_weights": Name(list[float], instead="it is for those in loss_type"),
    "beta": Name(float, "loss_options.beta"),
    "label_smoothing": Name(float, "loss_options.label_smoothing", {0.0: {}}),
    "desirable_weight": Name(float, "loss_options.desirable_weight"),
    "undesirable_weight": Name(float, "loss_options.undesirable_weight"),
    "cpo_alpha": Name(float, "loss_options.nll_weight"),
    "simpo_gamma": Name(float, "loss_options.gamma"),
    "rpo_alpha": Name(float, instead="give loss = 'rpo' and loss_options = {'eta': ...}"),
    "tpo_alpha": Name(float, "loss_options.nll_weight"),
    "tpo_l_gamma": Name(float, "loss_options.gamma"),
    "alpha": Name(float, "loss_options.alpha", {0.0: {}}),
    "ld_alpha": Name(float, "loss_options.ld_alpha", {1.0: {}}),
    "f_divergence_type": Name(str, "loss_options.f_divergence", {"reverse_kl": {}}),
    "f_alpha_divergence_coef": Name(float, "loss_options.f_alpha"),
    "use_weighting": Name(
        bool, values={False: {}, True: {"loss": "wpo(...)"}}, instead="give loss = 'wpo(dpo)', say"
    ),
    "discopop_tau": Name(float, "loss_options.temperature", {0.05: {}}),
    "reference_free": Name(bool, values={False: {}}, instead="simpo, cpo, orpo and slime read no reference"),
    # The reference.
    "precompute_ref_log_probs": Name(bool, values={False: {}, True: {"reference": "cache"}}),
    "precompute_ref_batch_size": Name(int, instead=_BATCHES),
    "sync_ref_model": Name(
        bool, values={False: {}, True: {"sync_reference": {}}}, instead="give sync_reference, {every: 512, share: 0.6}"
    ),
    "ref_model_mixup_alpha": Name(float, "sync_reference.share"),
    "ref_model_sync_steps": Name(int, "sync_reference.every"),
    "ref_model_init_kwargs": Name(str, instead="model_init_kwargs holds for the reference as well"),
    "model_adapter_name": Name(str, instead=_ADAPTERS),
    "ref_adapter_name": Name(str, instead=_ADAPTERS),
    "force_use_ref_model": Name(bool, values={False: {}}, instead="give reference = 'copy', or a ref_model"),
    # The model.
    "trust_remote_code": Name(bool, "model_init_kwargs.trust_remote_code", {False: {}}),
    "use_liger_loss": Name(bool, values={False: {}}, instead=_IN_TILES),
    "use_logits_to_keep": Name(bool, values={False: {}}, instead=_IN_TILES),
    "is_encoder_decoder": Name(bool, values={False: {}}, instead=_NO_SEQ2SEQ),
    # The rows.
    "truncation_mode": Name(
        str,
        values={"keep_start": {"cut_long_responses": True}},
        instead="a response is cut at its end (cut_long_responses = True) or its row dropped, which is the default",
    ),
    "max_completion_length": Name(int, instead=_LENGTHS),
    "max_target_length": Name(int, instead=_LENGTHS),
    "max_seq_length": Name(int, "max_length"),
    "dataset_num_proc": Name(int, values={1: {}}, instead=_MADE_ONCE),
    "dataset_kwargs": Name(str, instead=_MADE_ONCE),
    "dataset_batch_size": Name(int, instead=_MADE_ONCE),
    "dataset_text_field": Name(
        str, values={"text": {}}, instead="rows have `messages`, or `prompt` and `completion`; rename the column"
    ),
    "completion_only_loss": Name(bool, values={True: {}}, instead="a row trains its answer, never its prompt"),
    "assistant_only_loss": Name(bool, values={False: {}}, instead=_ONE_ANSWER),
    "shuffle_dataset": Name(bool, values={False: {}}, instead="train_sampling_strategy says how rows are ordered"),
    "chat_template_path": Name(str, instead=_TOKENIZER),
    "eos_token": Name(str, instead=_TOKENIZER),
    "pad_token": Name(str, instead=_TOKENIZER),
    "padding_value": Name(int, instead=_TOKENIZER),
    "label_pad_token_id": Name(int, values={-100: {}}, instead="masks come from lengths: leave it out"),
    # Batches.
    "padding_free": Name(bool, values={False: {}, True: {"layout": "packed"}}),
    "packing": Name(bool, values={False: {}, True: {"layout": "packed"}}),
    "packing_strategy": Name(str, values={"bfd": {}}, instead=_BATCHES),
    "eval_packing": Name(bool, instead=_BATCHES),
    "pad_to_multiple_of": Name(int, instead=_BATCHES),
    "generate_during_eval": Name(
        bool, values={False: {}}, instead="a recipe's tasks are answered before and after a stage"
    ),
}  # fmt: skip

# The objective that a variant of one of TRL's losses is, with its options, by the loss it is a variant of.
LOSS_TYPES: Mapping[str, Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "dpo": {
        "sigmoid": ("dpo", {}),
        **{
            name: (name, {})
            for name in (
                "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
                "aot_unpaired", "apo_zero", "apo_down", "discopop",
            )
        },
        "sft": ("sft", {"average": "token"}),
    },
    "kto": {"kto": ("kto", {}), "apo_zero_unpaired": ("kto", {"reference_point": False})},
    "cpo": {"sigmoid": ("cpo", {}), "simpo": ("simpo", {}), "hinge": ("slic", {}), "alphapo": ("alpha_po", {})},
    "tpo": {"sigmoid": ("tpo", {}), "tpo-l": ("tpo/l", {})},
    "sft": {"nll": ("sft", {"average": "token"}), "chunked_nll": ("sft", {"average": "token"})},
}  # fmt: skip

# Arguments of TRL's trainers that are none of ours.
TRL_ARGUMENTS: Mapping[str, str] = {
    "compute_metrics": "it would be given logits, which are never all there; slimepo.score_pairs gives log-probs of "
    "pairs, and a callback's on_evaluate sees every evaluation",
    "preprocess_logits_for_metrics": "logits are never all there",
    "data_collator": "rows are batched by layout, micro_batch_size and max_tokens_per_batch; rows of your own ids are "
    "given as slimepo.data.rows.Row",
    "formatting_func": "map the dataset with it beforehand, to `prompt` and `completion` or `messages`",
    "model_init": "give the model",
    "compute_loss_func": "give loss = 'package.module:function', your own objective, in the config",
    "optimizer_cls_and_kwargs": "give optimizers",
    "model_init_kwargs": "give it in the config",
    "disable_dropout": "give it in the config",
    "max_length": "give it in the config",
    "max_prompt_length": "give it in the config",
    "max_target_length": _LENGTHS,
}

# One field for each name, which is None where it is not given.
TrlFields: Any = dataclasses.make_dataclass(
    "TrlFields",
    [
        (
            name,
            # Without None a flag needs no value on a command line.
            meant.kind if meant.kind is bool else meant.kind | None,
            dataclasses.field(
                default=None, metadata={"help": f"TRL's name; {meant.ours or 'see docs/trl.md'}"}
            ),
        )
        for name, meant in TRL_NAMES.items()
    ],
)


def in_own_names(args: Any) -> Any:
    """A copy of a config in which our own settings say what TRL's names were given for.

    Raises:
        InputError: a name or a value that has no counterpart here, with what to do instead; one that contradicts
            another setting.
    """
    given = {name: value for name in TRL_NAMES if (value := getattr(args, name)) is not None}
    args = copy.copy(args)
    args.loss = sum_name(args.loss)
    args.loss_options, args.model_init_kwargs = (
        copy.deepcopy(dict(args.loss_options)),
        dict(args.model_init_kwargs),
    )
    if args.sync_reference is not None or given.get("sync_ref_model"):
        args.sync_reference = dict(args.sync_reference or {})
    if (variants := given.pop("loss_type", None)) is not None:
        args.loss, options = _variant(args.loss, variants, given.pop("loss_weights", None))
        args.loss_options = {**options, **args.loss_options}
    if given.get("use_weighting") is True:
        del given["use_weighting"]
        shares = shares_of(args.loss)
        args.loss = sum_name({f"wpo({part})": share for part, share in shares.items()} or f"wpo({args.loss})")
    if args.loss == "simpo" and given.get("alpha"):
        args.loss = "alpha_po"
    for name, value in given.items():
        meant = TRL_NAMES[name]
        group, _, option = meant.ours.rpartition(".")
        places = (
            _places(args.loss, name, option)
            if group == "loss_options"
            else [meant.ours]
            if meant.ours
            else []
        )
        if _among(value, meant.values) and not (group == "loss_options" and places):
            wanted = dict(meant.values[value])
        elif meant.ours:
            # Where no option has that name, the objective says so.
            wanted = dict.fromkeys(places or [meant.ours], value)
        else:
            raise InputError(f"{name} = {value!r} is a setting of TRL's: {meant.instead}")
        for setting, to in wanted.items():
            _set(args, setting, to, f"{name} = {value!r}")
    return args


def _places(loss: str, name: str, option: str) -> list[str]:
    """The options of a loss, or of the parts of a sum, that a hyperparameter of TRL's goes to."""
    options = hyperparameters(find_objective(loss).function)
    of_part = options if shares_of(loss) else {"": options}
    found = []
    for part, known in of_part.items():
        # TRL's beta is what IPO's paper calls tau.
        own = "tau" if name == "beta" and "tau" in known else option
        found += [f"loss_options.{part}.{own}".replace("..", ".")] if own in known else []
    return found


def in_own_arguments(
    named: Mapping[str, Any], positional: Sequence[Any], others: Mapping[str, Any]
) -> dict[str, Any]:
    """The trainer's arguments by name, from those that a call in TRL's manner or in ours has.

    Args:
        named: our own, as given by name, None where they were not.
        positional: what stands behind the model: `args` and so on in the order of `named`; in that of TRL's trainers
            with a `ref_model`; or in that of transformers' and TRL's others, with a `data_collator` behind `args`.
        others: given by name and none of our own.

    Raises:
        InputError: an argument that has no counterpart here, or stands there twice.
    """
    order = [*named]
    first, second, third = (*positional, None, None, None)[:3]
    if positional and (
        isinstance(first, nn.Module | str)
        or (first is None and (named["args"] is not None or hasattr(second, "output_dir")))
    ):
        # A reference model, or None in its place.
        order = [
            "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
            "compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config",
        ]  # fmt: skip
    elif callable(second) or (second is None and third is not None):
        # A collator, or None in its place. What stands behind the tokenizer differs from trainer to trainer.
        order = ["args", "data_collator", "train_dataset", "eval_dataset", "processing_class"]
    if len(positional) > len(order):
        raise InputError(f"{len(positional) + 1} arguments without a name: give them by name")
    by_place = dict(zip(order, positional, strict=False))
    found = {name: value for name, value in named.items() if value is not None}
    for name, value in [*by_place.items(), *others.items()]:
        name = "processing_class" if name == "tokenizer" else name
        if value is None or (name in found and found[name] is value):
            continue
        if name in found:
            raise InputError(f"the trainer is given {name} twice (TRL's `tokenizer` is `processing_class`)")
        if name in TRL_ARGUMENTS:
            raise InputError(f"the trainer takes no {name}: {TRL_ARGUMENTS[name]}")
        if name in TRL_NAMES:
            raise InputError(f"the trainer takes no {name}: give it in the config, {name}={value!r}")
        if name not in (*named, "ref_model", "quantization_config"):
            raise InputError(
                f"the trainer takes no {name!r}{nearest(name, [*named])}; it takes: {', '.join(named)}"
            )
        found[name] = value
    return found


def _variant(
    loss: str, variants: Sequence[str] | str, weights: Sequence[float] | None
) -> tuple[str, Mapping[str, Any]]:
    """The objective that `loss_type` says, and its options; a sum where it says several, or weighs one."""
    names = [variants] if isinstance(variants, str) else [*variants]
    shares = [1.0] * len(names) if weights is None else [*weights]
    if len(names) != len(shares) or len({*names}) != len(names):
        raise InputError(
            f"loss_type = {names} with loss_weights = {shares}: give each variant once, and a weight each"
        )
    found = [_of_family(loss, name) for name in names]
    if shares == [1.0]:
        return found[0]
    options = {option_key(name): dict(own) for name, own in found if own}
    return sum_name({name: share for (name, _), share in zip(found, shares, strict=True)}), options


def _of_family(loss: str, name: str) -> tuple[str, Mapping[str, Any]]:
    """The objective that a variant of one of TRL's losses is, and its options."""
    families = {
        base: kinds for base, kinds in LOSS_TYPES.items() if loss in (base, kinds.get(name, ("", {}))[0])
    }
    if not families:
        raise InputError(
            f"loss_type = {name!r} is a variant of one of TRL's losses: give that, loss = "
            f"{' or '.join(repr(base) for base in LOSS_TYPES)}"
        )
    for kinds in families.values():
        if name in kinds:
            return kinds[name]
    known = ", ".join(kind for kinds in families.values() for kind in kinds)
    raise InputError(f"loss_type = {name!r} of loss {loss!r} ({known} are here): {_OWN}")


def _among(value: Any, values: Mapping[Any, Any]) -> bool:
    return isinstance(value, bool | int | float | str) and value in values


def _set(args: Any, setting: str, value: Any, because: str) -> None:
    """Give a setting its value, unless it has been given another one."""
    *groups, key = setting.split(".")
    group, holder = ".".join(groups), vars(args)
    for inner in groups:
        holder = holder.setdefault(inner, {})
        if holder is None:
            raise InputError(f"{because} goes with {inner}, which is not asked for: leave it out")
    default = None if group else args.__dataclass_fields__[key].default
    now = holder.get(key)
    if now not in (None, default, value):
        raise InputError(
            f"{because} stands for {setting} = {value!r}, and that is {now!r}: leave one of them out"
        )
    holder[key] = copy.copy(value)
