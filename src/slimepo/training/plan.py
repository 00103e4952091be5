"""How much memory a recipe will need, worked out from the model's configuration before anything is loaded.

One micro-batch as large as the recipe allows goes through the policy without data (see
`slimepo.training.fake_step`); the optimizer is counted. Layers of one kind cost alike, so a deep model is worked
out from a few of its layers.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from slimepo.data.batch import Layout, PairBatch, StepCollator
from slimepo.data.tokenize import TokenizedPair
from slimepo.errors import InputError
from slimepo.losses import find_objective
from slimepo.training.config import PreferenceConfig
from slimepo.training.fake_step import (
    Checkpointing,
    FakePolicy,
    StepSetting,
    fake_policy,
    micro_batch_memory,
    takes_packed_rows,
)
from slimepo.training.logps import causal_lm
from slimepo.training.models import load_config, random_config, smoke_config
from slimepo.training.recipe import RandomModel, Recipe, Stage
from slimepo.training.run import recipe_tokenizer
from slimepo.training.stage import base_dtype, lora, stage_arguments

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30

# GiB that a program finds on a GPU of that name.
GPUS = {
    "t4": 14.6, "l4": 22.0, "a10": 22.1, "rtx-3090": 23.6, "rtx-4090": 23.6, "rtx-5090": 31.4, "a6000": 47.4,
    "l40s": 44.4, "a100-40": 39.4, "a100-80": 79.2, "h100": 79.2, "h200": 139.8,
}  # fmt: skip

# Not tensors: the driver's context and the libraries' workspaces on a GPU, Python and its libraries on a CPU.
OVERHEAD = {"gpu": 1.0 * GIB, "cpu": 0.7 * GIB}
# The share of the rest that the allocator can fill before gaps between the tensors are in the way.
FILLED = 0.95

# AdamW keeps two float32 values for every parameter that trains.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "sgd": 0, "adagrad": 4, "rmsprop": 4}

# A model of no more layers is worked out whole.
_FEW_LAYERS = 4


@dataclass(frozen=True)
class Device:
    """Where a recipe is to run: `size` bytes of memory."""

    name: str
    gpu: bool
    size: int

    @property
    def usable(self) -> int:
        """Bytes that tensors can take."""
        return int((self.size - OVERHEAD["gpu" if self.gpu else "cpu"]) * FILLED)


@dataclass(frozen=True)
class StagePlan:
    """What a stage holds on each device at its peak, in bytes, for the largest micro-batch that its recipe allows.

    `tokens` counts padding; every response is as long as `max_length` allows. `largest_budget` is the largest
    `max_tokens_per_batch` that fits the device, 0 where not even one such pair does.
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

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


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


def plan_recipe(recipe: Recipe, device: Device) -> list[StagePlan]:
    """A plan of every stage. Reads the model's configuration and, for a random model, the tokenizer; no weights.

    Raises:
        InputError: a wrong recipe, or a model or optimizer that cannot be planned.
    """
    config = _config(recipe)
    plans = []
    for number, stage in enumerate(recipe.stages):
        loaded = number > 0 or not (recipe.smoke or isinstance(recipe.model, RandomModel))
        dtype = _loaded_dtype(recipe, device) if loaded else torch.float32
        step = make_step(recipe, stage, config, device, dtype)
        plans.append(plan_stage(step, stage.name, device))
        # The next stage starts from what this one exports: a head that was untied stays so.
        config = step.config
    return plans


@dataclass(frozen=True)
class Step:
    """A stage's step on one device: how it is cut, and the policies that its memory is worked out from.

    `depths` are policies of a few layers, each with the factor that its bytes go into the whole model's with.
    """

    setting: StepSetting
    collator: StepCollator
    pairs: int  # of an optimizer step
    max_length: int
    optimizer_bytes: int  # for each parameter that trains
    whole: FakePolicy
    depths: list[tuple[FakePolicy, int]]

    @property
    def config(self) -> PreTrainedConfig:
        """The policy's configuration, which says whether the head is tied still."""
        return causal_lm(self.whole.model).config

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.whole.model.parameters() if p.requires_grad)


def make_step(
    recipe: Recipe, stage: Stage, config: PreTrainedConfig, device: Device, dtype: torch.dtype
) -> Step:
    """The step of a stage whose model has that configuration and is loaded in `dtype`."""
    args = _arguments(recipe, stage, device)
    if args.optim not in OPTIMIZER_BYTES:
        known = ", ".join(OPTIMIZER_BYTES)
        raise InputError(f"stage {stage.name!r}: optim {args.optim} cannot be planned; these can: {known}")
    setting = StepSetting(device.gpu, dtype, bool(args.bf16), _checkpointing(args), accumulates=True)
    sides = find_objective(stage.loss).sides

    def policy(config: PreTrainedConfig) -> FakePolicy:
        adapter = lora(recipe.adapter) if recipe.adapter else None
        made = fake_policy(copy.deepcopy(config), adapter, setting, disable_dropout=args.disable_dropout)
        return made

    whole = policy(config)
    collator = StepCollator(
        args.per_device_train_batch_size, sides, layout=_layout(whole, args.layout, sides),
        max_tokens=args.max_tokens_per_batch,
    )  # fmt: skip
    depths = _depths(whole, config, policy)
    if collator.layout != "padded":
        for shallow, _ in depths:
            takes_packed_rows(shallow)
    optimizer_bytes = OPTIMIZER_BYTES[args.optim]
    return Step(
        setting, collator, args.pairs_per_step or 1, recipe.data.max_length, optimizer_bytes, whole, depths
    )


def plan_stage(step: Step, name: str, device: Device) -> StagePlan:
    """The plan for a micro-batch as large as the recipe allows."""
    batch = largest_batch(step)
    memory = step_memory(step, batch, accumulates=batch["pairs"] < step.pairs)
    return StagePlan(
        name=name,
        layout=step.collator.layout,
        parameters=sum(p.numel() for p in step.whole.model.parameters()),
        trained_parameters=step.trained_parameters,
        pairs=batch["pairs"],
        tokens=batch["input_ids"].numel(),
        **memory,
        largest_budget=largest_budget(step, device.usable),
    )


def step_memory(step: Step, batch: PairBatch, *, accumulates: bool) -> dict[str, int]:
    """Bytes by part at the peak of a training step that has this micro-batch.

    `accumulates`: the step has others before it, whose gradients are there already.
    """
    setting = step.setting._replace(accumulates=accumulates)
    # Gradients that grow while activations shrink are not a sum over layers: such a step goes through all of them.
    depths = step.depths if accumulates else [(step.whole, 1)]
    moments = (Counter[str](), Counter[str]())
    for policy, factor in depths:
        for moment, found in zip(moments, micro_batch_memory(policy, batch, setting), strict=True):
            for kind, size in found.items():
                moment[kind] += factor * size
    worst = max(moments, key=Counter.total)
    parts = {kind: worst[kind] for kind in ("weights", "gradients", "activations", "head")}
    return parts | {"optimizer": step.optimizer_bytes * step.trained_parameters}


def largest_batch(step: Step) -> PairBatch:
    """The largest micro-batch that the recipe allows, of the longest pairs."""
    if step.collator.max_tokens is None:
        pairs = [_pair(step.max_length - 1)] * min(step.collator.micro_batch_size, step.pairs)
        return step.collator.batch(pairs)
    return _batch_of(step, step.collator.max_tokens, most=step.pairs)


def largest_budget(step: Step, usable: int) -> int:
    """The largest `max_tokens_per_batch` whose micro-batches fit into `usable` bytes; 0 where no pair does.

    Memory grows linearly from some pairs on, so that large budgets are worked out from smaller ones.
    """
    known: dict[int, int] = {}

    def size(tokens: int) -> int:
        if tokens not in known:
            known[tokens] = sum(step_memory(step, _batch_of(step, tokens), accumulates=True).values())
        return known[tokens]

    one = _batch_of(step, 0)["input_ids"].numel()
    low, high = one, 16 * one
    if size(low) > usable:
        return 0
    if size(high) <= usable:
        slope = (size(high) - size(high // 2)) / (high - high // 2)
        return high + int((usable - size(high)) / slope)
    for _ in range(20):
        middle = low + int((high - low) * (usable - size(low)) / (size(high) - size(low)))
        if middle - low < low / 100:
            break
        low, high = (middle, high) if size(middle) <= usable else (low, middle)
    return low


def _pair(response: int) -> TokenizedPair:
    """The shortest prompt leaves the most tokens to the responses."""
    ids = np.zeros(response, dtype=np.int32)
    return TokenizedPair(np.zeros(1, dtype=np.int32), ids, ids, "planned")


def _batch_of(step: Step, tokens: int, most: int | None = None) -> PairBatch:
    """As many of the longest pairs as fit into so many tokens, at least one, and a shorter one in what is left."""
    sides, layout = len(step.collator.sides), step.collator.layout
    longest = step.max_length - 1
    each = sides * (longest + 1) if layout != "shared" else sides * longest + 1
    count = max(1, tokens // each)
    left = tokens - count * each
    rest = left // sides - 1 if layout != "shared" else (left - 1) // sides
    pairs = [_pair(longest)] * count
    if rest > 0 and layout != "padded":
        pairs.append(_pair(rest))
    return step.collator.batch(pairs[:most])


def _depths(
    whole: FakePolicy, config: PreTrainedConfig, policy: Callable[[PreTrainedConfig], FakePolicy]
) -> list[tuple[FakePolicy, int]]:
    """Policies with a layer of each kind, and with one more of a kind: what a layer costs is their difference."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ["any"] * text.num_hidden_layers)
    counts = Counter(kinds)
    if len(kinds) <= _FEW_LAYERS + len(counts):
        return [(whole, 1)]
    # The last layer's kind stays last: its backward pass runs while all activations are held.
    each = [kind for kind in counts if kind != kinds[-1]] + [kinds[-1]]
    shapes = [([kind, *each], count - 1) for kind, count in counts.items() if count > 1]
    shapes.append((each, 1 - sum(count for _, count in shapes)))
    depths = [(policy(_with_layers(config, layers)), count) for layers, count in shapes]
    # Layers may differ in what is not called a kind.
    exact = sum(count * _parameters(shallow) for shallow, count in depths) == _parameters(whole)
    return depths if exact else [(whole, 1)]


def _with_layers(config: PreTrainedConfig, kinds: Sequence[str]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kinds)
    if getattr(text, "layer_types", None):
        text.layer_types = list(kinds)
    return config


def _parameters(policy: FakePolicy) -> int:
    return sum(p.numel() for p in policy.model.parameters())


def _layout(policy: FakePolicy, wanted: str, sides: tuple[str, ...]) -> Layout:
    """The layout that `choose_layout` would take for all that can be told without the weights."""
    if wanted == "padded" or not takes_packed_rows(policy):
        return "padded"
    return "packed" if wanted == "packed" or len(sides) == 1 else "shared"


def _arguments(recipe: Recipe, stage: Stage, device: Device) -> PreferenceConfig:
    """The stage's arguments, with the precision of the device planned for rather than this machine's."""
    elsewhere = device.gpu and not torch.cuda.is_available()
    given = {k: v for k, v in stage.args.items() if not (elsewhere and k in ("bf16", "fp16", "tf32"))}
    args = stage_arguments(recipe, stage.model_copy(update={"args": given}), Path("plan"))
    if elsewhere:
        args.bf16 = stage.args.get("bf16", True)
    return args


def _checkpointing(args: PreferenceConfig) -> Checkpointing:
    if not args.activation_checkpointing:
        return "none"
    return "offload" if (args.activation_checkpointing_kwargs or {}).get("offload") else "layers"


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
