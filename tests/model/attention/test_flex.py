"""FlexAttention over packed rows: who sees whom, the numbers, and what is made and compiled how often."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from slimepo.data.batch import collate, collate_packed
from slimepo.model.attention import flex as attention_flex
from slimepo.model.attention.flex import flex, mask_mod
from slimepo.model.attention.sdpa import side_by_side
from slimepo.model.logps import policy_logps
from tests.model.attention.cases import call_of, packing_of, seen
from tests.model.attention.test_interface import every_architecture, prepared
from tests.tiny import random_rows

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

PAIRS = st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6)).filter(lambda pair: any(pair[1:]))
LENGTHS = st.lists(PAIRS, min_size=1, max_size=4)
UNEQUAL = [(3, 40, 7), (90, 1, 35), (8, 8, 8)]


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, shared=st.booleans(), window=st.sampled_from([None, 1, 2, 4]))
def test_a_token_sees_its_prompt_and_its_own_response_up_to_itself(lengths, shared, window):
    packing = packing_of(lengths, shared)
    places = torch.arange(packing["parts"].shape[1])
    sees = mask_mod(*packing["parts"], packing["position_ids"][0], window)
    mask = sees(places * 0, places * 0, places[:, None], places[None, :])
    assert torch.equal(mask, seen(lengths, shared, window))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"window": 5}, {"softcap": 2.0}, {"window": 5, "softcap": 2.0, "scaling": 0.2}]
)
def test_it_computes_what_side_by_side_does(shared, dtype, options):
    call = call_of(packing_of(UNEQUAL, shared), dtype=dtype, **options)
    # side_by_side takes a soft-capped softmax in float32 at least; flex on a CPU does so too.
    close = 1e-12 if dtype is torch.float64 and "softcap" not in options else 2e-6
    with torch.no_grad():
        torch.testing.assert_close(flex(call), side_by_side(call), rtol=close, atol=close)


def test_the_comparison_fails_when_the_rejected_answer_sees_the_chosen():
    call = call_of(packing_of(UNEQUAL))
    seeing = packing_of(UNEQUAL)
    seeing["parts"] = seeing["parts"].clone()
    seeing["parts"][1].clamp_(max=1)
    with torch.no_grad():
        difference = flex(call._replace(packing=seeing)) - side_by_side(call)
    assert difference.abs().max() > 1e-2


@every_architecture
def test_models_give_the_log_probs_of_padded_rows(architecture: str, sizes: dict[str, Any]) -> None:
    model, pairs = prepared(architecture, sizes, "flex"), random_rows(6)
    with torch.no_grad():
        one, two = (policy_logps(model, batch) for batch in (collate(pairs), collate_packed(pairs)))
    close = 1e-6 if architecture in ("gemma2", "mixtral", "qwen3_moe") else 1e-9
    torch.testing.assert_close(one.chosen, two.chosen, rtol=close, atol=close)
    torch.testing.assert_close(one.rejected, two.rejected, rtol=close, atol=close)


def test_a_mask_is_made_once_a_batch_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(attention_flex, "_functions", lambda _: (flex_attention, counted))
    sizes = {
        "num_hidden_layers": 4,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    model = prepared("gemma3_text", sizes, "flex")
    batch = collate_packed(random_rows(3))
    with torch.no_grad():
        policy_logps(model, batch)
        assert len(made) == 2
        policy_logps(model, batch)
        assert len(made) == 2
        policy_logps(model, collate_packed(random_rows(4)))
        assert len(made) == 4


def test_rows_of_any_length_run_the_same_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch's tracing goes (its code for a GPU is another matter): two lengths, then nothing is new."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    functions = (
        torch.compile(flex_attention, backend=backend),
        torch.compile(create_block_mask, backend=backend),
    )
    monkeypatch.setattr(attention_flex, "_functions", lambda _: functions)

    def run(tokens: int) -> None:
        packing = packing_of([(5, tokens // 2, 7), (9, 8, tokens - tokens // 2)])
        with torch.no_grad():
            call = call_of(packing, dtype=torch.float32, window=16, softcap=2.0)
            torch.testing.assert_close(flex(call), side_by_side(call), rtol=1e-5, atol=1e-5)

    for tokens in (400, 700):
        run(tokens)
    known = len(graphs)
    for tokens in (10, 227, 340, 900):
        run(tokens)
    torch._dynamo.reset()
    assert known > 0
    assert len(graphs) == known
