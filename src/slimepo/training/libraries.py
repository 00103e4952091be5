"""What the arguments ask of other packages, tried out before anything is loaded."""

from __future__ import annotations

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
