"""Packed and prefix-shared rows give the log-probs and gradients of padded ones, on every architecture."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimepo.data.batch import Batch, collate, collate_packed
from slimepo.data.rows import Row
from slimepo.model.adapters import add_adapter, lora_config
from slimepo.model.attention.interface import install
from slimepo.model.logps import causal_lm, install_logps, policy_logps
from tests.tiny import VOCABULARY, random_rows, tiny_model

WINDOW = {"sliding_window": 5}
ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {}),
    ("gemma3_text", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    ("gemma2", WINDOW | {"attn_logit_softcapping": 2.0}),
    ("mistral", WINDOW),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
]
every_architecture = pytest.mark.parametrize(("architecture", "sizes"), ARCHITECTURES)


def logps_and_gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    logps = policy_logps(model, batch)
    weights = torch.linspace(-1, 2, logps.chosen.numel(), dtype=torch.float64).view_as(logps.chosen)
    (logps.chosen * weights - 0.7 * logps.rejected.square()).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [logps.chosen.detach(), logps.rejected.detach(), *gradients]


def differences(model: nn.Module, batches: list[Batch]) -> list[float]:
    """Largest difference of the second batch's log-probs and gradients from the first's, relative above 1."""
    one, two = (logps_and_gradients(model, batch) for batch in batches)
    return [((a - b).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in zip(one, two, strict=True)]


def in_float64(model: nn.Module) -> nn.Module:
    """Float64 throughout: transformers' RMS norms and expert products compute in float32 whatever they are given."""

    def norm(module: Any, x: Tensor) -> Tensor:
        shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
        eps = getattr(module, "variance_epsilon", None) or module.eps
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (shift + module.weight)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)
    causal_lm(model).set_experts_implementation("eager")
    return model.double()


def prepared(architecture: str, sizes: dict[str, Any], path: str = "by_length") -> nn.Module:
    model = in_float64(tiny_model(architecture, **sizes)).train()
    install_logps(model)
    install(causal_lm(model), path)
    return model


@every_architecture
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("path", ["side_by_side", "one_by_one"])
def test_equal_to_padded_rows(
    architecture: str,
    sizes: dict[str, Any],
    shared: bool,
    path: str,
) -> None:
    model = prepared(architecture, sizes, path)
    pairs = random_rows(6)
    # These take a softmax in float32 whatever they are given: of soft-capped scores, of the router.
    close = {"gemma2": 1e-6, "mixtral": 1e-7, "qwen3_moe": 1e-7}.get(architecture, 1e-9)
    assert max(differences(model, [collate(pairs), collate_packed(pairs, shared=shared)])) < close


@pytest.mark.parametrize("shared", [True, False])
def test_equal_with_lora_and_a_trained_head_and_checkpointed_activations(shared: bool) -> None:
    model = in_float64(add_adapter(tiny_model(tied=True), lora_config(r=4))).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    install_logps(model)
    install(causal_lm(model))
    pairs = random_rows(4)
    plain = logps_and_gradients(model, collate(pairs))
    model.activation_checkpointing_enable()
    for a, b in zip(plain, logps_and_gradients(model, collate_packed(pairs, shared=shared)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_architecture
def test_negative_controls_fail(architecture: str, sizes: dict[str, Any]) -> None:
    """The comparison above can fail: positions that do not restart, a rejected answer that sees the chosen."""
    model, pairs = prepared(architecture, sizes), random_rows(6)
    running_on = collate_packed(pairs)
    assert running_on["packing"] is not None
    running_on["packing"]["position_ids"] = torch.arange(running_on["input_ids"].shape[1])[None]
    assert max(differences(model, [collate(pairs), running_on])) > 1e-3
    seeing = collate_packed(pairs)
    assert seeing["packing"] is not None
    total = seeing["input_ids"].shape[1]
    seeing["packing"] |= {"gather": torch.arange(total)[None], "scatter": torch.arange(total)}
    assert max(differences(model, [collate(pairs), seeing])) > 1e-3


def test_other_calls_of_the_model_go_where_they_went_before() -> None:
    plain, installed = tiny_model("qwen3").eval(), tiny_model("qwen3").eval()
    install(installed)
    ids = torch.arange(2, 22).view(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        a, b = (m(input_ids=ids, **kwargs).logits[:, 3:] for m in (plain, installed))
        torch.testing.assert_close(a, b)
    one, two = (m.generate(ids, max_new_tokens=6, do_sample=False).tolist() for m in (plain, installed))
    assert one == two


def test_dropout_reaches_attention() -> None:
    model = tiny_model(attention_dropout=0.5).double().train()
    install_logps(model)
    install(model)
    batch = collate_packed(random_rows(3))
    one, two = (policy_logps(model, batch).chosen for _ in range(2))
    assert not torch.equal(one, two)
    model.eval()
    torch.testing.assert_close(
        policy_logps(model, batch).chosen, policy_logps(model, collate(random_rows(3))).chosen
    )


def test_a_side_that_is_not_read_is_not_computed() -> None:
    pairs = random_rows(4)
    batch = collate_packed(pairs, positions=(0,))
    assert batch["input_ids"].shape[1] == sum(len(p.prompt_ids) + len(p.responses[0]) for p in pairs)


def test_long_rows_of_one_pair() -> None:
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return random.integers(2, VOCABULARY, count).astype(np.int32)

    pairs = [Row(ids(1), (ids(300), ids(1)), id="a"), Row(ids(200), (ids(1), ids(150)), id="b")]
    model = prepared("llama", {})
    assert max(differences(model, [collate(pairs), collate_packed(pairs)])) < 1e-9
