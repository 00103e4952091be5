"""What happens to a model and to its arguments before they train."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimepo.errors import InputError
from slimepo.model.adapters import keep_trained_in_float32, with_adapter
from slimepo.model.load import check_embeddings
from slimepo.model.logps import causal_lm, install_logps
from slimepo.training.config import PreferenceConfig


def prepared(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any,
    *,
    adapter: str | None = None,
    disable_dropout: bool,
) -> nn.Module:
    """The model as it trains: fitting the tokenizer, without dropout, with its adapter, giving log-probs.

    Raises:
        InputError: the tokenizer does not fit, the adapters cannot train like this, or nothing trains.
    """
    if tokenizer is not None:
        check_embeddings(causal_lm(model), tokenizer)
    if disable_dropout:
        _disable_dropout(causal_lm(model))
    model = with_adapter(model, peft_config, adapter)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "no parameter of the model trains: load an adapter with "
            "PeftModel.from_pretrained(model, folder, is_trainable=True), or give peft_config for a new one"
        )
    keep_trained_in_float32(model)
    install_logps(model)
    return model


def whole_steps(args: PreferenceConfig) -> PreferenceConfig:
    """Let one dataloader item be one optimizer step; the micro-batch size is kept beside it."""
    if args.micro_batch_size is not None:
        return args
    args = copy.copy(args)
    args.micro_batch_size = args.per_device_train_batch_size
    steps = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.per_device_train_batch_size = args.pairs_per_step or steps
    args.gradient_accumulation_steps = 1
    if args.n_gpu > 1:
        # torch.nn.DataParallel would split the list of micro-batches; ranks come from torchrun or accelerate.
        args._n_gpu = 1
    return args


def refuse_sharding(args: PreferenceConfig) -> None:
    """Refuse what would train something else than was asked for.

    Raises:
        InputError: parameters are to be sharded, or ranks were launched that know nothing of each other.
    """
    asked = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    if args.fsdp or args.deepspeed or asked:
        raise InputError(
            "FSDP and DeepSpeed are not supported yet: use torchrun or accelerate launch without them"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != launched:
        raise InputError(
            f"{launched} processes were launched but {args.world_size} take part in training; check the launcher"
        )


def _disable_dropout(model: PreTrainedModel) -> None:
    """Switch off all that is drawn at random in a forward pass: dropout by whatever name, a router's noise.

    An adapter's own dropout is a setting of its own.
    """
    # Some architectures read their configuration in the forward pass.
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        for name, value in config.to_dict().items():
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)
    for path, module in model.named_modules():
        if re.search(r"(^|\.)lora_dropout(\.|$)", path):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            # Phi-MoE calls a threshold of its router so, which holds in evaluation too.
            if isinstance(value, float) and re.search(r"drop|(?<!router_)jitter", name):
                setattr(module, name, 0.0)
