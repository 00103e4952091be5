"""Models from sizes, shrunk for a smoke run, and checked against the tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from slimepo.data.chat import load_tokenizer
from slimepo.errors import BadFilesError, InputError
from slimepo.model.load import (
    ARCHITECTURES,
    check_embeddings,
    load_model,
    random_config,
    random_model,
    smoke_config,
)
from slimepo.playground.tokenizer import build_tokenizer
from tests.tiny import tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_model_is_the_same_for_the_same_seed(architecture: str) -> None:
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    config = random_config(architecture, sizes | {"num_key_value_heads": 1}, build_tokenizer())
    one, two, other = random_model(config, 1), random_model(config, 1), random_model(config, 2)
    assert torch.equal(one.get_input_embeddings().weight, two.get_input_embeddings().weight)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert one.config.vocab_size == len(build_tokenizer())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_smoke_model_is_tiny_and_keeps_the_architecture(architecture: str) -> None:
    big = AutoConfig.for_model(ARCHITECTURES[architecture], vocab_size=100, sliding_window=512)
    small = smoke_config(big)
    assert small.model_type == big.model_type
    model = random_model(small, 0)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    ids = torch.arange(90)[None]
    assert model(input_ids=ids).logits.shape == (1, 90, 100)
    if architecture == "gemma3":
        assert len(set(small.layer_types)) == 2
        assert small.sliding_window < 90


def test_unknown_sizes_and_architectures_are_named() -> None:
    with pytest.raises(InputError, match=r"no size 'hiden_size'.*hidden_size"):
        random_config("llama", {"hiden_size": 3}, build_tokenizer())
    with pytest.raises(InputError, match="unknown architecture 'gpt9'; give one of llama, qwen3, gemma3"):
        random_config("gpt9", {}, build_tokenizer())


def test_new_special_tokens_must_fit_the_embedding() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(InputError, match=r"tokenizer has id .* but the model has 61 embeddings"):
        check_embeddings(tiny_model(), tokenizer)
    check_embeddings(tiny_model(vocab_size=len(tokenizer)), tokenizer)


def test_a_special_token_for_pictures_needs_no_embedding() -> None:
    # As Gemma 3's models of 270M and 1B parameters are published.
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    check_embeddings(model, tokenizer)
    tokenizer.pad_token = "<image_soft_token>"
    with pytest.raises(InputError, match=r"tokenizer has id .*<image_soft_token>"):
        check_embeddings(model, tokenizer)


def test_a_folder_of_another_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for read in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"no file or folder .*modle \(did you mean 'model'\?\)"):
            read(str(tmp_path / "modle"))


def test_a_model_that_cannot_be_loaded_is_one_line() -> None:
    with pytest.raises(InputError, match="model 'no/where' cannot be loaded") as error:
        load_model("no/where")
    assert "\n" not in str(error.value)


class TestWeightsThatAreNotTheConfigs:
    """Nothing trains from the random numbers that transformers puts where a checkpoint has no weights."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], dict[str, Any]]], str]:
        tiny_model(tied=True).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"

        def change(how: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
            save_file(how(load_file(file)), file, {"format": "pt"})
            return str(tmp_path)

        return change

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            (lambda w: {f"other.{k}": v for k, v in w.items()}, "lack 21 tensors"),
            (lambda w: {k: v for k, v in w.items() if "layers.1." not in k}, "lack 9 tensors, model.layers.1."),
            (lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}, "lack 1 tensors, model.norm.weight"),
            (lambda w: w | {"model.layers.2.up.weight": w["model.norm.weight"].clone()}, "also hold 1 tensors"),
            (lambda w: w | {"model.norm.weight": w["model.norm.weight"][:3].clone()}, "cannot be loaded"),
        ],
        ids=["prefix", "layer", "tensor", "more", "shape"],
    )  # fmt: skip
    def test_are_refused_by_name(self, saved: Any, how: Any, words: str) -> None:
        folder = saved(how)
        with pytest.raises(BadFilesError, match="model ") as caught:
            load_model(folder)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_what_lies_beside_the_language_model_is_no_fault(self, saved: Any) -> None:
        load_model(saved(lambda w: w | {"vision_tower.patch.weight": w["model.norm.weight"].clone()}))

    @pytest.mark.parametrize(
        "name", ["transformer.h.0.attn.attention.masked_bias", "transformer.h.0.attn.bias"]
    )
    def test_nor_are_the_masks_that_older_versions_saved(self, saved: Any, name: str) -> None:
        load_model(saved(lambda w: w | {name: w["model.norm.weight"].clone()}))

    def test_damaged_files_are_one_line(self, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
        with pytest.raises(BadFilesError, match="cannot be loaded"):
            load_model(str(tmp_path))
