"""Tiny models and rows."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slimepo.data.rows import Row

VOCABULARY = 61


def tiny_model(
    architecture: str = "llama", *, tied: bool = False, seed: int = 0, **sizes: object
) -> PreTrainedModel:
    """A two-layer model of an architecture with random weights."""
    torch.manual_seed(seed)
    values: dict[str, object] = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    config = AutoConfig.for_model(architecture, **(values | sizes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Pairs of unequal lengths."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return random.integers(2, VOCABULARY, random.integers(low, high)).astype(np.int32)

    return [Row(ids(2, 9), (ids(1, 12), ids(1, 12)), id=f"row {i}") for i in range(count)]
