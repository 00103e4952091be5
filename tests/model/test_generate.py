"""Batched generation: the same tokens as one prompt at a time, whatever is padded beside it."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slimepo.errors import InputError
from slimepo.model.attention.interface import install
from slimepo.model.generate import Completion, Mixture, generate
from slimepo.model.modes import scoring

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


def made(architecture: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(SIZES | sizes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


llama = functools.partial(made, "llama")
qwen3 = functools.partial(made, "qwen3")
# Learned absolute positions.
gpt2 = functools.partial(made, "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128)
# A window of 4 is shorter than the prompts: the sliding caches are full from the start. The embeddings of Gemma would
# drown its layers if they were wide.
WINDOWS = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "initializer_range": 0.1,
}
gemma3 = functools.partial(made, "gemma3_text", **WINDOWS)
gemma2 = functools.partial(made, "gemma2", **WINDOWS, attn_implementation="eager")


def gemma2_as_in_training() -> Any:
    """Soft-capped scores through the project's own attention, which must not read a row of padding as NaN."""
    model = gemma2()
    install(model)
    return model


# Attention within chunks of the row, counted from its first token.
llama4 = functools.partial(
    made, "llama4_text", attention_chunk_size=4, layer_types=["chunked_attention", "full_attention"],
    num_local_experts=2, intermediate_size_mlp=48, moe_layers=[], no_rope_layers=[1, 0], initializer_range=0.2,
    attn_temperature_tuning=False,
)  # fmt: skip
# Queries scaled by their place in the line, padding counted.
llama4_scaled = functools.partial(llama4, attn_temperature_tuning=True, floor_scale=4, attn_scale=2.0)
# A state along the row: a convolution beside the attention, and a state-space model.
lfm2 = functools.partial(made, "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
mamba = functools.partial(made, "mamba", state_size=4)
# Positions come from the attention mask alone.
bloom = functools.partial(made, "bloom", n_layer=2, n_head=4)
# Rotary frequencies that go by the longest row of a batch.
phi3 = functools.partial(
    made, "phi3", original_max_position_embeddings=16, max_position_embeddings=128,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
)  # fmt: skip

PADDED = {
    "llama": llama, "qwen3": qwen3, "gpt2": gpt2, "gemma3": gemma3, "gemma2": gemma2,
    "gemma2 as in training": gemma2_as_in_training, "llama4": llama4,
}  # fmt: skip
BY_LENGTH = {
    "lfm2": lfm2,
    "mamba": mamba,
    "bloom": bloom,
    "phi3 longrope": phi3,
    "llama4 scaled": llama4_scaled,
}
MODELS = pytest.mark.parametrize("name", [*PADDED, *BY_LENGTH])


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 20 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


# Several ends, so that rows of a batch finish at different steps.
ENDS = [2, 7, 11, 19]


def shapes_read(model: Any) -> list[tuple[int, ...]]:
    """A list to which every later forward pass adds the shape of its ids."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@MODELS
def test_greedy_equals_the_models_own_generate_one_at_a_time(name: str) -> None:
    model = (PADDED | BY_LENGTH)[name]()
    # Phi 3's own generate reads a row again that grows past the length where its frequencies change.
    prompts = [p for p in random_prompts(20) if name != "phi3 longrope" or len(p) > 16][:12]
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=ENDS,
            pad_token_id=0,
        )  # fmt: skip
        theirs.append(said[0, len(prompt) :].tolist())
    assert len({len(tokens) for tokens in theirs}) > 2, "rows must finish at different steps"
    for batch_rows in (1, 5, 64):
        ours = generate(model, prompts, end_token_ids=ENDS, max_new_tokens=12, batch_rows=batch_rows)
        assert [completion.token_ids for (completion,) in ours] == theirs
        assert [completion.finished for (completion,) in ours] == [t[-1] in ENDS for t in theirs]


@MODELS
def test_prompts_of_like_lengths_share_a_batch_unless_padding_would_tell(name: str) -> None:
    model = (PADDED | BY_LENGTH)[name]()
    shapes = shapes_read(model)
    generate(model, [[5] * n for n in (3, 4, 4, 30, 70, 75)], end_token_ids=[2], max_new_tokens=1)
    # A batch of long prompts goes up to twice the shortest. The pass of one token tells what the cache is made of.
    padded = [(4, 30), (2, 75)]
    by_length = [(1, 3), (2, 4), (1, 30), (1, 70), (1, 75)]
    assert [shape for shape in shapes if shape != (1, 1)] == (padded if name in PADDED else by_length)


def test_prompts_of_one_length_are_never_masked() -> None:
    model = llama()
    given: list[set[str]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    generate(model, [[5, n] for n in range(3, 9)], end_token_ids=[2], max_new_tokens=3)
    assert not set().union(*given) & {"attention_mask", "position_ids"}


def test_completions_keep_the_order_of_the_prompts() -> None:
    model = llama()
    prompts = random_prompts(20)
    forwards = generate(model, prompts, end_token_ids=ENDS, max_new_tokens=10)
    backwards = generate(model, prompts[::-1], end_token_ids=ENDS, max_new_tokens=10)
    assert forwards == backwards[::-1]


def test_rows_that_are_done_leave_the_batch() -> None:
    model = llama()
    shapes = shapes_read(model)
    generate(model, [[5] * (n % 2) + [n] for n in range(3, 33)], end_token_ids=ENDS, max_new_tokens=30)
    rows = [rows for rows, _ in shapes[1:]]
    assert rows[0] == 30
    assert rows[-1] < 20
    assert rows == sorted(rows, reverse=True)


def test_a_prompt_is_read_once_for_all_its_samples() -> None:
    model = llama()
    shapes = shapes_read(model)
    generate(model, [[5, 6, 7]], end_token_ids=[2], max_new_tokens=3, temperature=1.0, samples=4)
    assert shapes[0] == (1, 3)
    assert shapes[1] == (4, 1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "lfm2"])
def test_a_sample_is_a_function_of_seed_prompt_and_number(name: str) -> None:
    """Whatever the order, the other prompts, the size of a batch, and how many samples and tokens are asked for."""
    model = (PADDED | BY_LENGTH)[name]()
    prompts = random_prompts(8)
    options: dict[str, Any] = {"end_token_ids": ENDS, "max_new_tokens": 8, "temperature": 1.0, "samples": 3}
    first = generate(model, prompts, seed=1, **options)
    torch.manual_seed(99)
    assert generate(model, prompts[::-1], seed=1, **options)[::-1] == first
    assert generate(model, prompts[2:5], seed=1, **options) == first[2:5]
    assert generate(model, prompts, seed=1, batch_rows=1, **options) == first
    fewer = generate(model, prompts, seed=1, **(options | {"samples": 2, "max_new_tokens": 5}))
    assert [[c.token_ids for c in two] for two in fewer] == [[c.token_ids[:5] for c in f[:2]] for f in first]
    other = generate(model, prompts, seed=2, **options)
    assert other != first
    mixed = generate(model, prompts, seed=[1, 2] * 4, **options)
    assert mixed == [sides[place % 2] for place, sides in enumerate(zip(first, other, strict=True))]


def test_the_samples_of_a_prompt_that_is_given_twice_are_numbered_on() -> None:
    options: dict[str, Any] = {"end_token_ids": [2], "max_new_tokens": 8, "temperature": 1.0}
    once = generate(llama(), [[5, 6, 7]], samples=4, **options)
    twice = generate(llama(), [[5, 6, 7], [8, 9], [5, 6, 7]], samples=2, **options)
    assert twice[0] + twice[2] == once[0]
    assert len({tuple(c.token_ids) for c in once[0]}) == 4


def test_a_run_that_was_cut_short_asks_the_rest_and_gives_the_same_samples() -> None:
    model, prompts = llama(), random_prompts(12)
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
    model = llama()
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
    model = llama()
    expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.5).softmax(-1)
    # Five standard deviations of a share of 20,000 are below 0.018.
    assert torch.allclose(first_token_shares(model, temperature=1.5), expected, atol=0.018)


def test_top_p_keeps_the_likeliest_tokens_that_reach_the_mass() -> None:
    model = llama()
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
    model = qwen3()
    prompts = random_prompts(6)
    greedy = generate(model, prompts, end_token_ids=ENDS, max_new_tokens=6)
    assert (
        generate(model, prompts, end_token_ids=ENDS, max_new_tokens=6, temperature=1.0, top_p=1e-9) == greedy
    )


def test_the_entropy_is_the_models_own_whatever_was_drawn_from_it() -> None:
    model, prompts = qwen3(), random_prompts(4)
    asked: dict[str, Any] = dict(end_token_ids=ENDS, max_new_tokens=8, temperature=1.5, top_p=0.9, samples=5)
    completions = generate(model, prompts, entropy=True, **asked)
    lengths = set()
    for prompt, of_prompt in zip(prompts, completions, strict=True):
        for each in of_prompt:
            logits = model(torch.tensor([[*prompt, *each.token_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = torch.distributions.Categorical(logits=logits).entropy().mean().item()
            assert each.entropy == pytest.approx(expected, rel=1e-5)
            lengths.add(len(each.token_ids))
    assert len(lengths) > 2
    unasked = generate(model, prompts, **asked)
    assert unasked == [[replace(each, entropy=None) for each in of] for of in completions]


def test_an_answer_that_is_cut_off_is_not_finished() -> None:
    model = llama()
    never = [VOCABULARY + 5]
    assert generate(model, [[5, 6]], end_token_ids=never, max_new_tokens=4)[0][0].finished is False
    assert len(generate(model, [[5, 6]], end_token_ids=never, max_new_tokens=4)[0][0].token_ids) == 4


def test_an_end_at_the_first_or_the_last_token_is_an_end() -> None:
    model = llama()
    first = int(model(torch.tensor([[5, 6]])).logits[0, -1].argmax())
    for limit in (1, 5):
        completions = generate(model, [[5, 6]], end_token_ids=[first], max_new_tokens=limit)
        assert completions == [[Completion([first], True)]]


def test_the_model_gets_its_mode_back_and_no_gradient() -> None:
    model = llama().train()
    generate(model, [[5, 6]], end_token_ids=[2], max_new_tokens=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_every_prompt() -> None:
    seen: list[int] = []
    generate(
        llama(),
        random_prompts(10),
        end_token_ids=ENDS,
        max_new_tokens=2,
        batch_rows=3,
        progress=seen.append,
    )
    assert sum(seen) == 10
    assert max(seen) <= 3


def test_experts_whose_config_asks_for_router_logits_say_the_same() -> None:
    prompts = [[5, 6, 7], [9], [8, 4, 3, 11, 12], [3, 3]]
    experts = functools.partial(
        made, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    plain, asking = experts(), experts(output_router_logits=True)
    said = [generate(each, prompts, end_token_ids=[2], max_new_tokens=6) for each in (plain, asking)]
    assert said[0] == said[1]
    assert asking.config.output_router_logits


def test_no_prompts_give_no_completions() -> None:
    assert generate(llama(), [], end_token_ids=[2], max_new_tokens=2) == []


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
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], named: str) -> None:
    options = {"prompts": [[5]], "end_token_ids": [2], "max_new_tokens": 2, **changes}
    with pytest.raises(InputError, match=named):
        generate(llama(), **options)


class TestMixture:
    """Tokens of two models together, of another kind each, by prompts of unequal lengths."""

    PROMPTS = ([5, 9, 13], [7], [3, 3, 8, 20, 21])

    @pytest.mark.parametrize("share", [0.3, 1.0])
    @pytest.mark.parametrize("other", [qwen3, gpt2])
    def test_the_likeliest_token_of_both(self, other: Any, share: float) -> None:
        first, second = llama(), other()
        found = generate(
            first, self.PROMPTS, end_token_ids=[2], max_new_tokens=12, mixture=mixture_of(second, share)
        )
        for prompt, (completion,) in zip(self.PROMPTS, found, strict=True):
            ids = list(prompt)
            for token in completion.token_ids:
                with torch.no_grad():
                    one, two = (model(torch.tensor([ids])).logits[0, -1] for model in (first, second))
                assert token == ((1 - share) * one + share * two).argmax().item()
                ids.append(token)

    def test_with_itself_it_is_the_model(self) -> None:
        options: dict[str, Any] = dict(
            end_token_ids=[2, 7, 11, 30], max_new_tokens=20, temperature=1.0, samples=6, seed=4
        )
        model = llama()
        assert generate(model, self.PROMPTS, mixture=mixture_of(model, 0.5), **options) == generate(
            model, self.PROMPTS, **options
        )

    def test_with_a_share_of_1_it_is_the_other(self) -> None:
        options: dict[str, Any] = dict(
            end_token_ids=[2, 7, 11], max_new_tokens=9, temperature=1.0, samples=3, seed=4
        )
        first, second = llama(), qwen3()
        assert generate(first, self.PROMPTS, mixture=mixture_of(second, 1.0), **options) == generate(
            second, self.PROMPTS, **options
        )


def mixture_of(model: Any, share: float) -> Mixture:
    return Mixture(model, functools.partial(scoring, model, own_precision=False), share)
