"""Training sees exactly what generation would be given: one begin token, exact boundaries, one end-of-turn token."""

import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.data.chat import PINNED_DATE, chat_format, load_tokenizer
from slimepo.data.read import read_rows, rows_from_records
from slimepo.data.render import SEVERAL_TURNS, TEMPLATE_REFUSES, RowRefused, encode_prompt
from slimepo.data.tokenize import in_words, tokenize
from slimepo.errors import InputError
from slimepo.types import Preference
from tests.data.conftest import encode_response
from tests.standins import (
    gemma3_tokenizer,
    llama3_tokenizer,
    preference_rows,
    qwen3_tokenizer,
    story_tokenizer,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# Llama's way to be given a date: what its template writes is then no matter of the clock.
PINNED = {"date_string": PINNED_DATE}


def template_ids(chat, messages):
    """What transformers gives to `generate`."""
    out = chat.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **PINNED,
        **chat.template_options,
    )
    return out["input_ids"]


def template_text(chat, messages):
    return chat.tokenizer.apply_chat_template(messages, tokenize=False, **PINNED, **chat.template_options)


# --- a small template -----------------------------------------------------------------------------------


def test_prompt_and_response_meet_at_the_generation_prompt(tokenizer):
    chat = chat_format(tokenizer)
    prompt = encode_prompt(chat, [user("hi")])
    response = encode_response(chat, [user("hi")], [assistant("yes")])
    assert tokenizer.decode(prompt) == "<s>user: hi<end>\nassistant: "
    assert tokenizer.decode(response) == "yes<end>"
    assert chat.notes == ()


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "system", "assistant"]), st.text(string.printable, max_size=12)),
        max_size=4,
    ),
    st.text(string.printable, min_size=1, max_size=12),
)
def test_the_ids_together_are_the_rendered_conversation_up_to_the_end_token(make_tokenizer, turns, answer):
    chat = chat_format(make_tokenizer())
    messages = [*({"role": role, "content": text} for role, text in turns), user("q")]
    prompt = encode_prompt(chat, messages)
    response = encode_response(chat, messages, [assistant(answer)])
    assert prompt == template_ids(chat, messages)
    assert chat.tokenizer.decode(prompt + response) + "\n" == template_text(
        chat, [*messages, assistant(answer)]
    )
    assert prompt.count(chat.tokenizer.bos_token_id) == 1
    assert response[-1] == chat.end_id == chat.tokenizer.convert_tokens_to_ids("<end>")


def test_where_the_template_writes_no_end_token_the_eos_token_is_put_there_and_said(make_tokenizer):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    chat = chat_format(make_tokenizer(template))
    assert chat.tokenizer.decode(encode_response(chat, [user("a")], [assistant("b")])) == "b</s>"
    assert any("</s> is put there instead" in note for note in chat.notes)


def test_what_the_template_writes_before_an_answer_but_not_for_generation_is_trained_and_said(make_tokenizer):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"
    chat = chat_format(make_tokenizer(template))
    assert chat.tokenizer.decode(encode_response(chat, [user("a")], [assistant("b")])) == "assistant: b<end>"
    assert any("'assistant: '" in note and "11 tokens" in note for note in chat.notes)


def test_without_a_template_texts_are_plain_with_the_tokenizers_own_begin_token(make_tokenizer):
    for adds_bos, start in ((True, "<s>"), (False, "")):
        chat = chat_format(make_tokenizer(None, adds_bos=adds_bos))
        prompt = encode_prompt(chat, [user("a b ")])
        assert chat.tokenizer.decode(prompt) == f"{start}a b "
        assert chat.tokenizer.decode(encode_response(chat, [user("a b ")], [assistant("c")])) == "c</s>"
        assert any("no chat template" in note for note in chat.notes)


def test_a_tokenizer_that_adds_a_begin_token_by_itself_still_gives_one(make_tokenizer):
    chat = chat_format(make_tokenizer(adds_bos=True))
    assert encode_prompt(chat, [user("hi")]).count(1) == 1


def test_a_template_without_the_begin_token_is_followed_and_said(make_tokenizer):
    template = "{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    chat = chat_format(make_tokenizer(template, adds_bos=True))
    assert 1 not in encode_prompt(chat, [user("hi")])
    assert any("no begin token" in note for note in chat.notes)


@pytest.mark.parametrize("template", ["simple", None])
def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_between_prompt_and_response(
    make_tokenizer, tokenizer, template
):
    spaced = make_tokenizer(tokenizer.chat_template if template else None, space_first=True)
    chat = chat_format(spaced)
    ids = encode_response(chat, [user("hi\n")], [assistant("yes")])
    assert spaced.convert_ids_to_tokens(ids)[:-1] == ["y", "e", "s"]


def test_a_prompt_that_the_template_rewrites_once_answered_is_trained_as_generation_gets_it(make_tokenizer):
    # Like templates that move a system message: the first user turn is shortened once there are two answers.
    template = (
        "{% for m in messages %}{{ (m['content'][:1] if loop.first and messages|length > 3 else m['content']) "
        "+ '<end>' }}{% endfor %}"
    )
    chat = chat_format(make_tokenizer(template))
    prompt = [user("first"), assistant("a"), user("b")]
    assert chat.tokenizer.decode(encode_prompt(chat, prompt)) == "first<end>a<end>b<end>"
    assert chat.tokenizer.decode(encode_response(chat, prompt, [assistant("c")])) == "c<end>"
    tokens = tokenize([Preference(prompt, [assistant("c")], [assistant("d")], "f:1")], chat)
    assert len(tokens.rows) == 1
    assert "1 of 1 rows: the template writes the prompt otherwise once it is answered" in in_words(tokens)[0]


def test_a_template_that_can_never_be_split_is_refused_at_once(make_tokenizer):
    counts = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match=r"not the beginning .*; give another model's template"):
        tokenize([], chat_format(make_tokenizer(counts)))
    assert encode_prompt(chat_format(make_tokenizer(counts)), [user("a")])  # Generation needs no more.
    with pytest.raises(InputError, match="fails on a one-turn conversation"):
        chat_format(make_tokenizer("{{ raise_exception('never') }}"))
    with pytest.raises(InputError, match="fails on a one-turn conversation"):
        chat_format(make_tokenizer("{% for %}"))


def test_nothing_to_end_a_response_with_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="nothing can end a response"):
        chat_format(tokenizer)


def test_a_response_is_one_assistant_turn(tokenizer):
    with pytest.raises(RowRefused, match="assistant, user, assistant") as caught:
        encode_response(chat_format(tokenizer), [user("a")], [assistant("b"), user("c"), assistant("d")])
    assert caught.value.reason == SEVERAL_TURNS


def test_a_clock_in_the_template_is_stopped(make_tokenizer):
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    )
    chat = chat_format(make_tokenizer(template))
    assert chat.tokenizer.decode(encode_prompt(chat, [user("a")])) == f"{PINNED_DATE}a<end>"
    assert any(PINNED_DATE in note for note in chat.notes)
    named = chat_format(chat.tokenizer, {"date_string": "today"})
    assert named.tokenizer.decode(encode_prompt(named, [user("a")])) == "todaya<end>"


# --- loading --------------------------------------------------------------------------------------------


def test_a_template_comes_from_a_file_or_from_another_model_with_its_special_tokens(make_tokenizer, tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path / "base")
    other = make_tokenizer("{% for m in messages %}{{ m['content'] + '<stop>' }}{% endfor %}")
    other.add_special_tokens({"eos_token": "<stop>"})
    other.save_pretrained(tmp_path / "chat")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}")

    from_file = chat_format(load_tokenizer(tmp_path / "base", tmp_path / "own.jinja"))
    assert from_file.tokenizer.convert_ids_to_tokens(from_file.end_id) == "<end>"
    base = load_tokenizer(tmp_path / "base")
    from_model = chat_format(load_tokenizer(tmp_path / "base", tmp_path / "chat"))
    assert from_model.tokenizer.convert_ids_to_tokens(from_model.end_id) == "<stop>"
    assert len(from_model.tokenizer) == len(base) + 1


def test_what_cannot_be_loaded_is_said_in_one_line(make_tokenizer, tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path / "base")
    for name, template, message in (
        (tmp_path / "nothing", None, "there is no file or folder"),
        ("nobody/nothing", None, "no tokenizer can be loaded"),
        (tmp_path / "base", tmp_path / "no.jinja", "cannot be read"),
        (tmp_path / "base", tmp_path / "base", "has no chat template"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_tokenizer(name, template)
        assert "\n" not in str(caught.value)


# --- tokenizers of model families -----------------------------------------------------------------------

# How to make one, the folder of the real one, options of the template, the end token.
FAMILIES = {
    "llama-3.2": (llama3_tokenizer, {}, "<|eot_id|>"),
    "qwen3": (qwen3_tokenizer, {}, "<|im_end|>"),
    "qwen3 without thinking": (qwen3_tokenizer, {"enable_thinking": False}, "<|im_end|>"),
    "gemma-3": (gemma3_tokenizer, {}, "<end_of_turn>"),
}


def assert_rows_are_what_generation_is_given(chat, records, end):
    """199 of 200 rows: the prompt's ids as `generate` gets them, and with each response the rendered text."""
    tokenizer = chat.tokenizer
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == end
    tokens = tokenize(records, chat, max_length=100_000)
    assert (len(records), len(tokens.rows)) == (200, 199)
    assert [drop.reason for drop in tokens.drops] == ["identical responses"]
    by_source = {record.source: record for record in records}
    for row in tokens.rows:
        record = by_source[row.id]
        prompt = row.prompt_ids.tolist()
        assert prompt == template_ids(chat, record.prompt)
        if tokenizer.bos_token_id is not None:
            assert prompt.count(tokenizer.bos_token_id) == 1
        for ids, messages in zip(map(list, row.responses), (record.chosen, record.rejected), strict=True):
            assert ids[-1] == chat.end_id
            assert ids.count(chat.end_id) == 1
            text = template_text(chat, [*record.prompt, *messages])
            cut = text[: text.rindex(end) + len(end)]
            # Qwen's tokenizers write every text in NFC.
            assert tokenizer.decode(prompt + ids) == (
                unicodedata.normalize("NFC", cut) if "im_end" in end else cut
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_200_rows_are_what_generation_would_be_given(name):
    make, options, end = FAMILIES[name]
    records = rows_from_records(preference_rows(200), name="made").preferences
    assert_rows_are_what_generation_is_given(chat_format(make(), options), records, end)


@pytest.mark.parametrize("name", ["llama-3.2", "qwen3", "qwen3 without thinking"])
def test_200_ultrafeedback_rows_are_what_generation_would_be_given(name, official_data):
    _, options, end = FAMILIES[name]
    chat = chat_format(load_tokenizer(official_data / "tokenizers" / name.split()[0]), options)
    records = read_rows(official_data / "preferences" / "ultrafeedback_eval.jsonl.gz").preferences
    assert_rows_are_what_generation_is_given(chat, records, end)


def test_qwen3_leaves_the_line_break_behind_the_turn_out():
    chat = chat_format(qwen3_tokenizer(), {"enable_thinking": False})
    assert chat.suffix == "<|im_end|>\n"
    assert chat.notes == ()
    assert chat.tokenizer.decode(encode_response(chat, [user("a")], [assistant("b")])) == "b<|im_end|>"
    assert chat.tokenizer.decode(encode_prompt(chat, [user("a")])).endswith("<think>\n\n</think>\n\n")


def test_qwen3_as_it_is_trains_the_empty_think_block_and_says_so():
    chat = chat_format(qwen3_tokenizer())
    response = chat.tokenizer.decode(encode_response(chat, [user("a")], [assistant("b")]))
    assert response == "<think>\n\n</think>\n\nb<|im_end|>"
    assert any("enable_thinking: false" in note for note in chat.notes)


def test_gemma_ends_a_turn_with_its_own_token_and_not_with_eos():
    gemma = chat_format(gemma3_tokenizer())
    assert gemma.tokenizer.convert_ids_to_tokens(gemma.end_id) == "<end_of_turn>"
    assert gemma.end_id != gemma.tokenizer.eos_token_id
    assert gemma.suffix == "<end_of_turn>\n"
    assert encode_prompt(gemma, [user("hi")]) == template_ids(gemma, [user("hi")])


def test_gemma_merges_a_system_message_and_refuses_turns_that_do_not_alternate():
    gemma = chat_format(gemma3_tokenizer())
    assert encode_prompt(gemma, [{"role": "system", "content": "s"}, user("hi")])
    with pytest.raises(RowRefused, match="Conversation roles must alternate") as caught:
        encode_prompt(gemma, [user("hi"), user("again")])
    assert caught.value.reason == TEMPLATE_REFUSES


def test_padding_and_end_token_may_be_the_same():
    chat = chat_format(story_tokenizer())
    tokenizer = chat.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == chat.end_id
    story = [user("Tell me a story.")], [assistant("Once upon a time")]
    prompt, response = encode_prompt(chat, story[0]), encode_response(chat, *story)
    assert prompt == template_ids(chat, story[0])
    assert (
        prompt + response
        == tokenizer(template_text(chat, story[0] + story[1]), add_special_tokens=False)["input_ids"]
    )
    assert response[-1] == tokenizer.eos_token_id


def test_long_conversations_keep_every_turn():
    chat = chat_format(llama3_tokenizer())
    turns = [text.strip() for row in preference_rows(7) for text in (row["prompt"], row["chosen"])]
    for length in range(1, 14, 2):
        prompt = [(user, assistant)[i % 2](text) for i, text in enumerate(turns[:length])]
        text = chat.tokenizer.decode(encode_prompt(chat, prompt))
        assert all(turn["content"] in text for turn in prompt)
