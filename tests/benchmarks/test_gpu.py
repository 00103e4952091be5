import csv

import pytest
import torch

from benchmarks import gpu
from benchmarks.flops import step_flops
from benchmarks.rows import Lengths


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    assert "skipped: this benchmark needs a CUDA device" in capsys.readouterr().out


def test_the_smoke_run_measures_every_contender(tmp_path, capsys):
    out = tmp_path / "gpu.csv"
    gpu.main(["--smoke", "--model", "gemma-3-4b", "--pairs", "2", "--repeats", "1", "--out", str(out),
              "--attention", "one_by_one", "flex"])  # fmt: skip

    with out.open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*gpu.CONTENDERS, "slimepo shared, one_by_one"}
    kinds = ("shared", "packed", "padded", "shared, one_by_one")
    losses = [float(rows[f"slimepo {kind}"]["loss"]) for kind in kinds]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert float(rows["slimepo shared"]["needed_tflop"]) < float(rows["slimepo packed"]["needed_tflop"])
    with (tmp_path / "head-gpu.csv").open() as file:
        heads = list(csv.DictReader(file))
    assert {row["contender"] for row in heads} == {*gpu.heads()} - {"cut-cross-entropy"}, (
        "that one needs a GPU"
    )
    assert len({round(float(row["mean_logp"]), 4) for row in heads}) == 1
    printed = capsys.readouterr().out
    assert "head at 512 tokens" in printed
    # A path that cannot be measured here says why.
    assert "FlexAttention" in printed


def test_the_flops_of_a_model_small_enough_to_count_by_hand():
    model = {
        "hidden_size": 2,
        "intermediate_size": 3,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "vocab_size": 5,
    }
    # Frozen: 4 projections of 2x2 and 3 of 2x3, 4 FLOPs a weight and token.
    # LoRA of rank 1: 4 * (2+2) + 3 * (2+3) weights, 6 FLOPs each.
    layer = 4 * (4 * 4 + 3 * 6) + 6 * (4 * 4 + 3 * 5)
    # A row of prompt 1 and response 1: keys seen 1 + 2 = 3; two products of width 2, 6 FLOPs each.
    packed = 4 * layer + 2 * 6 * 2 * 5 + 2 * 3 * 2 * 12
    assert step_flops(model, Lengths(1, 1, 1), pairs=1, rank=1, shared=False) == packed
    # Sharing saves one prompt token and its one key.
    assert step_flops(model, Lengths(1, 1, 1), pairs=1, rank=1, shared=True) == packed - layer - 1 * 2 * 12


def test_sizes_are_those_of_the_models_they_are_named_after():
    from transformers import AutoConfig, AutoModelForCausalLM

    parameters = {}
    for name, sizes in gpu.MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
        parameters[name] = sum(p.numel() for p in model.parameters()) / 1e9
    # As published: 3.21 B, 4.02 B, and 3.88 B for Gemma's text part.
    assert parameters == pytest.approx(
        {"llama-3.2-3b": 3.21, "qwen3-4b": 4.02, "gemma-3-4b": 3.88}, rel=0.005
    )
