"""A base in four bits trains as the plain weights that it stands for, and is exported as them. Needs bitsandbytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimepo.data.batch import StepCollator
from slimepo.data.rows import PAIR
from slimepo.errors import InputError
from slimepo.model.adapters import add_adapter, lora_config, merge, with_adapter
from slimepo.model.load import load_model
from slimepo.model.logps import causal_lm, install_logps
from slimepo.model.modes import scoring
from slimepo.model.quantize import dequantized, four_bit_layers, four_bit_weights, four_bits
from slimepo.model.score import score_rows
from slimepo.onpolicy.critic import Critic
from slimepo.onpolicy.settings import ValueModel
from slimepo.parallel.engines import weights_of
from slimepo.pipeline.export import export_model, newest
from slimepo.pipeline.recipe.read import load_recipe
from slimepo.pipeline.run import run_recipe
from slimepo.pipeline.start import stage_model
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.terminal import make_console
from slimepo.training.config import PreferenceConfig
from slimepo.training.prepare import prepared
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model

pytest.importorskip("bitsandbytes")
F32 = torch.float32
ROWS = random_rows(16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(tied=True, vocab_size=len(build_tokenizer()), initializer_range=0.3)
    model.save_pretrained(folder)
    return str(folder)


def loaded(base: str) -> nn.Module:
    return load_model(base, quantization_config=four_bits(F32))


def logps(model: nn.Module) -> torch.Tensor:
    install_logps(model)
    with scoring(model) as forward:
        found = score_rows(forward, ROWS, StepCollator(8, PAIR), torch.device("cpu"))
    return torch.cat([torch.tensor(numbers[0]) for of_row in found for numbers in of_row])


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    """LoRA and the head of a tied model, three steps, every layer's activations computed again."""
    args = PreferenceConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), learning_rate=1e-2, max_steps=3, save_steps=3,
        activation_checkpointing="layers", loss="dpo", monitor=False,
    )  # fmt: skip
    made = PreferenceTrainer(
        loaded(base), args, ROWS, processing_class=build_tokenizer(), peft_config=lora_config(r=4)
    )
    made.train()
    return made


def test_log_probs_are_those_of_the_plain_weights_that_four_bits_stand_for(base: str) -> None:
    model = loaded(base)
    ours = logps(model)
    # transformers' own way back.
    plain = loaded(base)
    theirs = plain.dequantize(dtype=F32)  # type: ignore[operator]
    assert not four_bit_layers(theirs)
    assert off(ours, logps(theirs)) < 1e-5
    assert off(ours, logps(load_model(base))) > 1e-2
    assert off(ours, logps(dequantized(model))) < 1e-5


def test_the_layers_matrices_are_in_four_bits_and_nothing_else(base: str) -> None:
    model = loaded(base)
    kinds = {name.rpartition(".")[2] for name in four_bit_layers(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    others = {
        p.dtype
        for name, p in model.named_parameters()
        if name.rpartition(".")[0] not in four_bit_layers(model)
    }
    assert others == {F32}
    whole = tiny_model(tied=True, vocab_size=len(build_tokenizer()))
    assert sum(map(weights_of, model.parameters())) == whole.num_parameters()
    ends = (whole.get_input_embeddings().weight.numel(), 5 * 32)
    assert four_bit_weights(model) == whole.num_parameters() - sum(ends)


def test_it_trains_what_the_plain_computation_says(trained: PreferenceTrainer) -> None:
    certificate = trained.certificate
    assert certificate is not None
    assert certificate["agrees"]
    assert certificate["precision"] == "float32"
    assert any("lm_head" in each["name"] for each in certificate["gradients"])
    assert trained.reference is not None
    assert trained.reference.source == "adapters-off"
    moved = [line["loss"] for line in trained.state.log_history if "loss" in line]
    assert moved


def test_a_checkpoint_knows_the_base_that_it_was_trained_on(trained: PreferenceTrainer) -> None:
    again = load_model(str(newest(Path(trained.args.output_dir or ""))))
    assert four_bit_layers(again)
    assert off(logps(again), logps(trained.model)) < 1e-5
    assert off(logps(merge(again)), logps(trained.model)) < 1e-5


def test_the_export_is_merged_onto_the_plain_weights_and_the_gap_is_told(
    trained: PreferenceTrainer, base: str, tmp_path: Path
) -> None:
    before = logps(trained.model)
    assert off(before, logps(loaded(base))) > 1e-3
    made = export_model(trained.model, build_tokenizer(), tmp_path / "model", rows=ROWS)
    assert made.tokens == len(before)
    assert 0 <= made.mean <= made.largest < 1e-4
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=F32)
    assert off(logps(exported), before) < 1e-4
    assert type(exported.model.layers[0].mlp.up_proj) is nn.Linear
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"target_modules": "all-linear"}])
def test_other_adapters_come_back_as_they_were(base: str, kind: dict[str, Any]) -> None:
    from peft import LoraConfig

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    for name, value in kind.items():
        setattr(config, name, value)
    model = add_adapter(causal_lm(loaded(base)), config)
    before = logps(model)
    assert off(before, logps(loaded(base))) > 1e-3
    assert off(logps(merge(model)), before) < 1e-4


def test_what_quantised_weights_cannot_do_is_refused(base: str, tmp_path: Path) -> None:
    args = PreferenceConfig(output_dir=str(tmp_path), monitor=False)
    with pytest.raises(InputError, match="quantised and do not train themselves: give an adapter"):
        PreferenceTrainer(loaded(base), args, ROWS)
    with pytest.raises(InputError, match=r"quantised \(bitsandbytes\), and an adapter cannot be folded"):
        with_adapter(add_adapter(causal_lm(loaded(base)), lora_config(r=2)), wanted="merge")
    with pytest.raises(InputError, match="'fsdp2' would cut quantised weights into parts"):
        prepared(loaded(base), None, lora_config(r=2), disable_dropout=True, engine="fsdp2")
    with pytest.raises(InputError, match="a value model trains a copy"):
        Critic(loaded(base), ValueModel(), 4, torch.device("cpu"))


def test_a_frozen_copy_is_a_reference_as_ever(base: str, tmp_path: Path) -> None:
    losses = []
    for reference in ("adapters-off", "copy"):
        args = PreferenceConfig(
            output_dir=str(tmp_path / reference), learning_rate=1e-2, max_steps=2, save_strategy="no", loss="dpo",
            reference=reference, monitor=False, logging_steps=1,
        )  # fmt: skip
        torch.manual_seed(0)
        made = PreferenceTrainer(loaded(base), args, ROWS, peft_config=lora_config(r=4))
        made.train()
        losses.append([line["loss"] for line in made.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_recipe_trains_two_stages_on_a_base_in_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": str(i + 3)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {{init: random, architecture: qwen3, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1,
        num_attention_heads: 2, num_key_value_heads: 2, head_dim: 32, tie_word_embeddings: true}}
tokenizer: {tmp_path / "tokenizer"}
adapter: {{r: 4}}
quantize: nf4
data: {{path: {tmp_path / "pairs.jsonl"}}}
stages:
  - {{loss: sft, epochs: 1, batch_size: 8, monitor: false}}
  - {{loss: slime, learning_rate: 1e-3, batch_size: 8, monitor: false}}
"""
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with monkeypatch.context() as second_rank:
        # transformers saves on the first rank alone; each needs a base.
        second_rank.setattr(PreTrainedModel, "should_save_on_this_rank", lambda *_: False)
        assert four_bit_layers(stage_model(recipe, recipe.model, build_tokenizer()))
    results = run_recipe(recipe, tmp_path / "run", make_console(quiet=True))
    for result in results:
        assert result["quantized"] == {"kind": "nf4", "weights": 4 * 64 * 64 + 3 * 64 * 64}
        assert result["merged"]["tokens"] > 16
        assert result["merged"]["mean"] <= result["merged"]["largest"] < 1e-4
        card = (tmp_path / "run" / result["name"] / "model" / "README.md").read_text()
        assert "28,672 weights of its base were in four bits (nf4, bitsandbytes)" in card
    assert not four_bit_layers(load_model(str(tmp_path / "run" / "slime" / "model")))
