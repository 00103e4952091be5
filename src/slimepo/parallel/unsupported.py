"""Kinds of parallelism that are not supported, refused by name where a library's settings ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimepo.errors import InputError

# By what accelerate's ParallelismConfig and transformers' DistributedConfig call their sizes.
_KINDS = {
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
    "pp_size": "pipeline parallelism",
    "ep_size": "expert parallelism",
    "dp_replicate_size": "sharding within replicas (HSDP)",
    "dp_shard_size": "sharding by a parallelism_config",
    "fsdp_size": "sharding as a model is loaded",
}
_PLANS = {
    "tp_plan": "tp_size",
    "ep_plan": "ep_size",
    "fsdp_plan": "fsdp_size",
    "enable_expert_parallel": "ep_size",
}
_INSTEAD = "slimepo shares out rows, and with `parallel` fsdp2, zero2 or zero3 weights too; leave it out"


def refuse_unsupported(
    parallelism: Any, loading: Mapping[str, Any], environment: Mapping[str, str], model: Any = None
) -> None:
    """Refuse what no run here would do.

    Args:
        parallelism: `parallelism_config` of the training arguments.
        loading: options that a model is loaded with.
        environment: of this process, where accelerate's launcher leaves its settings.
        model: one that is loaded already.

    Raises:
        InputError: such a kind of parallelism, and where it was asked for.
    """
    if environment.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        raise InputError(f"accelerate's configuration asks for Megatron-LM: {_INSTEAD}")
    given: dict[str, Any] = {}
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        prefix = "PARALLELISM_CONFIG_"
        sizes = {name: environment.get(f"{prefix}{name.upper()}") for name in _KINDS}
        given["accelerate's parallelism_config"] = {name: int(size) for name, size in sizes.items() if size}
    given["parallelism_config"] = parallelism
    given["model_init_kwargs"] = loading
    given["distributed_config in model_init_kwargs"] = loading.get("distributed_config")
    given["the model's distributed_config"] = getattr(
        getattr(model, "config", None), "distributed_config", None
    )
    for place, settings in given.items():
        asked = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
        for name, kind in _KINDS.items():
            plans = [plan for plan, size in _PLANS.items() if size == name and asked.get(plan)]
            if (asked.get(name) or 1) > 1 or plans:
                raise InputError(f"{place} asks for {kind} ({(plans or [name])[0]}): {_INSTEAD}")
