"""What is exported is what was trained, above all on models whose head shares the embedding's weight."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from slimepo.data.chat import chat_format
from slimepo.errors import InputError
from slimepo.files import read_json
from slimepo.model.adapters import (
    add_adapter,
    keep_trained_in_float32,
    lora_config,
    refuse_unmergeable,
    untie_head,
)
from slimepo.model.compress import Compression, pruned, rounded
from slimepo.model.load import load_checkpoint
from slimepo.pipeline.export import export_model, newest, probe_logits
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model


def trained(tmp_path: Path, model: Any, peft_config: Any = None) -> PreferenceTrainer:
    args = PreferenceConfig(output_dir=str(tmp_path / "run"), learning_rate=1e-2, max_steps=3, save_steps=3)
    made = PreferenceTrainer(model=model, args=args, train_dataset=random_rows(16), peft_config=peft_config)
    made.train()
    return made


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", ["lora with head", "lora", "none"])
def test_a_reloaded_export_gives_the_trained_models_logits(
    tmp_path: Path, architecture: str, tied: bool, adapter: str
) -> None:
    peft_config = None if adapter == "none" else lora_config(r=4, train_head=adapter == "lora with head")
    made = trained(tmp_path, tiny_model(architecture, tied=tied), peft_config)
    logits = probe_logits(made.model)
    difference = export_model(made.model, build_tokenizer(), tmp_path / "model", {9}).logits
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert (probe_logits(reloaded) - logits).abs().max() <= 1e-4
    assert difference <= 1e-4
    untied = not tied or adapter == "lora with head"
    assert reloaded.config.tie_word_embeddings is not untied
    assert (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) is not untied
    assert 9 in GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_a_tied_head_is_exported_too(tmp_path: Path, dtype: torch.dtype) -> None:
    config = lora_config(r=4, target_modules=["q_proj", "lm_head"], train_head=False)
    made = trained(tmp_path, tiny_model(tied=True).to(dtype), config)
    logits = probe_logits(made.model)
    export_model(made.model, build_tokenizer(), str(tmp_path / "model"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    close = 1e-4 if dtype == torch.float32 else 0.05
    assert (probe_logits(reloaded) - logits).abs().max() <= close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_logits_half_precision_blurs_is_saved_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("slimepo.pipeline.export.HALF_TOLERANCE", 0.03)
    tiny_model(tied=False, initializer_range=0.7).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    exact = probe_logits(copy.deepcopy(model).float())
    blur = (probe_logits(model) - exact).abs().max() / exact.abs().max()
    assert blur > 0.03
    made = export_model(model, build_tokenizer(), tmp_path / "model", {9}, dtype)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(probe_logits(reloaded), exact)
    assert made.logits == pytest.approx(float(blur * exact.abs().max())), "how far the model in training was"


@pytest.mark.parametrize("tied", [True, False])
def test_a_compressed_export_is_what_transformers_loads(tmp_path: Path, tied: bool) -> None:
    """Every matrix of the layers has its zeros and its levels; embeddings, head and norms are the trained ones."""
    model = tiny_model(tied=tied)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    made = export_model(
        model, build_tokenizer(), tmp_path / "model", {9}, compression=Compression(bits=4, prune=0.5)
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    changed = {name for name, weight in reloaded.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "_proj" in name}
    for name in changed:
        assert torch.equal(reloaded.get_parameter(name), rounded(pruned(before[name], 0.5), 4))
    assert made.compressed == sum(before[name].numel() for name in changed)
    assert made.logits > 1e-3, "how far it is from the trained model"
    said = read_json(tmp_path / "model" / "slimepo.json")
    assert said is not None
    assert said["compression"] == {"bits": 4, "prune": 0.5, "weights": made.compressed}


def test_training_the_head_of_a_tied_model_leaves_its_embedding_alone(tmp_path: Path) -> None:
    model = tiny_model(tied=True)
    embedding = model.get_input_embeddings().weight.detach().clone()
    made = trained(tmp_path, model, lora_config(r=4))
    merged = made.model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.allclose(merged.get_output_embeddings().weight, embedding)


def test_a_checkpoint_exports_to_the_same_model(tmp_path: Path) -> None:
    base = tiny_model(tied=True, vocab_size=len(build_tokenizer()))
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    made = trained(tmp_path, model, lora_config(r=4))
    checkpoint = newest(tmp_path / "run")
    loaded, _ = load_checkpoint(checkpoint, str(tmp_path / "base"))
    torch.testing.assert_close(probe_logits(loaded), probe_logits(made.model), rtol=0, atol=1e-6)
    with pytest.raises(
        InputError, match="base holds a whole model, which belongs to no other: leave --base out"
    ):
        load_checkpoint(tmp_path / "base", str(tmp_path / "base"))


def test_untying_is_only_for_tied_models() -> None:
    model = tiny_model(tied=False)
    head = model.get_output_embeddings().weight
    untie_head(model)
    assert model.get_output_embeddings().weight is head


def test_trained_parameters_are_kept_in_float32() -> None:
    model = add_adapter(tiny_model().to(torch.bfloat16), lora_config(r=4))
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    whole = tiny_model().to(torch.bfloat16)
    keep_trained_in_float32(whole)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_target_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="no module of LlamaForCausalLM is called 'query_key_value'"):
        add_adapter(tiny_model(), lora_config(target_modules=["query_key_value"], train_head=False))


@pytest.mark.parametrize("inside", [None, "checkpoints"])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, inside: str | None) -> None:
    if inside:
        (tmp_path / inside).mkdir()
    with pytest.raises(InputError, match="no checkpoint, adapter or model there"):
        newest(tmp_path)
    with pytest.raises(InputError, match="holds neither a model"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("sampling", [{"do_sample": True, "temperature": 0.6}, {"top_p": 0.9}])
def test_an_export_ends_where_its_base_did_and_keeps_its_sampling(
    tmp_path: Path, sampling: dict[str, Any]
) -> None:
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=[7, 8], **sampling)
    export_model(model, tokenizer, tmp_path / "model", template_options={"thinking": False})
    found = GenerationConfig.from_pretrained(tmp_path / "model")
    assert set(found.eos_token_id) == {7, 8, tokenizer.eos_token_id, chat_format(tokenizer).end_id}
    assert found.do_sample
    assert {key: getattr(found, key) for key in sampling} == sampling
    assert read_json(tmp_path / "model" / "slimepo.json") == {"template_options": {"thinking": False}}


def test_a_checkpoint_says_what_the_template_was_given(tmp_path: Path) -> None:
    args = PreferenceConfig(output_dir=str(tmp_path), max_steps=1, template_options={"thinking": False})
    PreferenceTrainer(tiny_model(), args, random_rows(4)).save_model()
    assert read_json(tmp_path / "slimepo.json") == {"template_options": {"thinking": False}}


def test_an_export_may_give_up_the_models_weights_for_those_it_loads(tmp_path: Path) -> None:
    model = tiny_model()
    export_model(model, build_tokenizer(), tmp_path / "model", release=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_what_cannot_be_merged_is_known_before_it_trains() -> None:
    model = tiny_model()
    refuse_unmergeable(model)
    model.quantization_method = "gptq"
    with pytest.raises(InputError, match=r"weights are quantised \(gptq\)"):
        refuse_unmergeable(model)
