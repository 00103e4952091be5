"""The world's tokenizer: exact in both directions, small, and safe to cut between prompt and answer."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slimepo.playground.tasks import FAMILIES, USUAL, make_task, malformed, slip
from slimepo.playground.tokenizer import CHARACTERS, SPECIAL_TOKENS, build_tokenizer, vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def symbols(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_text_of_the_world_comes_back_and_nothing_is_unknown(
    tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    rng = Random(0)
    for _ in range(200):
        task = make_task(family, rng)
        for text in (task.prompt, task.gold, slip(task, rng), malformed(task, rng)):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=CHARACTERS, max_size=60))
def test_any_text_in_the_characters_of_the_world_comes_back(text: str) -> None:
    tokenizer = _SHARED
    assert tokenizer.decode(tokenizer(text).input_ids) == text


_SHARED = build_tokenizer()


def test_template_words_are_one_token_and_the_rest_is_spelt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert symbols(tokenizer, "Add 27 and 5.") == ["Add", " ", "2", "7", " and", " ", "5", "."]
    assert symbols(tokenizer, "Reverse the word ox.") == ["Reverse", " the", " word", " ", "o", "x", "."]


@pytest.mark.parametrize("family", sorted(USUAL))
def test_no_wording_is_spelt(tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    for template in FAMILIES[family].templates:
        fixed = template.replace("{", "").replace("}", "")
        for word in fixed.translate({ord(mark): None for mark in ".:?"}).split():
            if f"{{{word}}}" not in template:
                assert word in vocabulary() or f" {word}" in vocabulary()


def test_a_word_inside_another_is_spelt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert symbols(tokenizer, "Adds") == list("Adds")
    assert symbols(tokenizer, " andy") == list(" andy")


def test_the_vocabulary_is_small_and_without_gaps() -> None:
    ids = sorted(vocabulary().values())
    assert ids == list(range(len(ids)))
    assert len(ids) < 128


def test_encoding_adds_no_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("7").input_ids == [vocabulary()["7"]]


def test_text_from_outside_the_world_is_unknown_and_no_error(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


@settings(max_examples=50, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**32))
def test_the_prompt_is_a_prefix_and_nothing_follows_the_end(family: str, seed: int) -> None:
    task = make_task(family, Random(seed))
    prompt = [{"role": "user", "content": task.prompt}]
    whole = [*prompt, {"role": "assistant", "content": task.gold}]
    start = _SHARED.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    full = _SHARED.apply_chat_template(whole, tokenize=False)
    assert full == start + task.gold + _SHARED.eos_token
    ids = _SHARED(full).input_ids
    assert ids == _SHARED(start).input_ids + _SHARED(task.gold + _SHARED.eos_token).input_ids
    assert ids.count(_SHARED.bos_token_id) == 1
    assert ids.index(_SHARED.eos_token_id) == len(ids) - 1


def test_a_conversation_of_several_turns_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "Add 1 and 2."), ("assistant", "3"), ("user", "Add 3 and 4.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<bos><user>Add 1 and 2.<assistant>3<end><user>Add 3 and 4.<assistant>"


def test_a_role_that_the_world_does_not_know_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_it_is_the_same_after_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Sort 3 1 2."}], tokenize=False)
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids) == text
    assert again.chat_template == tokenizer.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert set(again.all_special_tokens) == set(SPECIAL_TOKENS)
