"""The layout is tried out on the model; all of them train alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slimepo.data.batch import StepCollator
from slimepo.data.packing import first_fit_decreasing
from slimepo.errors import InputError
from slimepo.model.logps import install_logps
from slimepo.model.tryout import choose_layout, probe
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import VOCABULARY, random_rows, tiny_model


def mamba() -> Any:
    """A model that holds state along the row."""
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2, conv_kernel=3
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "mistral"])
def test_auto_takes_shared_rows_where_they_give_the_same_log_probs(architecture: str) -> None:
    model = tiny_model(architecture, sliding_window=4)
    install_logps(model)
    assert choose_layout(model, "auto")[0] == "shared"
    assert choose_layout(model, "auto", positions=(0,))[0] == "packed"


def test_a_model_with_state_along_the_row_stays_with_padded_rows_and_says_so() -> None:
    model = mamba()
    install_logps(model)
    layout, reason = choose_layout(model, "auto")
    assert layout == "padded"
    assert "MambaForCausalLM cannot take shared rows" in reason
    with pytest.raises(InputError, match="MambaForCausalLM cannot take layout 'packed'"):
        choose_layout(model, "packed")


def test_an_unknown_layout_is_named() -> None:
    model = tiny_model()
    install_logps(model)
    with pytest.raises(
        InputError, match="layout = 'dense' is unknown: give one of auto, padded, packed, shared"
    ):
        choose_layout(model, "dense")


def trajectory(tmp_path: Path, layout: str, steps: int = 50, **options: Any) -> list[float]:
    args = PreferenceConfig(
        output_dir=str(tmp_path), learning_rate=1e-3, max_steps=steps, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=4, gradient_accumulation_steps=2, layout=layout, **options,
    )  # fmt: skip
    trainer = PreferenceTrainer(model=tiny_model("qwen3"), args=args, train_dataset=random_rows(40))
    trainer.train()
    assert trainer.layout == layout
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_fifty_steps_take_the_same_losses_in_every_layout(tmp_path: Path) -> None:
    padded = trajectory(tmp_path, "padded")
    assert len(padded) == 50
    # It learns: fifty steps of a model that stands still would agree too.
    assert sum(padded[-10:]) < 0.9 * sum(padded[:10])
    for layout in ("packed", "shared"):
        assert trajectory(tmp_path, layout) == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_token_budget_bounds_every_micro_batch_and_changes_no_loss(tmp_path: Path, layout: Any) -> None:
    rows = random_rows(30)
    batches = StepCollator(1, layout=layout, max_tokens=90)(rows)["batches"]
    assert sorted(i for b in batches for i in b["row_ids"]) == sorted(r.id for r in rows)
    assert all(b["input_ids"].numel() <= 90 for b in batches)
    free = trajectory(tmp_path, layout, 4)
    assert trajectory(tmp_path, layout, 4, max_tokens_per_batch=60) == pytest.approx(free, rel=1e-5)


def test_first_fit_decreasing_by_hand() -> None:
    assert first_fit_decreasing([3, 7, 5, 2, 12], 10) == [[4], [1, 0], [2, 3]]
    sizes = [len(b) for b in first_fit_decreasing([1] * 100, 10)]
    assert sizes == [10] * 10


def test_a_packed_row_has_no_padding() -> None:
    (batch,) = StepCollator(100, layout="shared", max_tokens=10_000)(random_rows(50))["batches"]
    assert batch["real_tokens"] == batch["input_ids"].numel()


def gpt_oss() -> Any:
    """Its attention has learned sinks, and every other layer a window."""
    model = tiny_model("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(0, 3)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (gpt_oss, "its attention takes s_aux"),
        # Its window is in the mask alone, and longer than a short probe.
        (lambda: tiny_model("phimoe", num_local_experts=4, sliding_window=40), "log-probs differ"),
    ],
)
def test_a_model_whose_attention_needs_more_than_ours_gives_keeps_its_own(model: Any, words: str) -> None:
    made = model()
    ids = torch.arange(60)[None] % VOCABULARY
    own = made.eval()(input_ids=ids).logits
    install_logps(made)
    layout, reason = choose_layout(made, "auto")
    assert layout == "padded"
    assert words in reason
    assert torch.equal(made.eval()(input_ids=ids).logits, own)
    with pytest.raises(InputError, match=words):
        choose_layout(made, "shared")


def test_a_window_longer_than_any_row_is_not_probed() -> None:
    model = tiny_model("mistral", sliding_window=40)
    assert len(probe(model, 2048)) == 3
    assert len(probe(model, 40)) == 2


def test_a_model_that_cannot_be_asked_for_hidden_states_is_refused() -> None:
    model = tiny_model("llama4_text", num_local_experts=2, intermediate_size_mlp=48)
    install_logps(model)
    with pytest.raises(InputError, match="Llama4ForCausalLM cannot be trained here"):
        choose_layout(model, "auto")
