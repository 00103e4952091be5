"""Variable-length attention: the segments and what is handed to the kernels, with a plain kernel in their place."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimepo.data.batch import collate, collate_packed
from slimepo.model.attention import varlen as attention_varlen
from slimepo.model.attention.path import AttentionPath
from slimepo.model.attention.sdpa import side_by_side
from slimepo.model.attention.table import PATHS
from slimepo.model.attention.varlen import missing, obstacle, varlen
from tests.model.attention.cases import call_of, leaves, packing_of, seen, with_gradients
from tests.model.attention.test_interface import ARCHITECTURES, differences, prepared
from tests.tiny import random_rows

PAIRS = st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6)).filter(lambda pair: any(pair[1:]))
LENGTHS = st.lists(PAIRS, min_size=1, max_size=4)
UNEQUAL = [(3, 40, 7), (90, 1, 35), (8, 8, 8)]
# torch's kernel has no softcap.
WITHOUT_SOFTCAP = [case for case in ARCHITECTURES if "attn_logit_softcapping" not in case[1]]


def flash(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int,
    scale: float | None, left: int, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """What the kernels compute, `[queries, heads, D]`: segment by segment, causal from the bottom right."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert (max_q, max_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    outputs = []
    for i in range(len(ends_q) - 1):
        q = query[ends_q[i] : ends_q[i + 1]].transpose(0, 1)
        k, v = (
            states[ends_k[i] : ends_k[i + 1]]
            .transpose(0, 1)
            .repeat_interleave(q.shape[0] // states.shape[1], 0)
            for states in (key, value)
        )
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = (distance >= 0) & (distance <= left if left >= 0 else True)
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        outputs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's `varlen_attn`, played by `flash`."""

    def varlen_attn(*args: Any, scale: Any, window_size: Any, enable_gqa: bool) -> Tensor:
        assert enable_gqa
        assert window_size[1] == 0
        return flash(*args, scale, window_size[0])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_varlen, "torch_takes_windows", lambda: True)


@pytest.fixture
def flash_attns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package flash_attn, played by `flash`."""

    def flash_attn_varlen_func(
        *args: Any, dropout_p: float, softmax_scale: Any, causal: bool, window_size: Any, softcap: float
    ) -> Tensor:
        assert causal
        assert dropout_p == 0
        return flash(*args, softmax_scale, window_size[0], softcap)

    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention_varlen, "find_spec", lambda _: module)
    monkeypatch.setattr(attention_varlen, "torch_takes_windows", lambda: False)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, shared=st.booleans())
def test_the_segments_hold_the_keys_that_each_token_sees(lengths, shared):
    packing = packing_of(lengths, shared)
    (ends_q, ends_k), keys = packing["cu_seqlens"].tolist(), packing["keys"]
    tokens = packing["position_ids"].shape[1]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(len(ends_q) - 1):
        places = keys[ends_k[i] : ends_k[i + 1]]
        queries = range(ends_q[i], ends_q[i + 1])
        for back, query in enumerate(reversed(queries)):
            mask[query, places[: len(places) - back]] = True
    assert torch.equal(mask, seen(lengths, shared, None))
    assert ends_q[-1] == tokens


@pytest.mark.usefixtures("torchs")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 200, "scaling": 0.2}])
def test_torchs_kernel_is_called_so_that_the_result_is_that_of_side_by_side(shared, options):
    call = leaves(call_of(packing_of(UNEQUAL, shared), **options))
    for ours, expected in zip(
        with_gradients(varlen(call), call), with_gradients(side_by_side(call), call), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("flash_attns")
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0, "scaling": 0.2}])
def test_flash_attns_kernel_is_called_so_that_the_result_is_that_of_side_by_side(options):
    call = leaves(call_of(packing_of(UNEQUAL), **options))
    # side_by_side's softmax of soft-capped scores.
    close = 2e-6 if "softcap" in options else 1e-12
    for ours, expected in zip(
        with_gradients(varlen(call), call), with_gradients(side_by_side(call), call), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


@pytest.mark.usefixtures("torchs")
def test_the_comparison_fails_when_the_rejected_answer_sees_the_chosen():
    call, seeing = call_of(packing_of(UNEQUAL)), packing_of(UNEQUAL)
    # One segment a group: the rejected answer behind the chosen one.
    ends = torch.tensor([0, 50, 176, 200], dtype=torch.int32)
    seeing |= {"keys": torch.arange(200), "cu_seqlens": torch.stack([ends, ends]), "max_seqlen": (126, 126)}
    assert (varlen(call._replace(packing=seeing)) - side_by_side(call)).abs().max() > 1e-2


@pytest.mark.usefixtures("torchs")
@pytest.mark.parametrize(("architecture", "sizes"), WITHOUT_SOFTCAP)
def test_models_give_the_log_probs_and_gradients_of_padded_rows(
    architecture: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATHS, "varlen", AttentionPath(varlen, obstacle=lambda _: None))
    model, pairs = prepared(architecture, sizes, "varlen"), random_rows(6)
    close = 1e-7 if architecture in ("mixtral", "qwen3_moe") else 1e-9
    assert max(differences(model, [collate(pairs), collate_packed(pairs)])) < close


def test_what_no_kernel_takes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "find_spec", lambda _: None)
    assert missing(0.0, None) is None
    assert "no dropout and no softcap, and flash_attn is not installed" in str(missing(0.1, None))
    assert "flash_attn is not installed" in str(missing(0.0, 30.0))
    monkeypatch.setattr(attention_varlen, "torch_takes_windows", lambda: False)
    assert "takes no windows" in str(missing(0.0, None))
    assert "needs a CUDA device" in str(obstacle(call_of(packing_of(UNEQUAL))))


def test_a_prompt_that_nothing_answers_takes_no_place_in_the_row() -> None:
    # Its tokens would be queries of no segment, and every later query would stand in another one's place.
    first, second, last = random_rows(3)
    unanswered = replace(second, responses=(second.responses[0][:0], second.responses[1]))
    tokens = sum(len(row.prompt_ids) + len(row.response(0)) for row in (first, last))
    for shared in (True, False):
        packing = collate_packed([first, unanswered, last], (0,), shared=shared)["packing"]
        assert packing is not None
        assert int(packing["cu_seqlens"][0, -1]) == packing["position_ids"].shape[1] == tokens
