"""Fewer bits and fewer weights: levels, scales and zeros by hand, and which weights are meant."""

import pytest
import torch
from transformers import PreTrainedModel

from slimepo.errors import InputError
from slimepo.model.compress import Compression, check_compression, compress, layer_matrices, pruned, rounded
from tests.tiny import tiny_model


def test_the_smallest_weights_become_0_and_no_others() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0], [-0.2, 0.3, 1.0]])
    assert pruned(weight, 0.5).tolist() == [[0, -3.0, 2.0], [0, 0, 1.0]]
    assert torch.equal(pruned(weight, 0.0), weight)
    equal = torch.ones(3, 4)
    assert (pruned(equal, 0.25) == 0).sum() == 3, "as many as asked for where all are alike"


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_levels_are_even_about_0_and_the_largest_weight_stays(bits: int) -> None:
    weight = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, bits)
    for part, of in zip(found.split(64, dim=-1), weight.split(64, dim=-1), strict=True):
        scale = of.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
        steps = part / scale
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert ((part - of).abs() <= scale / 2 * (1 + 1e-5)).all()
        assert torch.allclose(part.abs().amax(dim=-1), of.abs().amax(dim=-1))
    assert torch.allclose(rounded(found, bits), found, atol=1e-6), "what is rounded stays"


def test_zeros_stay_zeros() -> None:
    weight = pruned(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), 0.5)
    assert torch.equal(rounded(weight, 3)[weight == 0], torch.zeros(128))
    assert torch.equal(rounded(torch.zeros(2, 3), 4), torch.zeros(2, 3))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_matrices_of_the_layers_are_meant(architecture: str) -> None:
    model: PreTrainedModel = tiny_model(architecture, tied=True)
    names = set(layer_matrices(model))
    kept = {name for name, _ in model.named_parameters()} - names
    assert all("proj" in name or "attn" in name or "mlp" in name for name in names)
    assert all("embed" in name or "norm" in name or "ln_" in name or "bias" in name or "wte" in name or "wpe" in name
               for name in kept)  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    count = compress(model, Compression(bits=8))
    assert count == sum(before[name].numel() for name in names)
    assert {
        name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])
    } == names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Compression(bits=2), "--bits 2: give one of 8, 4, 3"),
        (Compression(prune=-0.1), "--prune -0.1: give the share"),
        (Compression(prune=1.0), "--prune 1: give the share"),
    ],
)
def test_what_cannot_be_is_refused(wrong: Compression, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_compression(wrong)
