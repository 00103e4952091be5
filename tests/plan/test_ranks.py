"""What one of several devices holds, reckoned by hand for a tiny model."""

import pytest
from torch import nn

from slimepo.model.adapters import add_adapter, lora_config
from slimepo.plan.ranks import Sizes, on_a_rank, sizes_of
from tests.tiny import tiny_model

ALONE = {"weights": 1000, "gradients": 400, "optimizer": 800, "activations": 70, "head": 30}
# 250 float32 weights of which 100 train: 20 of a layer's 50, and 40 of the ends' 60.
SIZES = Sizes(weights=1000, layer=200, ends=240, trained=100, trained_in_layer=20, trained_in_ends=40)


def test_one_device_holds_all() -> None:
    assert on_a_rank(ALONE, SIZES, "ddp", 1) == (ALONE, 0)


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer", "whole"),
    [
        # Gradients a second time, in buckets.
        ("ddp", 1000, 800, 800, 0),
        # A quarter of the gradients and a bucket of all; of AdamW's moments and a float32 master.
        ("zero2", 1000, 100 + 400, 300, 0),
        ("zero2-offload", 1000, 400, 0, 0),
        # A quarter, two layers and the ends; a quarter and the ends' before they are shared out.
        ("fsdp2", 250 + 640, 100 + 160, 200, 250 + 200 + 1000),
        ("zero3", 250 + 640, 100 + 160, 200, 250 + 200 + 1000),
        ("fsdp2-offload", 640, 160, 0, 1000),
    ],
)
def test_four_devices(engine: str, weights: int, gradients: int, optimizer: int, whole: int) -> None:
    parts, look = on_a_rank(ALONE, SIZES, engine, 4)
    assert parts == ALONE | {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    assert look == whole


def test_a_second_model_is_whole_on_each() -> None:
    parts, look = on_a_rank(ALONE | {"weights": 1500}, SIZES, "fsdp2", 4)
    assert parts["weights"] == 500 + 250 + 640
    assert look == 500 + 250 + 200 + 1000


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_modules(tied: bool) -> None:
    model = tiny_model(tied=tied)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    ends = 61 * 32 * (1 if tied else 2)
    total = sum(p.numel() for p in model.parameters())
    assert sizes_of(model) == Sizes(4 * total, 4 * layer, 4 * ends, total, layer, ends)


def test_of_an_adapter_few_train() -> None:
    model: nn.Module = add_adapter(tiny_model(), lora_config(r=2, train_head=False))
    sizes = sizes_of(model)
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.trained_in_ends == 0
    assert 2 * sizes.trained_in_layer == sizes.trained
