"""What the arguments ask of other packages, tried out before anything is loaded; what of transformers' is of no use."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_scheduler
from transformers.integrations import integration_utils as trackers
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from slimepo.errors import InputError
from slimepo.training.optimizers.clipped_sstm import optimizer_class
from slimepo.words import first_line, nearest

# Whose check of transformers' is not called `is_NAME_available`.
_OTHERWISE_CALLED = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}

_TILES = "the head is computed in tiles by slimepo.linear_logps"
_NO_METRICS = "there is no compute_metrics"
_SUMS = "an evaluation adds up sums and keeps no predictions"
_ONE_PRECISION = (
    "figures before, while and after training are all in the precision that the weights are held in"
)
# Arguments of transformers' that would change nothing here, and why; refused where they are not as they come.
_WITHOUT_EFFECT = {
    "label_smoothing_factor": "the objective computes the loss; dpo has loss_options.label_smoothing",
    "use_liger_kernel": _TILES,
    "liger_kernel_config": _TILES,
    "include_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "label_names": "rows have answers, not labels",
    "eval_accumulation_steps": _SUMS,
    "eval_do_concat_batches": _SUMS,
    "eval_use_gather_object": _SUMS,
    "prediction_loss_only": _SUMS,
    "bf16_full_eval": _ONE_PRECISION,
    "fp16_full_eval": _ONE_PRECISION,
    "length_column_name": "lengths are those of the rows' tokens",
    "dataloader_in_order": "the rows of a step go by the seed, and never by which worker is done first",
}
# Settings of accelerate's for loaders that it makes itself.
_LOADERS = {
    "split_batches": False,
    "dispatch_batches": False,
    "even_batches": True,
    "use_seedable_sampler": True,
}
_COLD = ("constant", "reduce_lr_on_plateau", "greedy")


def refuse_idle(args: Any) -> None:
    """Refuse settings of transformers' that nothing would come of, alone or with the others.

    Raises:
        InputError: its name, and why.
    """
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    steps = "steps" in (args.logging_strategy, args.eval_strategy)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    alone = {
        "eval_steps": args.eval_strategy != "steps" and "it goes with eval_strategy = 'steps'",
        "eval_delay": args.eval_strategy == "no" and "it goes with an eval_strategy",
        "logging_steps": not steps and "it goes with logging_strategy = 'steps'",
        "warmup_steps": schedule in _COLD
        and f"lr_scheduler_type = {schedule!r} has no warm-up; constant_with_warmup has",
        "activation_checkpointing_kwargs": not args.activation_checkpointing
        and "it goes with activation_checkpointing",
        # Of one device, older versions of transformers turn it off themselves.
        "average_tokens_across_devices": ranks > 1 and "a step is divided by what all devices have",
    }
    for name, why in {**_WITHOUT_EFFECT, **alone}.items():
        field = args.__dataclass_fields__.get(name)
        value = getattr(args, name, None)
        # Some came after transformers 5.0.
        if not why or field is None or value is None:
            continue
        factory = field.default_factory
        if value != (field.default if factory is dataclasses.MISSING else factory()):
            raise InputError(f"{name} = {value!r} would change nothing: {why}")
    for name, usual in _LOADERS.items():
        if (value := getattr(args.accelerator_config, name, None)) not in (None, usual):
            raise InputError(
                f"accelerator_config: {name} = {value} would change nothing: each device loads its share of every step"
            )


def check_libraries(args: Any) -> None:
    """Refuse what a trainer could not be made or started with: trackers, optimizer, schedule, loaders.

    Raises:
        InputError: a package that is not installed, an unknown name, an argument that the optimizer or the schedule
            does not take.
    """
    for name in args.report_to:
        if name not in trackers.INTEGRATION_TO_CALLBACK:
            known = [*trackers.INTEGRATION_TO_CALLBACK, "all", "none"]
            raise InputError(
                f"report_to: unknown tracker {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )
        check = getattr(trackers, f"is_{_OTHERWISE_CALLED.get(name, name)}_available", None)
        if check is not None and not check():
            raise InputError(f"report_to: {name} is not installed; install it, or give report_to: none")
    try:
        _make_optimizer(args)
    except (ImportError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"optim = {str(getattr(args.optim, 'value', args.optim))!r}: {first_line(error)}"
        ) from error
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"lr_scheduler_type = {args.lr_scheduler_type.value!r}: {first_line(error)}"
        ) from error
    try:
        DataLoader(
            TensorDataset(torch.zeros(1)), num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor, persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(
            f"dataloader_num_workers = {args.dataloader_num_workers}: {first_line(error)}"
        ) from error
    loading = args.model_init_kwargs
    if loading.get("attn_implementation") == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError(
            "model_init_kwargs: attn_implementation = 'flash_attention_2' needs the package flash-attn"
        )
    quantized = getattr(loading.get("quantization_config"), "quant_method", "") == "bitsandbytes"
    if (
        quantized or loading.get("load_in_4bit") or loading.get("load_in_8bit")
    ) and not is_bitsandbytes_available():
        raise InputError(
            "model_init_kwargs: quantization_config needs bitsandbytes: pip install 'slimepo[qlora]'"
        )


def _make_optimizer(args: Any) -> None:
    """Make the optimizer of one number; those that look for modules in a model cannot be tried out without it."""
    looks_for_modules = args.optim_target_modules is not None
    kind, options = optimizer_class(args, torch.nn.Linear(1, 1) if looks_for_modules else None)
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not looks_for_modules:
        kind(
            [torch.zeros(1, requires_grad=True)],
            **{k: v for k, v in options.items() if k != "optimizer_dict"},
        )
