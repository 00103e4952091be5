"""A model with an adapter is what it computes: it trains on, or is merged, and comes back as what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from slimepo.errors import InputError
from slimepo.model.adapters import PROJECTIONS, merge, with_adapter
from slimepo.model.load import load_model
from slimepo.pipeline.export import export_model, probe_logits
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model

TARGETS = ["q_proj", "v_proj"]
KINDS: dict[str, Any] = {
    "LoRA": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "with a trained head": {"modules_to_save": ["lm_head"]},
    "with a trained embedding": {"modules_to_save": ["embed_tokens"]},
    "with both, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "on both, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "with trained tokens": {"trainable_token_indices": [3, 4]},
    "on every layer": {"target_modules": "all-linear"},
    "on what peft chooses": {"target_modules": None},
}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "target_modules": TARGETS} | settings))


def trainer(tmp_path: Path, model: Any, peft_config: Any = None, **settings: Any) -> PreferenceTrainer:
    args = PreferenceConfig(
        output_dir=str(tmp_path / "run"), learning_rate=1e-2, max_steps=2, save_strategy="no",
        per_device_train_batch_size=8, monitor=False, report_to="none", **settings,
    )  # fmt: skip
    return PreferenceTrainer(model=model, args=args, train_dataset=random_rows(8), peft_config=peft_config)


def saved_base(tmp_path: Path, **sizes: Any) -> str:
    tiny_model(**sizes).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def sft_adapter(base: str, **settings: Any) -> PeftModel:
    """An adapter that makes a difference, as one that was trained before."""
    torch.manual_seed(1)
    return get_peft_model(load_model(base), lora(init_lora_weights=False, **settings))


def off(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_and_exported_is_what_was_trained(tmp_path: Path, kind: str) -> None:
    base = saved_base(tmp_path, tied=True)
    made = trainer(tmp_path, load_model(base), lora(**KINDS[kind]))
    start = probe_logits(made.model)
    assert off(start, probe_logits(load_model(base))) < 1e-4
    made.train()
    trained = probe_logits(made.model)
    assert off(trained, start) > 1e-3
    made.save_model(str(tmp_path / "adapter"))
    assert off(probe_logits(load_model(str(tmp_path / "adapter"))), trained) < 1e-4
    export_model(made.model, build_tokenizer(), tmp_path / "model")
    assert off(probe_logits(load_model(str(tmp_path / "model"))), trained) < 1e-4


@pytest.mark.parametrize(
    "kind", ["LoRA", "DoRA", "with a trained head", "on the embedding", "with trained tokens"]
)
def test_an_adapters_folder_trains_on_from_what_it_computes(tmp_path: Path, kind: str) -> None:
    base = saved_base(tmp_path, tied=True)
    before = sft_adapter(base, **KINDS[kind])
    before.save_pretrained(tmp_path / "sft")
    made = trainer(tmp_path, load_model(str(tmp_path / "sft")), loss="dpo")
    assert off(probe_logits(made.model), probe_logits(before)) == 0
    # DPO's reference is what training starts from, adapter and all.
    assert made.reference is not None
    assert made.reference.source == "cache"
    made.train()
    trained = probe_logits(made.model)
    made.save_model(str(tmp_path / "adapter"))
    assert off(probe_logits(load_model(str(tmp_path / "adapter"))), trained) < 1e-5
    export_model(made.model, build_tokenizer(), tmp_path / "model")
    assert off(probe_logits(load_model(str(tmp_path / "model"))), trained) < 1e-4


def test_a_new_adapter_upon_another_has_to_be_asked_for(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    with pytest.raises(InputError, match=r"has an adapter already.*adapter = 'merge'"):
        trainer(tmp_path, sft_adapter(base), lora())
    with pytest.raises(InputError, match="has an adapter already"):
        trainer(tmp_path, sft_adapter(base), lora(), adapter="continue")
    before = probe_logits(sft_adapter(base))
    made = trainer(tmp_path, sft_adapter(base), lora(target_modules=["k_proj"]), adapter="merge")
    assert off(probe_logits(made.model), before) < 1e-5
    trains = {name.split(".")[-4] for name, p in made.model.named_parameters() if p.requires_grad}
    assert trains == {"k_proj"}
    with pytest.raises(InputError, match="adapter = 'merge', but the model has no adapter"):
        trainer(tmp_path, load_model(base), lora(), adapter="merge")
    with pytest.raises(InputError, match="adapter = 'keep' is unknown"):
        with_adapter(load_model(base), wanted="keep")


def test_merging_keeps_active_adapters_with_their_scale_and_leaves_out_what_is_off(tmp_path: Path) -> None:
    base = saved_base(tmp_path)

    def several() -> PeftModel:
        model = sft_adapter(base)
        model.add_adapter("other", lora(init_lora_weights=False, target_modules=["o_proj"]))
        model.base_model.set_adapter(["default", "other"])
        return model

    model = several()
    with pytest.raises(InputError, match="2 adapters are on at once"):
        with_adapter(model)
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.5)
    both = probe_logits(model)
    assert off(probe_logits(merge(model)), both) < 1e-5
    model = several()
    model.set_adapter("other")
    alone = probe_logits(model)
    assert off(alone, both) > 1e-3
    assert off(probe_logits(merge(with_adapter(model))), alone) < 1e-5
    model = several()
    model.base_model.disable_adapter_layers()
    assert off(probe_logits(merge(model)), probe_logits(load_model(base))) == 0


def test_an_adapter_that_would_not_train_or_not_be_saved_as_it_is_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    sft_adapter(base).save_pretrained(tmp_path / "sft")
    with pytest.raises(InputError, match=r"no parameter of the model trains.*is_trainable=True"):
        trainer(tmp_path, PeftModel.from_pretrained(load_model(base), str(tmp_path / "sft")))
    scaled, disabled, merged = sft_adapter(base), sft_adapter(base), sft_adapter(base)
    for layer in scaled.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.5)
    disabled.base_model.disable_adapter_layers()
    merged.merge_adapter()
    for model, words in ((scaled, "scaled by 0.5"), (disabled, "switched off"), (merged, "unmerge_adapter")):
        with pytest.raises(InputError, match=words):
            with_adapter(model)
    beside = load_model(base)
    beside._hf_peft_config_loaded = True  # type: ignore[assignment]
    with pytest.raises(InputError, match="loaded by transformers"):
        with_adapter(beside)


def test_a_target_that_no_module_is_called_is_refused_unless_it_is_of_our_own_list() -> None:
    words = r"target_modules: no module of LlamaForCausalLM is called 'q_prj' \(did you mean 'q_proj'\?\)"
    with pytest.raises(InputError, match=words):
        with_adapter(tiny_model(), lora(target_modules=["q_prj", "v_proj"]))
    with_adapter(tiny_model(), lora(target_modules=["layers.0.self_attn.q_proj", "v_proj"]))
    # OPT has q, k and v of them.
    with_adapter(
        tiny_model("opt", ffn_dim=32, word_embed_proj_dim=32), lora(target_modules=list(PROJECTIONS))
    )


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_that_are_no_change_of_weights_are_refused(tmp_path: Path, kind: Any) -> None:
    config = kind(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="_TUNING are not supported"):
        with_adapter(tiny_model(), config)
    get_peft_model(load_model(saved_base(tmp_path)), config).save_pretrained(tmp_path / "prompts")
    with pytest.raises(InputError, match="_TUNING are not supported"):
        load_model(str(tmp_path / "prompts"))


def test_another_kind_of_adapter_trains_and_is_exported(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    made = trainer(tmp_path, load_model(saved_base(tmp_path)), config, loss="dpo")
    assert made.reference is not None
    assert made.reference.source == "adapters-off"
    made.train()
    trained = probe_logits(made.model)
    export_model(made.model, build_tokenizer(), tmp_path / "model")
    assert off(probe_logits(load_model(str(tmp_path / "model"))), trained) < 1e-4


def test_an_adapter_whose_weights_are_not_its_configs_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sft_adapter(saved_base(tmp_path)).save_pretrained(tmp_path / "sft")
    file = tmp_path / "sft" / "adapter_model.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != first}, file)
    with pytest.raises(InputError, match=r"sft': its weights lack 1 tensors.*adapter_config"):
        load_model(str(tmp_path / "sft"))
    save_file(weights | {first.replace("q_proj", "o_proj"): weights[first].clone()}, file)
    with pytest.raises(InputError, match="its weights also hold 1 tensors"):
        load_model(str(tmp_path / "sft"))
    file.unlink()
    with pytest.raises(InputError, match=r"adapter .*sft' does not fit"):
        load_model(str(tmp_path / "sft"))


def test_an_adapter_of_a_resized_model_comes_back_with_its_embeddings(tmp_path: Path) -> None:
    model: nn.Module = load_model(saved_base(tmp_path))
    model.resize_token_embeddings(70)  # type: ignore[operator]
    made = trainer(tmp_path, model, lora(modules_to_save=["lm_head"]))
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    assert off(probe_logits(load_model(str(tmp_path / "adapter"))), probe_logits(made.model)) < 1e-5


def test_the_place_of_a_trained_adapter_beside_the_default_one_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = sft_adapter(saved_base(tmp_path))
    made = trainer(tmp_path, model)
    made.save_model(str(tmp_path / "alone"))
    assert "is the adapter 'default'" not in caplog.text
    model.add_adapter("other", lora(init_lora_weights=False))
    model.set_adapter("other")
    made.save_model(str(tmp_path / "saved"))
    assert f"the one that was trained is {tmp_path / 'saved' / 'other'}" in caplog.text
    assert (tmp_path / "saved" / "other" / "adapter_config.json").exists()
