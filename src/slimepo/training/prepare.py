"""What happens to a model and to its arguments before they train."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from slimepo.checkpoints.identity import digest_of, row_digest, rows_digest, source_digest, weights_digest
from slimepo.data.chat import load_tokenizer
from slimepo.errors import InputError
from slimepo.losses import Objective, find_objective, hyperparameters
from slimepo.losses.composed import shares_of
from slimepo.model.adapters import OF_ADAPTERS, keep_trained_in_float32, with_adapter
from slimepo.model.load import check_embeddings, savable
from slimepo.model.logps import causal_lm, install_logps
from slimepo.parallel.unsupported import refuse_unsupported
from slimepo.training.config import PreferenceConfig, SLIMEConfig, settled
from slimepo.training.steps import StepSampler
from slimepo.types import REFERENCE_SOURCES


def prepared(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any,
    *,
    adapter: str | None = None,
    disable_dropout: bool,
    engine: str | None = "ddp",
) -> nn.Module:
    """The model as it trains: fitting the tokenizer, without dropout, with its adapter, giving log-probs.

    Raises:
        InputError: the tokenizer does not fit, the adapters cannot train like this, or nothing trains.
    """
    if tokenizer is not None:
        check_embeddings(causal_lm(model), tokenizer)
    if disable_dropout:
        for source, name in sources_of_noise(causal_lm(model), adapters=False):
            setattr(source, name, 0.0)
    if (generation := causal_lm(model).generation_config) is not None:
        # Or the first checkpoint would fail.
        savable(generation)
    model = with_adapter(model, peft_config, adapter)
    if getattr(causal_lm(model), "quantization_method", None) is not None:
        if not hasattr(model, "peft_config"):
            raise InputError(
                "the model's weights are quantised and do not train themselves: give an adapter (peft_config, in a "
                "recipe adapter), or start from the model that is not quantised"
            )
        if engine != "ddp":
            raise InputError(
                f"parallel = {engine!r} would cut quantised weights into parts, which is not supported: give ddp"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "no parameter of the model trains: load an adapter with "
            "PeftModel.from_pretrained(model, folder, is_trainable=True), or give peft_config for a new one"
        )
    keep_trained_in_float32(model)
    install_logps(model)
    return model


def refuse_no_step(rows: Sized, sampler: StepSampler) -> None:
    """Refuse to train where no step would be taken.

    Raises:
        InputError: the rows are fewer than those of one step, and short steps are left out.
    """
    if not len(sampler):
        raise InputError(
            f"there is no step to take: dataloader_drop_last leaves out a short step, and the {len(rows)} rows are "
            f"fewer than the {sampler.step_size} of one; lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )


def refuse_rows(model: nn.Module, tokens_of: Iterable[tuple[str, int, int]]) -> None:
    """Refuse rows, each by id, number of tokens and highest token, that the model has no room for.

    Raises:
        InputError: such a row, by its name.
    """
    config = causal_lm(model).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    embeddings = causal_lm(model).get_input_embeddings().weight.shape[0]
    for row, tokens, highest in tokens_of:
        if highest >= embeddings:
            raise InputError(f"row {row} has the token {highest} and the model {embeddings} embeddings")
        if tokens > positions:
            raise InputError(
                f"row {row} has {tokens} tokens and the model {positions} positions: give max_length = {positions}"
            )


def model_notes(model: nn.Module, balance: float) -> list[str]:
    """What the user should know of how this model trains here, in words.

    balance: what its balance loss is multiplied by.
    """
    config = causal_lm(model).config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None)
    if balance:
        return [f"the balance loss of the model's experts is added {balance:g} times, by micro-batch"]
    if getattr(config, "output_router_logits", False) and coefficient:
        return [
            f"the balance loss of the model's experts (router_aux_loss_coef {coefficient:g}) is left out: "
            "the objective alone trains the router"
        ]
    return []


def arguments(config: Any, model: Any, ref_model: Any, quantization_config: Any) -> PreferenceConfig:
    """What a trainer goes by: a copy of the config in our own names, a whole optimizer step to a dataloader item.

    Raises:
        InputError: a setting or an argument that is wrong, or that the model, loaded already, would not see.
    """
    if not isinstance(config, PreferenceConfig):
        raise InputError(
            f"args is a {type(config).__name__}: give a slimepo.PreferenceConfig, which takes the same names and "
            "whose `loss` says the objective"
        )
    if quantization_config is not None:
        loading = {**config.model_init_kwargs, "quantization_config": quantization_config}
        config = copy.copy(config)
        config.model_init_kwargs = loading
    args = settled(config)
    unread = args.model_init_kwargs.keys() - {"trust_remote_code", "revision"}
    if unread and not isinstance(model, str) and args.reference in REFERENCE_SOURCES:
        raise InputError(
            f"{min(unread)} is for loading a model, and the one that is given is loaded already: leave it out, or "
            "give the model's name"
        )
    if ref_model is not None:
        if not args.reads_reference:
            raise InputError(f"loss {args.loss!r} reads no reference model: leave ref_model out")
        if args.reference != "auto":
            raise InputError(
                f"ref_model and reference = {args.reference!r} are two references: leave one out"
            )
        if ref_model is model and not isinstance(model, str):
            raise InputError(
                "ref_model is the model that trains: leave it out to compare with the model as it is now"
            )
        if isinstance(ref_model, str):
            args.reference = ref_model
    refuse_unsupported(None, {}, {}, model)
    refuse_ranks(args)
    if args.micro_batch_size is None:
        args.micro_batch_size = args.per_device_train_batch_size
        steps = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.per_device_train_batch_size = args.pairs_per_step or steps
        args.gradient_accumulation_steps = 1
        if deepspeed := getattr(args, "hf_deepspeed_config", None):
            # It has read the number already, and would divide every micro-batch's loss by it.
            deepspeed.config["gradient_accumulation_steps"] = 1
    if args.n_gpu > 1:
        # torch.nn.DataParallel would split the list of micro-batches; ranks come from torchrun or accelerate.
        args._n_gpu = 1
    return args


def own_tokenizer(model: Any, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a model was saved with; None where a model object does not know of one."""
    loading = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
    if isinstance(model, str):
        return load_tokenizer(model, **loading)
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return load_tokenizer(name, **loading) if name else None
    except InputError:
        return None


# Settings of rollouts that change how long a run takes, and not what it learns.
_AS_FAST_AS_IT_MAY = {"timeout", "batch_rows", "vllm_gpu_memory_utilization"}


def run_identity(
    args: PreferenceConfig, objective: Objective, dataset: Any, model: nn.Module, functions: Iterable[Any]
) -> dict[str, Any]:
    """What must be the same for a run to end as the one would have that a checkpoint is of; plain data.

    functions: what else decides what is learnt, rewards say; of the user's own the source counts.
    """
    rows = getattr(dataset, "rows", None)
    if rows is None:
        prompts = getattr(dataset, "prompts", ())
        digests = [digest_of(repr((prompt.ids, prompt.row)).encode()).encode() for prompt in prompts]
    else:
        digests = [row_digest(row) for row in rows]
    # Adapters and what trains are in the checkpoint. A reference may be the model as it was before.
    weights = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if (args.reads_reference or not parameter.requires_grad)
        and not any(part in name for part in OF_ADAPTERS)
    ]
    parts = [find_objective(part).function for part in shares_of(args.loss)]
    sources = [source for each in (objective.function, *parts, *functions) if (source := source_digest(each))]
    options = {**hyperparameters(objective.function), **objective.preset, **args.loss_options}
    sampling = args.sampling
    return {
        "objective": f"{args.loss.rpartition('/')[2]} {options}",
        "source": sources,
        **rows_digest(digests),
        "seed": args.seed if args.data_seed is None else [args.seed, args.data_seed],
        "order": args.train_sampling_strategy,
        "sync_reference": args.sync_reference,
        "rollouts": sampling and sampling.model_dump(mode="json", exclude=_AS_FAST_AS_IT_MAY),
        "optimizer": [args.optim, args.optim_args, args.max_grad_norm, args.clip_inverse_lr],
        "rows_of_a_step": args.train_batch_size * args.world_size,
        "world_size": args.world_size,
        "model": weights_digest(weights),
    }


def settings_of(args: PreferenceConfig) -> dict[str, Any]:
    """Every setting of a config that a user can have changed later: numbers, words and our own dictionaries."""
    ours = _own_fields()
    values = {f.name: copy.copy(getattr(args, f.name)) for f in dataclasses.fields(args)}
    plain = bool | int | float | str | None
    return {name: value for name, value in values.items() if name in ours or isinstance(value, plain)}


def read_once(args: PreferenceConfig) -> dict[str, Any]:
    """The settings of a trainer's own arguments that are read when it is made, and never again."""
    ours = _own_fields() | {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "bf16",
        "fp16",
        "report_to",
    }
    return {name: value for name, value in settings_of(args).items() if name in ours}


def refuse_changes(args: PreferenceConfig, before: Mapping[str, Any]) -> None:
    """Refuse a setting that has been changed since the trainer was made, where the change would do nothing.

    Raises:
        InputError: with the setting's name and both values.
    """
    for name, value in before.items():
        if getattr(args, name) != value:
            raise InputError(
                f"{name} was {value!r} when the trainer was made and is {getattr(args, name)!r} now, which it does not "
                "see: set it before, or make a new trainer"
            )


def refuse_ranks(args: PreferenceConfig) -> None:
    """Refuse what would train something else than was asked for.

    Raises:
        InputError: one process is to share its work, or ranks were launched that know nothing of each other.
    """
    if args.world_size == 1 and args.parallel != "ddp":
        raise InputError(
            f"parallel = {args.parallel!r} is for several processes and this is one: start them with "
            "`slimepo run RECIPE --nproc N` or torchrun, or leave parallel out"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != launched:
        raise InputError(
            f"{launched} processes were launched but {args.world_size} take part in training; check the launcher"
        )


def _own_fields() -> set[str]:
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    return {f.name for f in dataclasses.fields(SLIMEConfig)} - theirs


def sources_of_noise(model: PreTrainedModel, adapters: bool = True) -> list[tuple[Any, str]]:
    """What a forward pass draws at random: dropout by whatever name, a router's noise; each by object and attribute.

    `adapters`: with an adapter's own dropout, which is a setting of its own.
    """
    found: list[tuple[Any, str]] = []
    # Some architectures read their configuration in the forward pass.
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        named = config.to_dict().items()
        found += [(config, name) for name, value in named if isinstance(value, float) and "drop" in name]
    for path, module in model.named_modules():
        if not adapters and re.search(r"(^|\.)lora_dropout(\.|$)", path):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found.append((module, "p"))
        for name, value in vars(module).items():
            # Phi-MoE calls a threshold of its router so, which holds in evaluation too.
            drawn = isinstance(value, float) and re.search(r"drop|(?<!router_)jitter", name)
            if drawn or name == "neftune_noise_alpha":
                found.append((module, name))
    return found
