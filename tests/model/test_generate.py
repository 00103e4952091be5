"""Batched generation: the same tokens as the model's own `generate`, with nothing padded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slimepo.errors import InputError
from slimepo.model.generate import Completion, generate

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Wide, so that a random model has clear favourites and ends at different lengths.
    "initializer_range": 0.6,
    # With tied embeddings a random model mostly says its last token again.
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def gemma3() -> Gemma3ForCausalLM:
    # A window of 4 is shorter than the prompts: the sliding caches are full from the start.
    layers = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "initializer_range": 0.1}  # its embeddings would drown its layers otherwise
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=4, layer_types=layers))


def lfm2() -> Lfm2ForCausalLM:
    # A convolution beside the attention: its state is no key-value cache, so rows stay in the batch.
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    layers = ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=layers, block_auto_adjust_ff_dim=False))


def made(architecture: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return architecture().eval()


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


# Several ends, so that rows of a batch finish at different steps.
ENDS = [2, 7, 11, 19]


@pytest.mark.parametrize("architecture", [llama, qwen3, gemma3, lfm2])
@pytest.mark.parametrize("batch_rows", [1, 8, 64])
def test_greedy_equals_the_models_own_generate(architecture: Callable[[], Any], batch_rows: int) -> None:
    model = made(architecture)
    prompts = random_prompts(24)
    ours = generate(model, prompts, end_token_ids=ENDS, max_new_tokens=20, batch_rows=batch_rows)
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=ENDS,
            pad_token_id=0,
        )
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()
        assert completion.finished == (completion.token_ids[-1] in ENDS)
    lengths = {len(completion.token_ids) for (completion,) in ours}
    assert len(lengths) > 3, "rows must finish at different steps for this test to say anything"


def test_completions_keep_the_order_of_the_prompts() -> None:
    model = made(llama)
    prompts = random_prompts(20)
    forwards = generate(model, prompts, end_token_ids=ENDS, max_new_tokens=10)
    backwards = generate(model, prompts[::-1], end_token_ids=ENDS, max_new_tokens=10)
    assert forwards == backwards[::-1]


def test_rows_that_are_done_leave_the_batch() -> None:
    model = made(llama)
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    generate(model, [[5, n] for n in range(3, 33)], end_token_ids=ENDS, max_new_tokens=30)
    assert rows[0] == 30
    assert rows[-1] < 20
    assert rows == sorted(rows, reverse=True)


def test_a_prompt_is_read_once_for_all_its_samples() -> None:
    model = made(llama)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(model, [[5, 6, 7]], end_token_ids=[2], max_new_tokens=3, temperature=1.0, samples=4)
    assert shapes[0] == (1, 3)
    assert shapes[1] == (4, 1)


@pytest.mark.parametrize("architecture", [llama, qwen3, gemma3, lfm2])
def test_samples_are_a_function_of_the_seed_whatever_the_order(architecture: Callable[[], Any]) -> None:
    model = made(architecture)
    prompts = random_prompts(12)
    options: dict[str, Any] = {"end_token_ids": ENDS, "max_new_tokens": 8, "temperature": 1.0, "samples": 3}
    first = generate(model, prompts, seed=1, **options)
    torch.manual_seed(99)
    assert generate(model, prompts, seed=1, **options) == first
    assert generate(model, prompts[::-1], seed=1, **options)[::-1] == first
    assert generate(model, prompts, seed=2, **options) != first
    assert all(len(completions) == 3 for completions in first)


def test_a_run_that_was_cut_short_asks_the_rest_and_gives_the_same_samples() -> None:
    model, prompts = made(llama), random_prompts(12)
    options: dict[str, Any] = {
        "end_token_ids": ENDS, "max_new_tokens": 8, "temperature": 1.0, "samples": 3, "batch_rows": 6,
    }  # fmt: skip
    kept: dict[int, Any] = {}
    whole = generate(
        model, prompts, finished=lambda at, rows: kept.update(zip(at, rows, strict=True)), **options
    )
    assert [kept[place] for place in range(12)] == whole
    done = list(kept)[:5]
    rest = generate(model, prompts, done=done, **options)
    assert all(rest[place] == whole[place] or (place in done and not rest[place]) for place in range(12))
    assert any(not completions for completions in rest)


def test_sampling_leaves_the_global_generator_alone() -> None:
    model = made(llama)
    before = torch.random.get_rng_state()
    generate(model, [[5, 6]], end_token_ids=[2], max_new_tokens=3, temperature=1.0)
    assert torch.equal(before, torch.random.get_rng_state())


def first_token_shares(model: Any, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    (completions,) = generate(
        model,
        [[5, 6, 7]],
        end_token_ids=[2],
        max_new_tokens=1,
        temperature=temperature,
        top_p=top_p,
        samples=20_000,
    )
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCABULARY)
    return counts / len(completions)


def test_samples_follow_the_models_distribution() -> None:
    model = made(llama)
    expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.5).softmax(-1)
    # Five standard deviations of a share of 20,000 are below 0.018.
    assert torch.allclose(first_token_shares(model, temperature=1.5), expected, atol=0.018)


def test_top_p_keeps_the_likeliest_tokens_that_reach_the_mass() -> None:
    model = made(llama)
    probabilities = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 3.0).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept, mass = set(), 0.0
    for token in order:
        if mass >= 0.5:
            break
        kept.add(token)
        mass += probabilities[token].item()
    shares = first_token_shares(model, temperature=3.0, top_p=0.5)
    assert set(shares.nonzero().flatten().tolist()) == kept
    assert 1 < len(kept) < VOCABULARY


def test_a_tiny_top_p_is_greedy() -> None:
    model = made(qwen3)
    prompts = random_prompts(6)
    greedy = generate(model, prompts, end_token_ids=ENDS, max_new_tokens=6)
    assert (
        generate(model, prompts, end_token_ids=ENDS, max_new_tokens=6, temperature=1.0, top_p=1e-9) == greedy
    )


def test_an_answer_that_is_cut_off_is_not_finished() -> None:
    model = made(llama)
    never = [VOCABULARY + 5]
    assert generate(model, [[5, 6]], end_token_ids=never, max_new_tokens=4)[0][0].finished is False
    assert len(generate(model, [[5, 6]], end_token_ids=never, max_new_tokens=4)[0][0].token_ids) == 4


def test_an_end_at_the_first_or_the_last_token_is_an_end() -> None:
    model = made(llama)
    first = int(model(torch.tensor([[5, 6]])).logits[0, -1].argmax())
    for limit in (1, 5):
        completions = generate(model, [[5, 6]], end_token_ids=[first], max_new_tokens=limit)
        assert completions == [[Completion([first], True)]]


def test_the_model_gets_its_mode_back_and_no_gradient() -> None:
    model = made(llama).train()
    generate(model, [[5, 6]], end_token_ids=[2], max_new_tokens=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_every_prompt() -> None:
    seen: list[int] = []
    generate(
        made(llama),
        random_prompts(10),
        end_token_ids=ENDS,
        max_new_tokens=2,
        batch_rows=3,
        progress=seen.append,
    )
    assert sum(seen) == 10
    assert max(seen) <= 3


def test_no_prompts_give_no_completions() -> None:
    assert generate(made(llama), [], end_token_ids=[2], max_new_tokens=2) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"end_token_ids": []}, "end_token_ids"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"samples": 0}, "samples"),
        ({"samples": 2}, "set a temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"batch_rows": 0}, "batch_rows"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], named: str) -> None:
    options = {"prompts": [[5]], "end_token_ids": [2], "max_new_tokens": 2, **changes}
    with pytest.raises(InputError, match=named):
        generate(made(llama), **options)
