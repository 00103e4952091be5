"""What is done to a model before it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slimepo.errors import InputError
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.config import PreferenceConfig
from slimepo.training.prepare import prepared
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import VOCABULARY, random_rows, tiny_model

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


def trainer(tmp_path: Path, model: Any, rows: Any = None, **settings: Any) -> PreferenceTrainer:
    values = dict(
        output_dir=str(tmp_path / "run"), learning_rate=1e-2, monitor=False, per_device_train_batch_size=4
    )
    args = PreferenceConfig(**(values | settings))
    return PreferenceTrainer(model=model, args=args, train_dataset=rows or random_rows(12))


def test_rows_with_more_tokens_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"row row \d+ has \d+ tokens and the model 6 positions: give max_length = 6"
    ):
        trainer(tmp_path, tiny_model(max_position_embeddings=6))


def test_a_row_with_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.config._name_or_path = str(tmp_path / "tokenizer")
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    trainer(tmp_path, model, [row] * 4)
    with pytest.raises(InputError, match=r"row dataset:row 1 has the token \d+ and the model \d+ embeddings"):
        trainer(tmp_path, model, [row | {"chosen": "<image_soft_token>"}] * 4)


def test_a_model_object_brings_the_tokenizer_of_its_folder(tmp_path: Path) -> None:
    tiny_model(vocab_size=len(build_tokenizer())).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert trainer(tmp_path, model).processing_class is None
    build_tokenizer().save_pretrained(tmp_path / "model")
    texts = [{"prompt": f"say {i}", "chosen": "a b", "rejected": "c"} for i in range(4)]
    made = trainer(tmp_path, model, texts)
    assert made.processing_class.get_vocab() == build_tokenizer().get_vocab()


def test_no_step_is_taken_where_none_is_asked_for_or_left(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny_model(), max_steps=0)
    before = [p.clone() for p in made.model.parameters()]
    made.train()
    assert made.state.global_step == 0
    assert all(map(torch.equal, before, made.model.parameters()))
    for settings in (dict(max_steps=2), dict(num_train_epochs=1)):
        done = trainer(tmp_path, tiny_model(), save_steps=1, **settings)
        done.train()
        resumed = trainer(tmp_path, tiny_model(), save_steps=1, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == done.state.global_step
        assert all(map(torch.equal, done.model.parameters(), resumed.model.parameters()))


def test_a_generation_config_that_transformers_would_not_save_is_mended_before_training(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.6
    trainer(tmp_path, model).save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.do_sample
