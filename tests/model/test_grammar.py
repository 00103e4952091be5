"""Answers that a grammar shapes: every one matches it, is closed in time, and is the model's own where it agrees."""

import copy
import functools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from slimepo.errors import InputError
from slimepo.model.generate import Completion, completion_text, generate
from slimepo.model.grammar import Grammars
from slimepo.playground.tokenizer import build_tokenizer
from tests.tiny import tiny_model

TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id
# Lists of lists: an answer can always open another bracket.
NESTED = 'root ::= "{" (item ("," item)*)? "}"\nitem ::= root | [0-9]+'


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tiny_model(vocab_size=len(TOKENIZER) + 3)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, len(TOKENIZER) + 3, {END})


def answers(model: Any, grammars: Grammars | None, grammar: str, limit: int, **more: Any) -> list[Completion]:
    prompts = [TOKENIZER.encode(text) for text in ("Add 2 and 3.", "Sort 4 1.")]
    constraints = None if grammars is None else [functools.partial(grammars, grammar)] * 2
    found = generate(
        model,
        prompts,
        end_token_ids={END},
        max_new_tokens=limit,
        constraints=constraints,
        **{"temperature": 1.0, "samples": 8, "seed": 3, **more},
    )
    return [completion for of_prompt in found for completion in of_prompt]


def test_every_sample_of_a_random_model_matches(model: Any, grammars: Grammars) -> None:
    for each in answers(model, grammars, 'root ::= "a" (" " [b-e]){4}', 20):
        assert each.finished
        assert re.fullmatch("a( [b-e]){4}", completion_text(TOKENIZER, each))


def test_a_greedy_answer_matches_too(model: Any, grammars: Grammars) -> None:
    for each in answers(model, grammars, "root ::= [1-9] [0-9]{2}", 20, temperature=0.0, samples=1):
        assert re.fullmatch("[1-9][0-9]{2}", completion_text(TOKENIZER, each))


@settings(max_examples=25, deadline=None)
@given(limit=st.integers(3, 40), seed=st.integers(0, 2**32 - 1))
def test_brackets_are_closed_within_the_limit(model: Any, grammars: Grammars, limit: int, seed: int) -> None:
    """What cannot end by chance is ended: a random model would go on to the limit."""
    for each in answers(model, grammars, NESTED, limit, seed=seed):
        text = completion_text(TOKENIZER, each)
        assert each.finished
        assert len(each.token_ids) <= limit
        assert text.count("{") == text.count("}") > 0


# Whose closing is longer than what is looked for behind every token, or than what is looked for at the start.
LONG = [
    ('root ::= line+\nline ::= "add " [0-9]{1,2} " and " [0-9]{1,2} "," ', "(add \\d{1,2} and \\d{1,2},)+"),
    ('root ::= "{" (item ("," item)*)? "}"\nitem ::= "{temperature:" [0-9]{1,3} "}"', "\\{.*\\}"),
    ("root ::= [a-z]{70} [a-z]*", "[a-z]{70,}"),
]


@pytest.mark.parametrize(("grammar", "pattern"), LONG)
def test_an_answer_is_closed_also_where_that_takes_many_characters(
    model: Any, grammars: Grammars, grammar: str, pattern: str
) -> None:
    for each in answers(model, grammars, grammar, 100, samples=20):
        assert each.finished
        assert re.fullmatch(pattern, completion_text(TOKENIZER, each))


def test_what_does_not_fit_into_the_limit_is_unfinished(model: Any, grammars: Grammars) -> None:
    found = answers(model, grammars, 'root ::= "a" (" " [b-e]){4}', 6)
    assert [each.finished for each in found] == [False] * 16
    assert all(re.fullmatch("a( [b-e]){2} ", completion_text(TOKENIZER, each)) for each in found)


def test_a_grammar_of_everything_changes_nothing(model: Any, grammars: Grammars) -> None:
    """Of greedy answers in text: special tokens are never part of an answer that a grammar shapes."""
    prompts = [TOKENIZER.encode(f"Add {a} and {b}.") for a in range(10) for b in range(10)]
    free, shaped = (
        generate(model, prompts, end_token_ids={END}, max_new_tokens=20, constraints=constraints)
        for constraints in (None, [functools.partial(grammars, "root ::= [^\\x00]*")] * 100)
    )
    special = set(TOKENIZER.all_special_ids)
    said = [at for at, (each,) in enumerate(free) if not special.intersection(each.token_ids[:-1])]
    assert len(said) > 10
    # The twentieth token of an answer that goes on is the end that the limit asks for.
    assert [shaped[at][0].token_ids[:19] for at in said] == [free[at][0].token_ids[:19] for at in said]
    assert all(shaped[at][0].finished for at in said)


def test_rows_that_end_early_do_not_disturb_the_others(model: Any, grammars: Grammars) -> None:
    """Finished rows leave the batch; each constraint stays with its row."""
    prompts = [TOKENIZER.encode("Add 2 and 3."), TOKENIZER.encode("Add 2 and 4.")] * 4
    made = [functools.partial(grammars, f'root ::= "{"x" * (1 + 3 * at)}"') for at in range(8)]
    found = generate(model, prompts, end_token_ids={END}, max_new_tokens=40, constraints=made)
    texts = [completion_text(TOKENIZER, each) for (each,) in found]
    assert texts == ["x" * (1 + 3 * at) for at in range(8)]


def test_a_token_that_is_not_allowed_is_no_silent_step(grammars: Grammars) -> None:
    constraint = grammars('root ::= "ab"', "the grammar of task 7")
    with pytest.raises(
        InputError, match=r"the grammar of task 7: token .* was drawn, which it does not allow"
    ):
        constraint.take(TOKENIZER.convert_tokens_to_ids("b"), 9)


def test_half_precision_logits_and_several_ends(model: Any) -> None:
    """The mask is computed in float32, and either end closes an answer."""
    ends = {END, TOKENIZER.convert_tokens_to_ids("<user>")}
    both = Grammars(TOKENIZER, len(TOKENIZER) + 3, ends)
    found = generate(
        copy.deepcopy(model).to(torch.bfloat16), [TOKENIZER.encode("Add 2 and 3.")], end_token_ids=ends,
        max_new_tokens=9, temperature=1.0, samples=32, constraints=[functools.partial(both, "root ::= [a-c]+")],
    )  # fmt: skip
    assert {each.token_ids[-1] for each in found[0]} == ends
    assert all(re.fullmatch("[a-c]+", completion_text(TOKENIZER, each)) for each in found[0])


def test_a_tokenizer_that_decodes_otherwise_than_its_pieces_say_is_refused() -> None:
    """Without a decoder, words are put together with spaces, of which a grammar would know nothing."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "ab": 2, "cd": 3}, unk_token="<unk>"))
    wrap: Any = PreTrainedTokenizerFast
    with pytest.raises(InputError, match="two tokens 'ab' decode as 'ab ab'"):
        Grammars(wrap(tokenizer_object=words, eos_token="<end>"), 4, {1})


def test_as_many_constraints_as_prompts(model: Any, grammars: Grammars) -> None:
    with pytest.raises(InputError, match="1 constraints for 2 prompts"):
        generate(
            model, [[5], [6]], end_token_ids={END}, max_new_tokens=4, constraints=[lambda: grammars("root ::= [a]")]
        )  # fmt: skip


def test_a_broken_grammar_is_refused_with_its_place(grammars: Grammars) -> None:
    with pytest.raises(InputError, match=r"the grammar cannot be read: .*line 1"):
        grammars('root := "a')


def test_a_text_that_the_tokenizer_cannot_write_is_refused(model: Any, grammars: Grammars) -> None:
    with pytest.raises(InputError, match=r"a grammar asks for a text that .* no token for"):
        answers(model, grammars, 'root ::= "é"', 8)


def test_without_xgrammar_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimepo.model.grammar.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'slimepo\[grammar\]'"):
        Grammars(TOKENIZER, len(TOKENIZER), {END})
