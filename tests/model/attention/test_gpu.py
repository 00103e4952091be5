"""Every attention path on a CUDA device: against padded rows, and the choice between them. Skips itself without one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slimepo.data.batch import Batch, collate, collate_packed, to_device
from slimepo.model.attention import flex as attention_flex
from slimepo.model.attention.choose import attention_shape, choose_attention, fastest
from slimepo.model.attention.interface import attend_along, install
from slimepo.model.attention.sdpa import side_by_side
from slimepo.model.attention.table import PATHS
from slimepo.model.logps import install_logps, policy_logps
from tests.model.attention.cases import call_of, leaves, packing_of, with_gradients
from tests.tiny import random_rows, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WINDOW = {"sliding_window": 5}
ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {}),
    ("gemma3_text", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    ("mistral", WINDOW),
    ("gemma2", WINDOW | {"attn_logit_softcapping": 2.0}),
]


def logps_and_gradients(model: Any, batch: Batch, autocast: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logps = policy_logps(model, to_device(batch, torch.device("cuda")))
    (logps.chosen.sum() - 0.7 * logps.rejected.square().sum()).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [logps.chosen.detach(), logps.rejected.detach(), *gradients]


def errors(ours: list[Tensor], truth: list[Tensor]) -> Tensor:
    return torch.stack([(a - b).norm() / b.norm().clamp(min=1e-6) for a, b in zip(ours, truth, strict=True)])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("path", ["side_by_side", "flex", "varlen"])
@pytest.mark.parametrize(("architecture", "sizes"), ARCHITECTURES)
def test_a_path_is_as_close_to_float32_as_padded_rows_are(
    architecture: str, sizes: dict[str, Any], path: str, shared: bool
) -> None:
    sizes = sizes | {"head_dim": 64, "hidden_size": 128}
    model: Any = tiny_model(architecture, **sizes).cuda().train()
    install_logps(model)
    pairs = random_rows(24)
    truth = logps_and_gradients(model, collate(pairs), autocast=False)
    padded = errors(logps_and_gradients(model, collate(pairs), autocast=True), truth)
    call = call_of(packing_of([(3, 4, 5)]), dtype=torch.bfloat16, softcap=sizes.get("attn_logit_softcapping"))
    states = {name: getattr(call, name).cuda() for name in ("query", "key", "value")}
    obstacle = PATHS[path].obstacle
    reason = obstacle and obstacle(call._replace(**states))
    if reason is not None:
        pytest.skip(reason)
    install(model, path)
    ours = errors(logps_and_gradients(model, collate_packed(pairs, shared=shared), autocast=True), truth)
    assert (ours <= 2 * padded + 5e-3).all()


@pytest.mark.parametrize("path", ["flex", "varlen"])
@pytest.mark.parametrize("window", [None, 33])
def test_rows_of_many_lengths(path: str, window: int | None) -> None:
    for tokens in (10, 300, 1000, 700, 2500):
        packing = packing_of([(tokens, 50, tokens // 2), (7, 129, 64)])
        packing |= {
            name: packing[name].cuda()
            for name in ("position_ids", "gather", "scatter", "parts", "keys", "cu_seqlens")
        }
        call = call_of(packing, dtype=torch.bfloat16, window=window)
        states = {name: getattr(call, name).cuda() for name in ("query", "key", "value")}
        call = leaves(call._replace(**states))
        expected = with_gradients(side_by_side(call), call)
        for ours, right in zip(with_gradients(attend_along(path, call), call), expected, strict=True):
            assert (ours - right).norm() / right.norm() < 2e-2


def test_flex_is_not_compiled_for_every_length() -> None:
    torch._dynamo.reset()
    attention_flex.compiled.cache_clear()
    attention_flex._functions.cache_clear()

    def run(tokens: int) -> None:
        packing = packing_of([(tokens, 50, 64)])
        packing |= {name: packing[name].cuda() for name in ("position_ids", "parts")}
        call = call_of(packing, dtype=torch.bfloat16)
        states = {name: getattr(call, name).cuda() for name in ("query", "key", "value")}
        call = leaves(call._replace(**states))
        with_gradients(attention_flex.flex(call), call)

    for tokens in (400, 700):
        run(tokens)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (10, 900, 220, 3000):
            run(tokens)


def test_the_choice_is_measured_and_names_every_path() -> None:
    model: Any = tiny_model(head_dim=64, hidden_size=128).cuda()
    path, words = fastest(attention_shape(model, torch.bfloat16), ("side_by_side", "varlen", "flex"))
    assert path in ("side_by_side", "varlen", "flex")
    for name in ("side_by_side", "varlen", "flex"):
        assert name in words
    assert choose_attention(model, "auto", torch.bfloat16)[0] in ("side_by_side", "varlen", "flex")


def test_heads_too_small_for_flex_are_named() -> None:
    model: Any = tiny_model(head_dim=8, hidden_size=32).cuda()
    path, words = fastest(attention_shape(model, torch.bfloat16), ("side_by_side", "flex"))
    assert path == "side_by_side"
    assert "FlexAttention needs heads of at least 16, not 8" in words
