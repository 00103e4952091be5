"""What is done to a model before it trains."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slimepo.training.prepare import prepared
from tests.tiny import VOCABULARY, tiny_model

# Dropout and router noise by the names that these configurations have for them.
RANDOM: dict[str, dict[str, Any]] = {
    "gpt2": dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, n_embd=16, n_layer=2, n_head=2),
    "opt": dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.5, word_embed_proj_dim=32, ffn_dim=32),
    "bart": dict(
        dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, decoder_layerdrop=0.5, d_model=16, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=16, is_decoder=True, is_encoder_decoder=False,
    ),
    "falcon": dict(new_decoder_architecture=False, hidden_dropout=0.5, attention_dropout=0.5),
    "bloom": dict(hidden_dropout=0.5, attention_dropout=0.5, n_layer=2, n_head=4),
    "gpt_neox": dict(hidden_dropout=0.5, attention_dropout=0.5),
    "phi": dict(resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    "mixtral": dict(attention_dropout=0.5, router_jitter_noise=0.5, num_local_experts=4),
    "persimmon": dict(hidden_dropout=0.5, attention_dropout=0.5),
}  # fmt: skip


@pytest.mark.parametrize("architecture", RANDOM)
def test_nothing_is_drawn_at_random_in_a_training_step(architecture: str) -> None:
    common = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes = common | dict(
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=1, bos_token_id=0, eos_token_id=1
    )
    if architecture in ("bart",):
        sizes = dict(vocab_size=VOCABULARY)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **sizes | RANDOM[architecture])
    )
    ids = torch.arange(2, 30)[None]
    own = model.eval()(input_ids=ids).logits
    assert not torch.allclose(model.train()(input_ids=ids).logits, own, atol=1e-3)
    prepared(model, None, None, disable_dropout=True)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, own)
    torch.testing.assert_close(model.train()(input_ids=ids).logits, own)


def test_a_threshold_of_a_router_that_is_called_noise_stays() -> None:
    model = tiny_model("phimoe", num_local_experts=4, router_jitter_noise=0.3)
    ids = torch.arange(2, 30)[None]
    own = model.eval()(input_ids=ids).logits
    prepared(model, None, None, disable_dropout=True)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, own)
