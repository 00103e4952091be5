"""How much memory a recipe will need, worked out from the model's configuration before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from slimepo.errors import InputError
from slimepo.model.load import load_config, random_config, smoke_config
from slimepo.pipeline.data import recipe_tokenizer
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import RandomModel
from slimepo.pipeline.start import base_dtype
from slimepo.plan.ranks import on_a_rank, sizes_of
from slimepo.plan.step import PlannedStep, largest_batch, largest_budget, make_step, step_memory

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "head")

# GiB that a program finds on a GPU of that name.
GPUS = {
    "l4": 22.0, "a10": 22.1, "rtx-3090": 23.6, "rtx-4090": 23.6, "rtx-5090": 31.4, "a6000": 47.4,
    "l40s": 44.4, "a100-40": 39.4, "a100-80": 79.2, "h100": 79.2, "h200": 139.8,
}  # fmt: skip

# Not tensors: the driver's context and the libraries' workspaces on a GPU, Python and its libraries on a CPU.
OVERHEAD = {"gpu": 1.0 * GIB, "cpu": 0.7 * GIB}
# The share of the rest that the allocator can fill before gaps between the tensors are in the way: on a CPU as
# measured with glibc (docs/performance.md), on a GPU a guess.
FILLED = {"gpu": 0.95, "cpu": 0.85}


@dataclass(frozen=True)
class Device:
    """Where a recipe is to run: `size` bytes of memory."""

    name: str
    gpu: bool
    size: int

    @property
    def usable(self) -> int:
        """Bytes that tensors can take."""
        kind = "gpu" if self.gpu else "cpu"
        return max(0, int((self.size - OVERHEAD[kind]) * FILLED[kind]))


@dataclass(frozen=True)
class StagePlan:
    """What a stage holds on each device at its peak, in bytes, for the largest micro-batch that its recipe allows.

    `tokens` counts padding; every response is as long as `max_length`, or `max_new_tokens`, allows. `largest_budget` is
    the largest `max_tokens_per_batch` that fits the device, 0 where not even one such row does.
    """

    name: str
    layout: str
    parameters: int
    trained_parameters: int
    pairs: int
    tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    largest_budget: int
    # A look at the whole model where training keeps parts of it: another moment, which may be the peak.
    whole: int = 0

    @property
    def total(self) -> int:
        training: int = sum(getattr(self, part) for part in PARTS)
        return max(training, self.whole)


def find_device(gpu: str | None) -> Device:
    """The device of that name or of so many GiB; without one, this machine's.

    Raises:
        InputError: neither a number nor a known name.
    """
    if gpu is None:
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            return Device(properties.name, True, properties.total_memory)
        return Device("this machine's CPU", False, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if gpu.lower() in GPUS:
        return Device(gpu, True, int(GPUS[gpu.lower()] * GIB))
    try:
        size = float(gpu)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise InputError(f"--gpu {gpu!r}: give its memory in GiB, or one of {', '.join(GPUS)}")
    return Device(f"a GPU of {size:g} GiB", True, int(size * GIB))


def plan_recipe(recipe: Recipe, device: Device, ranks: int = 1) -> list[StagePlan]:
    """A plan of every stage, for one of `ranks` devices. Reads the model's configuration and, for a random model, the
    tokenizer; no weights.

    Raises:
        InputError: a wrong recipe, or a model or optimizer that cannot be planned.
    """
    if ranks == 1 and recipe.parallel not in (None, "ddp"):
        raise InputError(f"parallel: {recipe.parallel} is for several devices: give --nproc N")
    config = _config(recipe)
    plans = []
    for number, stage in enumerate(recipe.stages):
        loaded = number > 0 or not (recipe.smoke or isinstance(recipe.model, RandomModel))
        dtype = _loaded_dtype(recipe, device) if loaded else torch.float32
        step = make_step(recipe, stage, config, dtype, gpu=device.gpu, ranks=ranks)
        plans.append(plan_stage(step, stage.name, device, recipe.parallel or "ddp", ranks))
        # The next stage starts from what this one exports: a head that was untied stays so.
        config = step.config
    return plans


def plan_stage(
    step: PlannedStep, name: str, device: Device, engine: str = "ddp", ranks: int = 1
) -> StagePlan:
    """The plan for a micro-batch as large as the recipe allows."""
    batch = largest_batch(step)
    alone = step_memory(step, batch, accumulates=batch["rows"] < step.pairs)
    memory, whole = on_a_rank(alone, sizes_of(step.whole.model), engine, ranks)
    # What is not in parts hangs on the micro-batch alone; so much more or less of the device is left for it.
    saved = sum(alone.values()) - sum(memory.values())
    return StagePlan(
        name=name,
        layout=step.collator.layout,
        parameters=sum(p.numel() for p in step.whole.model.parameters()),
        trained_parameters=step.trained_parameters,
        pairs=batch["rows"],
        tokens=batch["input_ids"].numel(),
        **memory,
        largest_budget=largest_budget(step, device.usable + saved),
        whole=whole,
    )


def _loaded_dtype(recipe: Recipe, device: Device) -> torch.dtype:
    if device.gpu and recipe.dtype == "auto":
        return torch.float32 if recipe.adapter is None else torch.bfloat16
    return base_dtype(recipe)


def _config(recipe: Recipe) -> PreTrainedConfig:
    if isinstance(recipe.model, RandomModel):
        config = random_config(recipe.model.architecture, recipe.model.sizes, recipe_tokenizer(recipe))
    else:
        config = load_config(recipe.model)
    return smoke_config(config) if recipe.smoke else config


def print_plan(plans: Sequence[StagePlan], device: Device, console: Console) -> None:
    """The plans as a table, a column a stage."""
    from rich.table import Table

    largest = max(plan.total for plan in plans)
    unit, name = (GIB, "GiB") if largest >= GIB else (2**20, "MiB")
    table = Table(title=f"memory at the peak of training, {name}", title_justify="left")
    table.add_column()
    for plan in plans:
        table.add_column(plan.name, justify="right", no_wrap=True)
    rows = {
        "layout": [plan.layout for plan in plans],
        "parameters": [f"{plan.parameters:,}" for plan in plans],
        "trained": [f"{plan.trained_parameters:,}" for plan in plans],
        "largest micro-batch, pairs": [f"{plan.pairs:,}" for plan in plans],
        "largest micro-batch, tokens": [f"{plan.tokens:,}" for plan in plans],
        **{part: [f"{getattr(plan, part) / unit:.2f}" for plan in plans] for part in PARTS},
        **(
            {"whole, while looked at": [f"{plan.whole / unit:.2f}" for plan in plans]}
            if any(plan.whole for plan in plans)
            else {}
        ),
        "at the peak": [f"{plan.total / unit:.2f}" for plan in plans],
        "largest max_tokens_per_batch": [f"{plan.largest_budget:,}" for plan in plans],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)
    console.print(
        f"{device.name}: {device.size / GIB:.1f} GiB, of which {device.usable / GIB:.1f} for tensors",
    )
    for plan in plans:
        for line in verdict(plan, device):
            console.print(line)


def verdict(plan: StagePlan, device: Device) -> list[str]:
    """What to do about a stage that does not fit; nothing where it fits."""
    if plan.total <= device.usable:
        return []
    if plan.largest_budget:
        return [f"{plan.name}: does not fit; args: {{max_tokens_per_batch: {plan.largest_budget}}} would"]
    return [
        f"{plan.name}: does not fit, nor would one pair of the longest; a smaller data.max_length, an adapter "
        "(less with train_head: false) or activation_checkpointing: layers takes less"
    ]


def plan_rows(plans: Sequence[StagePlan], device: Device) -> dict[str, Any]:
    """The same as plain data, sizes in bytes."""
    return {
        "device": {"name": device.name, "bytes": device.size, "usable_bytes": device.usable},
        "stages": [asdict(plan) | {"total": plan.total} for plan in plans],
    }
