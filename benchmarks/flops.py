"""Floating-point operations that a step needs: what a perfect implementation would still have to compute."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import Lengths

# A product costs 2 FLOPs a weight and token; its backward pass once more for the input and once for the weight.
_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT = 2, 2, 2
_FROZEN = _FORWARD + _INPUT_GRADIENT
_TRAINED = _FROZEN + _WEIGHT_GRADIENT


def step_flops(model: dict[str, Any], lengths: Lengths, pairs: int, rank: int | None, shared: bool) -> float:
    """FLOPs of forward and backward of `pairs` equal pairs, with LoRA of `rank` on every projection and a trained head.

    Without a rank all weights train. `shared`: the prompt is computed once a pair. The head counts for response tokens
    alone; recomputation, the embedding look-up, norms and activations count nothing.
    """
    rows = [lengths.prompt + lengths.chosen, lengths.prompt + lengths.rejected]
    tokens = sum(rows) - (lengths.prompt if shared else 0)
    products = _projections(model)
    weights = sum(inputs * outputs for inputs, outputs in products)
    adapters = sum((rank or 0) * (inputs + outputs) for inputs, outputs in products)
    a_weight = _TRAINED if rank is None else _FROZEN
    layers = tokens * model["num_hidden_layers"] * (a_weight * weights + _TRAINED * adapters)
    head = (lengths.chosen + lengths.rejected) * _TRAINED * model["hidden_size"] * model["vocab_size"]
    return float(pairs * (layers + head + _attention(model, lengths, rows, shared)))


def _projections(model: dict[str, Any]) -> list[tuple[int, int]]:
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    queries = model["num_attention_heads"] * model["head_dim"]
    keys = model["num_key_value_heads"] * model["head_dim"]
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def _attention(model: dict[str, Any], lengths: Lengths, rows: list[int], shared: bool) -> float:
    """Scores and weighted values; neither factor is a weight, so the backward pass costs twice the forward one."""
    width = model["num_attention_heads"] * model["head_dim"]
    window = model.get("sliding_window")
    total = 0.0
    for layer in range(model["num_hidden_layers"]):
        # Gemma 3: every sixth layer sees all.
        seen = None if window is None or (layer + 1) % 6 == 0 else window
        keys = sum(_keys(row, seen) for row in rows) - (_keys(lengths.prompt, seen) if shared else 0)
        total += keys * width * 2 * _TRAINED
    return total


def _keys(row: int, window: int | None) -> int:
    """Keys that the queries of a causal row see, summed."""
    if window is None or row <= window:
        return row * (row + 1) // 2
    return window * (window + 1) // 2 + (row - window) * window
