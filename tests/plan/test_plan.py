"""What a plan says before anything is loaded is what training then holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.plan import Case, compare
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.model.logps import causal_lm, response_logps
from slimepo.pipeline.recipe.arguments import stage_arguments
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.start import lora
from slimepo.plan import step as step_plan
from slimepo.plan.plan import GIB, StagePlan, find_device, plan_recipe, plan_rows, print_plan, verdict
from slimepo.plan.step import PlannedStep, largest_batch, largest_budget, make_step, step_memory
from slimepo.plan.tracker import MemoryTracker
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.terminal import make_console
from slimepo.training.step import output_of
from slimepo.training.trainer import PreferenceTrainer

LENGTH = 40


def small_config(
    architecture: str = "llama", tied: bool = False, layers: int = 3, **more: Any
) -> PreTrainedConfig:
    sizes = dict(
        vocab_size=2000, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return AutoConfig.for_model(architecture, **(sizes | more))


def small_recipe(adapter: Any = "none", **stage: Any) -> Recipe:
    stages = [{"loss": "slime", "batch_size": 12, "micro_batch_size": 6} | stage]
    data = {"path": "none", "max_length": LENGTH}
    tasks = {"tasks": {"train": "none"}} if "rollouts" in stage else {}
    return make_recipe({"model": "none", "data": data, "stages": stages, "adapter": adapter} | tasks)


def step_of(recipe: Recipe, config: PreTrainedConfig, gpu: bool = False) -> PlannedStep:
    dtype = torch.bfloat16 if gpu and recipe.adapter else torch.float32
    return make_step(recipe, recipe.stages[0], config, dtype, gpu=gpu)


def real_trainer(recipe: Recipe, config: PreTrainedConfig, folder: Path) -> PreferenceTrainer:
    ids = np.arange(2, LENGTH + 1, dtype=np.int32)
    rows = [Row(ids[:1], (ids, ids + 1), id=f"row {i}") for i in range(12)]
    return PreferenceTrainer(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32),
        stage_arguments(recipe, recipe.stages[0], folder),
        train_dataset=rows,
        peft_config=lora(recipe) if recipe.adapter else None,
    )


CHECKPOINTED = {"activation_checkpointing": True}
SHAPES = [
    ("llama", True, "none", {}),
    ("llama", False, "none", {"args": {"layout": "padded"}}),
    ("qwen3", True, {"r": 4}, {}),
    ("qwen3", True, {"r": 4, "train_head": False}, {"args": {"layout": "packed"}}),
    ("llama", True, {"r": 4}, {"args": CHECKPOINTED}),
    ("llama", True, "none", {"args": CHECKPOINTED}),
    ("gemma3_text", True, {"r": 4}, {}),
    ("gemma3_text", True, "none", {"loss": "sft"}),
]


@pytest.mark.parametrize(("architecture", "tied", "adapter", "stage"), SHAPES)
def test_the_plan_counts_what_the_real_tensors_of_a_step_count(
    architecture: str, tied: bool, adapter: Any, stage: dict[str, Any], tmp_path: Path
) -> None:
    more = {"sliding_window": 16} if architecture == "gemma3_text" else {}
    config, recipe = small_config(architecture, tied, **more), small_recipe(adapter, **stage)
    step = step_of(recipe, config)
    batch = largest_batch(step)
    planned = step_memory(step, batch, accumulates=True)

    trainer = real_trainer(recipe, config, tmp_path)
    model: Any = trainer.model.train()
    if trainer.args.activation_checkpointing:
        model.activation_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemoryTracker()
    tracker.count([*model.parameters(), *model.buffers()], "weights")
    tracker.count([p.grad for p in trained], "gradients")
    with tracker:
        logps = response_logps(model, batch)
        output_of(trainer.objective, trainer.loss_function, logps, batch, None, None).loss.mean().backward()
    assert trainer.layout == step.collator.layout
    assert planned["weights"] == tracker.peak["weights"]
    assert planned["optimizer"] == 8 * sum(p.numel() for p in trained)
    assert sum(planned.values()) - planned["optimizer"] == pytest.approx(tracker.peak.total(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (
            "whole model, tied head",
            Case(
                dict(model_type="llama", vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True),
                {"batch_size": 8, "micro_batch_size": 4},
            ),
        ),
        (
            "LoRA, trained head, checkpointed",
            Case(
                dict(model_type="qwen3", vocab_size=65536, hidden_size=192, intermediate_size=384, num_hidden_layers=4,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
                {"batch_size": 4, "micro_batch_size": 2, "args": CHECKPOINTED}, {"r": 8}, max_length=192,
            ),
        ),
    ],
)  # fmt: skip
def test_the_estimate_is_within_15_percent_of_the_resident_peak(name: str, case: Case) -> None:
    found = compare(case)
    assert found["measured"] > 250 * 2**20
    assert 0.85 < found["total"] / found["measured"] < 1.15, found


@pytest.mark.parametrize(
    ("architecture", "more", "args", "gpu"),
    [
        ("llama", {}, {}, False),
        ("qwen3", {}, CHECKPOINTED, True),
        ("gemma3_text", {"sliding_window": 16}, {}, True),
        ("gemma3_text", {"sliding_window": 16}, CHECKPOINTED, False),
    ],
)
def test_a_few_layers_tell_what_all_of_them_take(
    architecture: str, more: dict[str, Any], args: dict[str, Any], gpu: bool
) -> None:
    # Seven layers: in Gemma 3 one of them sees all.
    config, recipe = small_config(architecture, True, layers=7, **more), small_recipe({"r": 4}, args=args)
    step = step_of(recipe, config, gpu)
    assert len(step.depths) > 1
    whole = replace(step, depths=[(step.whole, 1)])
    batch = largest_batch(step)
    assert step_memory(step, batch, accumulates=True) == step_memory(whole, batch, accumulates=True)


def test_layers_that_differ_in_what_no_key_names_are_all_gone_through() -> None:
    uneven = small_config("qwen3_moe", layers=12, decoder_sparse_step=1, mlp_only_layers=[3], num_experts=4,
                          moe_intermediate_size=32, num_experts_per_tok=2)  # fmt: skip
    assert [factor for _, factor in step_of(small_recipe(), uneven).depths] == [1]


def test_gradients_that_are_not_there_yet_are_not_counted() -> None:
    step = step_of(small_recipe(), small_config(tied=True, layers=12))
    batch = largest_batch(step)
    first, later = (step_memory(step, batch, accumulates=there) for there in (False, True))
    assert sum(first.values()) < sum(later.values())
    assert later["gradients"] >= 4 * step.trained_parameters


def test_memory_grows_with_tokens_and_the_largest_budget_is_the_largest() -> None:
    step = step_of(small_recipe({"r": 4}), small_config("qwen3", True, layers=6))

    def total(tokens: int) -> int:
        batch = step_plan._batch_of(step, tokens)
        # What is left of a budget is shared by two responses.
        assert 0 <= tokens - batch["input_ids"].numel() <= 2
        return sum(step_memory(step, batch, accumulates=True).values())

    sizes = [total(tokens) for tokens in (80, 200, 1000, 4000)]
    assert sizes == sorted(sizes)
    for usable in (total(300), total(6000)):
        budget = largest_budget(step, usable)
        assert total(budget) <= usable
        assert total(int(budget * 1.03)) > usable
    assert largest_budget(step, total(79) - 1) == 0


def test_a_frozen_copy_of_the_reference_counts_as_weights() -> None:
    config, sizes = small_config(), {}
    for name, stage in {
        "auto": {},
        "copy": {"reference": "copy"},
        "moving": {"args": {"sync_reference": {"every": 4}}},
    }.items():
        step = step_of(small_recipe(loss="dpo", **stage), config, False)
        sizes[name] = step_memory(step, largest_batch(step), accumulates=True)
    whole = sum(p.numel() * p.element_size() for p in step.whole.model.parameters())
    assert sizes["copy"]["weights"] == sizes["auto"]["weights"] + whole
    assert sizes["moving"] == sizes["copy"]


@pytest.mark.parametrize(
    ("adapter", "stage", "held"),
    [
        ("none", {"loss": "grpo"}, False),
        ("none", {"loss": "grpo", "rollouts": {"watch_kl": True}}, True),
        ("none", {"loss": "rloo", "rollouts": {"kl": 0.1}}, True),
        ("none", {"loss": "dpo"}, True),
        ("none", {"loss": "simpo", "rollouts": {"against": "reference"}}, True),
        ({"r": 2}, {"loss": "dpo", "rollouts": {"watch_kl": True}}, False),
    ],
)
def test_a_stage_that_samples_holds_a_copy_where_no_adapter_can_be_switched_off(
    adapter: Any, stage: dict[str, Any], held: bool
) -> None:
    given = {"rollouts": {"samples": 2, "max_new_tokens": 8}, **stage}
    step = step_of(small_recipe(adapter, reward="own.py:reward", **given), small_config(), False)
    assert (step.reference_bytes > 0) == held


def test_a_value_model_is_trained_beside_the_policy() -> None:
    given: dict[str, Any] = {"loss": "ppo", "rollouts": {"samples": 2}, "reward": "own.py:reward"}
    step = step_of(small_recipe(**given), small_config(), False)
    head = causal_lm(step.whole.model).get_output_embeddings().weight.numel()
    assert step.value_bytes == 16 * (sum(p.numel() for p in step.whole.model.parameters()) - head)


def test_checkpoints_in_the_hosts_memory_leave_room_on_a_gpu_and_none_on_a_cpu() -> None:
    config, offloaded = small_config(layers=8), {"activation_checkpointing": "offload"}
    sizes = {}
    for gpu in (False, True):
        for name, args in (("none", {}), ("layers", CHECKPOINTED), ("offload", offloaded)):
            step = step_of(small_recipe(args=args), config, gpu)
            memory = step_memory(step, largest_batch(step), accumulates=True)
            sizes[gpu, name] = memory["activations"]
    assert sizes[False, "none"] > sizes[False, "layers"] == sizes[False, "offload"]
    assert sizes[True, "none"] > sizes[True, "layers"] > sizes[True, "offload"] > 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's configuration and tokenizer, without weights."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    small_config(tied=True, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    return tmp_path


def two_stages(folder: Path, **keys: Any) -> Recipe:
    stages = [{"loss": "sft"}, {"loss": "slime"}]
    return make_recipe(
        {"model": str(folder), "data": {"path": "none", "max_length": 16}, "stages": stages} | keys
    )


def test_a_plan_of_two_stages_needs_no_weights(folder: Path) -> None:
    device = find_device("24")
    sft, slime = plan_recipe(two_stages(folder), device)
    assert (sft.layout, slime.layout) == ("packed", "shared")
    assert (sft.pairs, sft.tokens) == (4, 4 * 16)
    assert (slime.pairs, slime.tokens) == (4, 4 * 31)
    # The head that the first stage has untied stays a matrix of its own beside its trained copy.
    assert sft.parameters == slime.parameters
    assert sft.trained_parameters == slime.trained_parameters
    console = make_console(record=True, width=120)
    print_plan([sft, slime], device, console)
    text = console.export_text()
    for words in (f"{sft.trained_parameters:,}", "activations", "at the peak", f"{slime.largest_budget:,}"):
        assert words in text
    rows = json.loads(json.dumps(plan_rows([sft, slime], device)))
    assert rows["stages"][1]["total"] == slime.total


def test_a_random_model_takes_its_vocabulary_from_the_tokenizer(folder: Path) -> None:
    model = {"init": "random", "architecture": "llama", "hidden_size": 32, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    (_, plan) = plan_recipe(two_stages(folder, model=model, tokenizer=str(folder)), find_device("8"))
    embeddings = 2 * 32 * len(build_tokenizer())
    assert plan.parameters == embeddings + 2 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 32
    assert plan.trained_parameters == plan.parameters


def test_what_does_not_fit_is_said_with_a_way_out() -> None:
    plan = StagePlan(
        name="slime", layout="shared", parameters=1, trained_parameters=1, pairs=1, tokens=31, weights=GIB,
        gradients=GIB, optimizer=GIB, activations=4 * GIB, head=GIB, largest_budget=100,
    )  # fmt: skip
    assert verdict(plan, find_device("12")) == []
    assert "max_tokens_per_batch: 100" in verdict(plan, find_device("8"))[0]
    [advice] = verdict(replace(plan, largest_budget=0), find_device("2"))
    assert "data.max_length" in advice
    # A stage's own key, as the guide gives it.
    assert "activation_checkpointing: layers" in advice
    assert "args:" not in advice


def test_devices() -> None:
    assert find_device("H100").size == int(79.2 * GIB)
    assert find_device("40").usable < 40 * GIB
    assert find_device(None).size > 0
    for wrong in ("h1000", "-1", "0", "nan", "inf"):
        with pytest.raises(InputError, match="give its memory in GiB"):
            find_device(wrong)


def test_a_model_that_does_not_run_without_data_is_refused_and_not_guessed_at() -> None:
    experts = small_config("mixtral", num_local_experts=4, num_experts_per_tok=2)
    step = step_of(small_recipe(), experts)
    with pytest.raises(InputError, match="MixtralForCausalLM cannot be planned"):
        step_memory(step, largest_batch(step), accumulates=True)


def test_an_optimizer_that_is_not_known_is_refused(folder: Path) -> None:
    stages = [{"loss": "slime", "args": {"optim": "adafactor"}}]
    with pytest.raises(InputError, match="optim adafactor cannot be planned"):
        plan_recipe(two_stages(folder, stages=stages), find_device("8"))


def test_a_base_in_four_bits_takes_so_much_less() -> None:
    config = small_config(layers=3)
    plain = small_recipe({"r": 4}, loss="dpo", reference="copy")
    quantized = plain.model_copy(update={"quantize": "nf4"})
    parts = []
    for recipe in (plain, quantized):
        step = step_of(recipe, config)
        parts.append(step_memory(step, largest_batch(step), accumulates=True))
    of_layers = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3)
    # Four bits, and of every 64 weights a byte, of every 256 bytes of these four more; policy and copy.
    left = of_layers * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert parts[0]["weights"] - parts[1]["weights"] == pytest.approx(2 * (4 * of_layers - left), abs=4)
    # While one is computed with it is plain.
    assert parts[1]["activations"] - parts[0]["activations"] == 4 * 64 * 160
    assert all(parts[0][part] == parts[1][part] for part in ("gradients", "optimizer", "head"))
