"""The memory of a stage's training step: its largest micro-batch, and what is held at the peak, part by part.

Layers of one kind cost alike, so a deep model is worked out from a few of its layers; a test holds that to the whole.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from slimepo.data.batch import Batch, Layout, StepCollator
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.model.attention.table import PATHS
from slimepo.model.logps import causal_lm
from slimepo.model.quantize import NF4_BYTES
from slimepo.pipeline.recipe.arguments import stage_arguments
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.recipe.sections import Stage
from slimepo.pipeline.start import lora
from slimepo.plan.fake_step import (
    Checkpointing,
    FakePolicy,
    StepSetting,
    fake_policy,
    micro_batch_memory,
    takes_packed_rows,
)
from slimepo.training.config import PreferenceConfig

# Bytes for each parameter that trains: AdamW keeps two float32 values, clipped_sstm two points.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "clipped_sstm": 8, "sgd": 0}

# A model of few layers is worked out whole.
_FEW_LAYERS = 4


@dataclass(frozen=True)
class PlannedStep:
    """A stage's step on one device: how it is cut, and the policies that its memory is worked out from.

    `depths` are policies of a few layers, each with the factor that its bytes go into the whole model's with.
    """

    setting: StepSetting
    collator: StepCollator
    pairs: int  # of an optimizer step
    longest: tuple[
        int, int
    ]  # tokens of a prompt and a response; the shortest prompt leaves a pair's responses the most
    optimizer_bytes: int  # for each parameter that trains
    reference_bytes: int  # of a reference model beside the policy
    value_bytes: int  # of a value model, with what trains it
    quantized: tuple[
        int, int
    ]  # bytes that a base in four bits saves, and those of its largest matrix while it computes
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
    recipe: Recipe, stage: Stage, config: PreTrainedConfig, dtype: torch.dtype, *, gpu: bool, ranks: int = 1
) -> PlannedStep:
    """The step of a stage whose model has that configuration and is loaded in `dtype`, on one of `ranks` devices.

    Raises:
        InputError: a wrong argument, or an optimizer that cannot be planned.
    """
    args = _arguments(recipe, stage, gpu, ranks)
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in OPTIMIZER_BYTES:
        known = ", ".join(OPTIMIZER_BYTES)
        raise InputError(f"stage {stage.name!r}: optim {optimizer} cannot be planned; these can: {known}")
    # `auto` on a GPU: the path that needs the most memory of those that may be chosen.
    path = ("side_by_side" if gpu else "by_length") if args.attention == "auto" else args.attention
    path = PATHS[path].planned_as or path
    setting = StepSetting(gpu, dtype, bool(args.bf16), _checkpointing(args), path, accumulates=True)
    positions = args.positions

    def policy(config: PreTrainedConfig) -> FakePolicy:
        adapter = lora(recipe)
        return fake_policy(copy.deepcopy(config), adapter, setting, disable_dropout=args.disable_dropout)

    whole = policy(config)
    collator = StepCollator(
        args.per_device_train_batch_size, positions, layout=_layout(whole, args.layout, path, positions),
        max_tokens=args.max_tokens_per_batch,
    )  # fmt: skip
    depths = _depths(whole, config, policy)
    for shallow, _ in depths:
        takes_packed_rows(shallow, path)
    quantized = _quantized_bytes(whole) if recipe.quantize else (0, 0)
    return PlannedStep(
        setting=setting,
        collator=collator,
        pairs=args.pairs_per_step or 1,
        longest=_longest(recipe, stage),
        optimizer_bytes=OPTIMIZER_BYTES[optimizer],
        reference_bytes=_reference_bytes(args, whole, recipe.adapter not in (None, "continue"), quantized[0]),
        value_bytes=_value_bytes(args, whole),
        quantized=quantized,
        whole=whole,
        depths=depths,
    )


def step_memory(step: PlannedStep, batch: Batch, *, accumulates: bool) -> dict[str, int]:
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
    saved, matrix = step.quantized
    parts["weights"] += step.reference_bytes + step.value_bytes - saved
    parts["activations"] += matrix
    return parts | {"optimizer": step.optimizer_bytes * step.trained_parameters}


def largest_batch(step: PlannedStep) -> Batch:
    """The largest micro-batch that the recipe allows, of the longest pairs."""
    if step.collator.max_tokens is None:
        pairs = [_row(step, *step.longest)] * min(step.collator.micro_batch_size, step.pairs)
        return step.collator.batch(pairs)
    return _batch_of(step, step.collator.max_tokens, most=step.pairs)


def largest_budget(step: PlannedStep, usable: int) -> int:
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


def _longest(recipe: Recipe, stage: Stage) -> tuple[int, int]:
    """Tokens of the longest prompt and response of a row."""
    if stage.rollouts is None:
        return 1, recipe.data.max_length - 1
    return recipe.data.max_prompt_length or recipe.data.max_length, stage.rollouts.max_new_tokens


def _row(step: PlannedStep, prompt: int, response: int) -> Row:
    ids = np.zeros(response, dtype=np.int32)
    return Row(np.zeros(prompt, dtype=np.int32), (ids,) * (max(step.collator.positions) + 1), id="planned")


def _batch_of(step: PlannedStep, tokens: int, most: int | None = None) -> Batch:
    """As many of the longest pairs as fit into so many tokens, at least one, and a shorter one in what is left."""
    sides, layout = len(step.collator.positions), step.collator.layout
    prompt, longest = step.longest
    each = sides * (longest + prompt) if layout != "shared" else sides * longest + prompt
    count = max(1, tokens // each)
    left = tokens - count * each
    rest = left // sides - 1 if layout != "shared" else (left - 1) // sides
    pairs = [_row(step, prompt, longest)] * count
    if rest > 0 and layout != "padded":
        pairs.append(_row(step, 1, min(rest, longest)))
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


def _layout(policy: FakePolicy, wanted: str, path: str, positions: tuple[int, ...]) -> Layout:
    """The layout that `choose_layout` would take for all that can be told without the weights."""
    if not takes_packed_rows(policy, path) or wanted == "padded":
        return "padded"
    return "packed" if wanted == "packed" or len(positions) == 1 else "shared"


def _arguments(recipe: Recipe, stage: Stage, gpu: bool, ranks: int) -> PreferenceConfig:
    """The stage's arguments, with the precision of the device planned for rather than this machine's."""
    elsewhere = gpu and not torch.cuda.is_available()
    given = {k: v for k, v in stage.args.items() if not (elsewhere and k in ("bf16", "fp16", "tf32"))}
    # This process is one, whatever shares the work later.
    alone = recipe.model_copy(update={"parallel": None})
    args = stage_arguments(alone, stage.model_copy(update={"args": given}), Path("plan"), ranks)
    if elsewhere:
        args.bf16 = stage.args.get("bf16", True)
    return args


def _quantized_bytes(whole: FakePolicy) -> tuple[int, int]:
    """Bytes that a base in four bits saves, and of its largest matrix, which is plain for as long as it computes."""
    frozen = [
        module.weight
        for module in causal_lm(whole.model).base_model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    plain = sum(weight.numel() * weight.element_size() for weight in frozen)
    largest = max((weight.numel() * weight.element_size() for weight in frozen), default=0)
    return plain - int(NF4_BYTES * sum(weight.numel() for weight in frozen)), largest


def _reference_bytes(args: PreferenceConfig, whole: FakePolicy, new_adapter: bool, saved: int) -> int:
    """Of a second model in memory: a frozen copy, or another model, which is taken to be as large as the policy.

    saved: what a copy takes less for being in four bits.
    """
    sampling = args.sampling
    if not (args.reads_reference or (sampling and sampling.watch_kl)):
        return 0
    # Of samples nothing can be computed beforehand, and what moves is a copy (`training.reference.reference_for`).
    without = ["adapters-off", "cache", *(["auto"] if sampling is None or new_adapter else [])]
    if args.reference in without and not args.sync_reference:
        return 0
    size = sum(p.numel() * p.element_size() for p in whole.model.parameters())
    return size - saved if args.reference in ("auto", "copy") else size


def _value_bytes(args: PreferenceConfig, whole: FakePolicy) -> int:
    """Of a value model on the policy's backbone: float32 weights, their gradients, and AdamW's two moments."""
    sampling = args.sampling
    if sampling is None or sampling.advantages != "gae":
        return 0
    backbone = causal_lm(whole.model).base_model.named_parameters()
    return 16 * sum(int(p.numel()) for name, p in backbone if "lora_" not in name)


def _checkpointing(args: PreferenceConfig) -> Checkpointing:
    if not args.activation_checkpointing:
        return "none"
    return "offload" if args.activation_offloading else "layers"
