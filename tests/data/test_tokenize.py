"""Tokenising keeps the rows that fit and counts the others by reason; nothing is changed in silence."""

import numpy as np
import pytest

from slimepo.data.chat import chat_format
from slimepo.data.tokenize import DROP_REASONS, Drop, tokenize
from slimepo.errors import InputError
from slimepo.types import Preference


def row(prompt="hi", chosen="yes", rejected="no", source="f:1"):
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Preference([{"role": "user", "content": prompt}], *answers, source)


@pytest.fixture
def chat(tokenizer):
    return chat_format(tokenizer)


PROMPT = len("user: hi") + len("\nassistant: ") + 2  # <s> and <end>


def test_a_pair_is_prompt_chosen_and_rejected_each_response_with_its_end_token(chat):
    tokens = tokenize([row()], chat)
    (pair,) = tokens.rows
    decode = chat.tokenizer.decode
    assert decode(pair.prompt_ids) == "<s>user: hi<end>\nassistant: "
    assert tuple(map(decode, pair.responses)) == ("yes<end>", "no<end>")
    assert {ids.dtype for ids in (pair.prompt_ids, *pair.responses)} == {np.dtype(np.int32)}
    assert (pair.id, tokens.drops, tokens.cut) == ("f:1", [], [])


def test_a_row_without_a_source_is_named_by_its_contents(chat):
    one, other, again = tokenize([row(source=""), row("ho", source=""), row(source="")], chat).rows
    assert one.id == again.id != other.id


DROPPED = {
    "empty response": (row(rejected=" \n"), "'rejected' has no text"),
    "identical responses": (row(chosen="no ", rejected="no"), "'chosen' and 'rejected' are the same tokens"),
    "prompt too long": (row("x" * 100), f"the prompt has {PROMPT + 98} tokens, more than 60"),
    "row too long": (
        row(rejected="x" * 100),
        f"prompt and longer response have {PROMPT} + 101 = {PROMPT + 101} tokens, more than 80",
    ),
    "answer of several turns": (
        Preference(row().prompt, [*row().chosen, *row().prompt, *row().chosen], row().rejected, "f:1"),
        "a response must be one assistant turn; the turns here are: assistant, user, assistant",
    ),
}


@pytest.mark.parametrize("reason", DROPPED)
def test_rows_that_cannot_be_used_are_counted_by_reason(reason, chat):
    bad, detail = DROPPED[reason]
    good = row(source="f:2")
    tokens = tokenize([bad, good], chat, max_length=80, max_prompt_length=60)
    assert tokens.drops == [Drop(reason, "f:1", detail)]
    assert reason in DROP_REASONS
    assert [pair.id for pair in tokens.rows] == ["f:2"]


def test_a_row_that_just_fits_is_kept(chat):
    exact = PROMPT + len("yes") + 1
    assert len(tokenize([row()], chat, max_length=exact).rows) == 1
    assert tokenize([row()], chat, max_length=exact - 1).drops[0].reason == "row too long"
    assert len(tokenize([row()], chat, max_prompt_length=PROMPT).rows) == 1
    assert tokenize([row()], chat, max_prompt_length=PROMPT - 1).drops[0].reason == "prompt too long"
    assert tokenize([row()], chat, max_length=PROMPT).drops[0].reason == "prompt too long"


def test_on_request_long_responses_are_cut_and_then_have_no_end_token(chat):
    tokens = tokenize([row(chosen="abcdef", rejected="no")], chat, max_length=PROMPT + 4, cut=True)
    (pair,) = tokens.rows
    assert chat.tokenizer.decode(pair.responses[0]) == "abcd"
    assert chat.tokenizer.decode(pair.responses[1]) == "no<end>"
    assert tokens.cut == ["f:1"]


def test_responses_that_are_the_same_once_cut_are_dropped(chat):
    tokens = tokenize([row(chosen="abcd1", rejected="abcd2")], chat, max_length=PROMPT + 4, cut=True)
    assert [drop.reason for drop in tokens.drops] == ["identical responses"]
    assert (tokens.rows, tokens.cut) == ([], [])


def test_demonstrations_need_no_rejected_answer_and_pairs_do(chat):
    demonstration = Preference(row().prompt, row().chosen, [], "f:1")
    (pair,) = tokenize([demonstration], chat, pairs=False).rows
    assert [(len(ids), ids.dtype) for ids in pair.responses] == [(4, np.int32)]
    assert tokenize([demonstration], chat).drops == [Drop("not a pair", "f:1", "it has no 'rejected'")]


def test_answers_judged_by_themselves_have_one_side(chat):
    desirable = Preference(row().prompt, row().chosen, [], "f:1")
    undesirable = Preference(row().prompt, [], row().rejected, "f:2")
    tokens = tokenize([desirable, row(), undesirable], chat, one_sided=True)
    assert [tuple(len(ids) > 0 for ids in pair.responses) for pair in tokens.rows] == [
        (True, False), (True, True), (False, True),
    ]  # fmt: skip
    assert chat.tokenizer.decode(tokens.rows[2].responses[1]) == chat.tokenizer.decode(
        tokens.rows[1].responses[1]
    )
    assert tokenize([undesirable], chat, pairs=False).drops == [
        Drop("not a pair", "f:2", "it has no 'chosen'")
    ]


def test_demonstrations_are_made_from_pairs_by_their_chosen_side_alone(chat):
    odd = [row(rejected="x" * 500), row(rejected=""), row(chosen="no", rejected="no")]
    tokens = tokenize(odd, chat, max_length=80, pairs=False)
    assert len(tokens.rows) == 3
    assert tokens.drops == []


def test_order_is_kept_over_batches_and_progress_is_told(chat):
    told = []
    rows = [row(str(i), source=f"f:{i}") for i in range(1100)]
    tokens = tokenize(rows, chat, progress=lambda done, total: told.append((done, total)))
    assert [pair.id for pair in tokens.rows] == [r.source for r in rows]
    assert told[-1] == (1100, 1100)
    assert len(told) > 1


def test_limits_that_nothing_fits_in_are_refused(chat):
    with pytest.raises(InputError, match="leave no room"):
        tokenize([row()], chat, max_length=1)


def test_refused_conversations_are_counted_with_the_templates_own_words(make_tokenizer):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        "{{ m['content'] + '<end>' }}{% endfor %}"
    )
    chat = chat_format(make_tokenizer(template))
    bad = Preference([{"role": "system", "content": "s"}, *row().prompt], row().chosen, row().rejected, "f:1")
    (drop,) = tokenize([bad, row()], chat).drops
    assert drop.reason == "refused by the template"
    assert "no system role here" in drop.detail
