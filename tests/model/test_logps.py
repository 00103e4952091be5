"""Log-probs of response tokens against a plain log_softmax over everything, per architecture and head."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from slimepo.data.batch import StepCollator, collate
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.kernels import chunked
from slimepo.model import logps
from slimepo.model.adapters import add_adapter, lora_config
from slimepo.model.logps import install_logps, policy_logps, response_logps
from slimepo.model.tryout import choose_layout
from tests.tiny import random_rows, tiny_model

ARCHITECTURES = [
    ("llama", {}),
    ("qwen3", {}),
    ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ("gemma2", {"final_logit_softcapping": 1.5, "sliding_window": 4}),
    ("mistral", {"sliding_window": 4}),
    ("cohere", {"logit_scale": 0.2}),
    ("granite", {"logits_scaling": 3.0}),
]


def plain_logps(model: nn.Module, row: Row, position: int) -> Tensor:
    """One row at a time, no padding, all logits."""
    response = torch.tensor(row.responses[position]).long()
    ids = torch.cat([torch.tensor(row.prompt_ids).long(), response])[None]
    logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    start = len(row.prompt_ids)
    return logps[torch.arange(start - 1, start - 1 + len(response)), response]


@pytest.mark.parametrize(("architecture", "sizes"), ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_equal_to_log_softmax_over_the_whole_sequence(
    architecture: str, sizes: dict[str, object], tied: bool
) -> None:
    model = tiny_model(architecture, tied=tied, **sizes).double().eval()
    pairs = random_rows(5)
    install_logps(model)
    assert choose_layout(model, "padded") == ("padded", "as asked")
    ours = policy_logps(model, collate(pairs))
    for i, pair in enumerate(pairs):
        for values, mask, side in (
            (ours.chosen, ours.chosen_mask, 0),
            (ours.rejected, ours.rejected_mask, 1),
        ):
            # Attention with a soft cap runs eagerly, and transformers takes its softmax in float32.
            close = 1e-7 if architecture == "gemma2" else 1e-9
            torch.testing.assert_close(
                values[i][mask[i]], plain_logps(model, pair, side), rtol=close, atol=close
            )


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_group_of_four_responses_is_laid_out_as_pairs_are(layout: Any) -> None:
    """One of them is not there in the first row, and the second row has three alone."""
    model, random = tiny_model().double().eval(), np.random.default_rng(0)
    install_logps(model)
    assert choose_layout(model, layout)[0] == layout

    def ids(count: int) -> np.ndarray:
        return random.integers(2, 61, count).astype(np.int32)

    rows = [
        Row(ids(5), (ids(3), ids(0), ids(7), ids(1)), id="a"),
        Row(ids(2), (ids(4), ids(1), ids(2)), id="b"),
    ]
    batch = StepCollator(2, (0, 1, 2, 3), layout=layout).batch(rows)
    if layout == "shared":
        assert batch["real_tokens"] == 5 + 11 + 2 + 7, "each prompt once"
    flat = response_logps(model, batch)
    parts = iter(flat.split([n for of_position in batch["response_tokens"] for n in of_position]))
    for position in range(4):
        for row in rows:
            if len(row.response(position)):
                torch.testing.assert_close(
                    next(parts), plain_logps(model, row, position), rtol=1e-9, atol=1e-9
                )
            else:
                assert len(next(parts)) == 0


@pytest.mark.parametrize("train_head", [True, False])
def test_with_an_adapter_and_with_it_switched_off(train_head: bool) -> None:
    base = tiny_model(tied=True)
    reference = copy.deepcopy(base).double().eval()
    model = add_adapter(base, lora_config(r=4, train_head=train_head)).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    install_logps(model)
    pairs = random_rows(3)
    ours = policy_logps(model, collate(pairs))
    torch.testing.assert_close(ours.chosen[0][ours.chosen_mask[0]], plain_logps(model, pairs[0], 0))
    with model.disable_adapter():
        off = policy_logps(model, collate(pairs))
    torch.testing.assert_close(off.chosen[0][off.chosen_mask[0]], plain_logps(reference, pairs[0], 0))
    assert not torch.allclose(off.chosen, ours.chosen)


def test_a_model_with_eyes_trains_its_text_part_alone() -> None:
    text = tiny_model("gemma3_text").config.to_dict() | {"sliding_window": 4}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
    model = add_adapter(Gemma3ForConditionalGeneration(config), lora_config(r=2)).double().train()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "vision" in n]
    install_logps(model)
    pairs = random_rows(2)
    ours = policy_logps(model, collate(pairs))
    ours.chosen.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(ours.chosen[0][ours.chosen_mask[0]], plain_logps(model, pairs[0], 0))


def test_a_head_with_an_adapter_of_its_own_projects_by_itself() -> None:
    config = lora_config(r=4, target_modules=["q_proj", "lm_head"], train_head=False)
    model = add_adapter(tiny_model(), config).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    install_logps(model)
    pairs = random_rows(2)
    ours = policy_logps(model, collate(pairs))
    torch.testing.assert_close(ours.rejected[1][ours.rejected_mask[1]], plain_logps(model, pairs[1], 1))


def test_generation_and_deep_copies_are_not_disturbed() -> None:
    model = tiny_model().eval()
    prompt = torch.tensor([[3, 4, 5]])
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    install_logps(model)
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).tolist() == before.tolist()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    batch = collate(random_rows(2))
    assert torch.allclose(
        policy_logps(twin, batch).chosen.sum(), -batch_tokens(batch) * torch.log(torch.tensor(61.0))
    )
    assert not torch.allclose(policy_logps(model, batch).chosen, policy_logps(twin, batch).chosen)


def batch_tokens(batch: dict[str, object]) -> int:
    return sum(batch["response_tokens"][0])  # type: ignore[index]


def test_experts_keep_no_router_logits_and_their_config_stays() -> None:
    model = tiny_model(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=True
    )
    install_logps(model)
    kept: list[Any] = []
    model.base_model.register_forward_hook(lambda _, __, output: kept.append(output.get("router_logits")))
    batch = collate(random_rows(2))
    plain = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    install_logps(plain)
    torch.testing.assert_close(response_logps(model, batch), response_logps(plain, batch))
    assert kept == [None]
    assert model.config.output_router_logits


def test_a_head_that_is_not_understood_is_refused() -> None:
    model = tiny_model()
    forward = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = forward(self, *args, **kwargs)
            output.logits = 3 * output.logits
            return output

    model.__class__ = Odd
    install_logps(model)
    with pytest.raises(InputError, match="differs from its own logits"):
        choose_layout(model, "padded")


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(InputError, match="not a transformers causal language model"):
        install_logps(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "adapter", [dict(train_head=True), dict(target_modules=["lm_head"], train_head=False)]
)
def test_without_gradients_a_trained_head_keeps_no_logits(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = add_adapter(tiny_model(), lora_config(r=2, **adapter))
    install_logps(model)
    monkeypatch.setattr(logps, "_ROWS_AT_ONCE", 3)
    kept: list[int] = []
    gather, keeper = logps.gather_logps, chunked.KeptLogits
    monkeypatch.setattr(logps, "gather_logps", lambda table, at: kept.append(len(table)) or gather(table, at))
    monkeypatch.setattr(chunked, "KeptLogits", lambda most: kept.append(most) or keeper(most))
    batch = collate(random_rows(4))
    with torch.no_grad():
        alone = response_logps(model, batch)
    torch.testing.assert_close(alone, response_logps(model, batch).detach())
    assert max(kept[:-1]) <= 3 < kept[-1]
