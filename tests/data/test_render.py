"""What a template does with thoughts, tools, clocks and text rendered before is used, or the row is refused."""

from datetime import datetime
from functools import cache
from unittest import mock

import pytest

from benchmarks.templates import ROWS, outcome, stand_in
from slimepo.data.chat import chat_format
from slimepo.data.read import rows_from_records
from slimepo.data.render import LEFT_OUT, NOT_PREFIX_SAFE, SPECIAL_TOKEN, TEMPLATE_REFUSES, encode_prompt
from slimepo.data.tokenize import HARMLESS_TOKENS, in_words, tokenize
from slimepo.errors import InputError
from tests.data.conftest import SIMPLE_TEMPLATE, build_tokenizer
from tests.standins import qwen3_tokenizer, trl_template


@cache
def family(name, *options):
    return chat_format(stand_in(trl_template(name)), dict(options))


def outcomes(chat):
    return {kind: outcome(chat, rows_from_records([row]).preferences[0]) for kind, row in ROWS.items()}


def trained(chat, **row):
    """The texts of the prompt and of the answer, or the reason why the row is dropped."""
    tokens = tokenize(rows_from_records([row], name="f").preferences, chat, pairs=False)
    if tokens.drops:
        return tokens.drops[0].reason, tokens.drops[0].detail
    decode = chat.tokenizer.decode
    return decode(tokens.rows[0].prompt_ids), decode(tokens.rows[0].responses[0])


# What is kept is held to transformers' own rendering in `outcome`.
YES = dict.fromkeys(ROWS, "yes")
FAMILIES = {
    "qwen3": YES,
    "gptoss": YES,
    "glm4moe": YES,
    "llama3_2": YES | {"reasoning": LEFT_OUT},
    "gemma": YES | {"system": TEMPLATE_REFUSES} | dict.fromkeys(["reasoning", "call", "called"], LEFT_OUT),
    "cohere2": YES | dict.fromkeys(["reasoning", "call", "called"], LEFT_OUT),
    "llava_next": YES | dict.fromkeys(["reasoning", "call", "called"], LEFT_OUT),
    "nemotron_3_nano": dict.fromkeys(ROWS, NOT_PREFIX_SAFE) | {"think": "yes", "reasoning": "yes"},
    "qwen3_5_nothink": YES | {"think": NOT_PREFIX_SAFE, "reasoning": NOT_PREFIX_SAFE},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_is_judged_row_by_row(name):
    assert outcomes(family(name)) == FAMILIES[name]


def test_an_answer_that_was_thought_about_is_rendered_as_the_template_does():
    question = [{"role": "user", "content": "2+2?"}]
    thoughtful = [{"role": "assistant", "content": "4", "reasoning_content": "Add."}]
    assert trained(family("qwen3"), prompt=question, completion=thoughtful) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nAdd.\n</think>\n\n4<|im_end|>",
    )
    written = "<think>\nAdd.\n</think>\n\n4"
    for name, end in (
        ("deepseek_r1_distill_training", "<｜end▁of▁sentence｜>"),
        ("nemotron_3_nano", "<|im_end|>"),
    ):
        prompt, answer = trained(family(name), prompt=question, completion=written)
        assert prompt.endswith("<think>\n")
        assert answer == f"Add.\n</think>\n\n4{end}"
    reason, detail = trained(family("llama3_2"), prompt=question, completion=thoughtful)
    assert (reason, detail) == (LEFT_OUT, "the chat template does not write 'Add.' of the answer")


def test_a_row_brings_options_for_its_template():
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    prompt, answer = trained(family("qwen3"), prompt="2+2?", completion="4", **options)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert answer == "4<|im_end|>"
    assert trained(family("llama3_2"), prompt="2+2?", completion="4", **options)[0] == LEFT_OUT


def test_calls_end_in_the_token_that_the_template_ends_them_with():
    for name, end in (("gptoss", "<|call|>"), ("gemma4", "<|tool_response>"), ("llama3_2", "<|eot_id|>")):
        prompt, answer = trained(family(name), **ROWS["call"])
        assert "sum_of_two" in prompt
        assert "sum_of_two" in answer
        assert answer.endswith(end)


def test_ways_out_are_ones_that_work():
    nano = family("nemotron_3_nano")
    assert "enable_thinking: false" in nano.way_out
    assert set(outcomes(family("nemotron_3_nano", ("enable_thinking", False))).values()) >= {"yes"}
    assert (
        trained(family("nemotron_3_nano", ("enable_thinking", False)), prompt="q", completion="a")[1]
        == "a<|im_end|>"
    )
    assert "enable_thinking: true" in family("qwen3_5_nothink").way_out
    assert any("enable_thinking: false" in note for note in family("qwen3_5_think").notes)
    assert family("llama3_2").way_out == family("gptoss").way_out == ""
    distilled = family("deepseek_r1_distill")
    with pytest.raises(InputError, match=r"give another model's template \(chat_template\), or your own$"):
        tokenize([], distilled)
    assert encode_prompt(distilled, [{"role": "user", "content": "q"}])


def test_a_template_that_reads_the_clock_writes_the_same_every_day():
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 1, 2)

    for name in ("gptoss", "llama3_2"):
        chat = chat_format(stand_in(trl_template(name)))
        today = encode_prompt(chat, [{"role": "user", "content": "q"}])
        with mock.patch("transformers.utils.chat_template_utils.datetime", Tomorrow):
            assert encode_prompt(chat, [{"role": "user", "content": "q"}]) == today
        assert "2024" in chat.tokenizer.decode(today)


def test_a_system_message_that_moves_leaves_the_answer_where_generation_has_it():
    # As Mistral-Nemo's: the system text stands in the last user turn, if that turn is the last message.
    template = (
        "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{{ '[Q]' + (system + ' ' if loop.last and system else '') + m.content + '[/Q]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    chat = chat_format(build_tokenizer(template))
    prompt = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Name a colour."}]
    assert trained(chat, prompt=prompt, completion="Blue") == (
        "<s>[Q]Be terse. Name a colour.[/Q]",
        "Blue</s>",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<s>user: q<end>\nassistant: ", "completion": "a"},
        {"prompt": "q", "completion": "a<end>"},
        {"prompt": "q", "completion": "a</s>"},
    ],
)
def test_text_that_was_rendered_before_is_not_rendered_again(row):
    reason, detail = trained(chat_format(build_tokenizer()), **row)
    assert reason == SPECIAL_TOKEN
    assert "give the turns as messages" in detail


def test_without_a_template_text_that_was_rendered_before_is_used_as_it_is():
    chat = chat_format(build_tokenizer(None, adds_bos=True))
    for answer in ("a", "a</s>", "a</s>\n"):
        rendered = {"prompt": "<s>user: q<end>\nassistant: ", "completion": answer}
        assert trained(chat, **rendered) == ("<s>user: q<end>\nassistant: ", "a</s>")
        (row,) = tokenize(rows_from_records([rendered]).preferences, chat, pairs=False).rows
        assert len(row.responses[0]) == 2


def test_the_end_token_of_another_model_is_said():
    chat = chat_format(qwen3_tokenizer())
    for answer, kept in (("a</s>", True), ("<s>old</s> new", True), ("a<|im_end|>", False)):
        tokens = tokenize(
            rows_from_records([{"prompt": "q", "completion": answer}]).preferences, chat, pairs=False
        )
        assert bool(tokens.rows) is kept
        assert bool(tokens.remarks) is (answer == "a</s>")


def test_a_special_token_that_no_template_writes_is_said_and_the_row_kept():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<filename>"]})
    chat = chat_format(tokenizer)
    for answer in ("git add <filename>", "an <unk> word"):
        tokens = tokenize(
            rows_from_records([{"prompt": "q", "completion": answer}]).preferences, chat, pairs=False
        )
        assert tokenizer.decode(tokens.rows[0].responses[0]) == f"{answer}<end>"
        assert [remark.reason for remark in tokens.remarks] == [HARMLESS_TOKENS]
    # A tokenizer without a begin token forbids no word.
    tokenizer.bos_token = None
    assert trained(chat_format(tokenizer), prompt="q", completion="None")[1] == "None<end>"


def test_a_templates_marks_need_not_be_special_tokens():
    # As Mistral's first tokenizers.
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    )
    chat = chat_format(build_tokenizer(template))
    assert trained(chat, prompt="[INST] q [/INST]", completion="a")[0] == SPECIAL_TOKEN
    assert trained(chat, prompt="q", completion="<think>\nx\n</think>\n\na")[1].endswith("a</s>")


def test_marks_of_other_templates_are_said():
    chat = chat_format(build_tokenizer())
    rows = [{"prompt": text, "completion": "a"} for text in ("[INST] q [/INST]", "q", "So:\n\nHuman: q")]
    tokens = tokenize(rows_from_records(rows, name="f").preferences, chat, pairs=False)
    assert len(tokens.rows) == 3
    assert in_words(tokens) == [
        "2 of 3 rows: marks of a chat template or a transcript in the text (the first, f:row 1: '[INST]' in 'prompt')"
    ]


def test_an_anchor_that_melts_with_an_answer_gives_way_to_another():
    # A tokenizer that writes a space before any text, and knows "][" as one token.
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ 'Q: ' + m.content + '[A]' if m.role == 'user' else m.content + '<end>' }}{% endfor %}"
    )
    spaced = build_tokenizer(template, space_first=True, merged=("][", "]."))
    chat = chat_format(spaced)
    for answer in ("[1, 2]", "yes", ".5", " yes"):
        tokens = tokenize(
            rows_from_records([{"prompt": "q", "completion": answer}]).preferences, chat, pairs=False
        )
        (ids,) = tokens.rows[0].responses
        written = "".join(spaced.convert_ids_to_tokens(ids.tolist())[:-1]).replace("▁", " ")
        assert written == answer
        assert tokens.rows[0].prompt_ids.tolist()[-1] == spaced.convert_tokens_to_ids("]")


def test_a_prompt_that_ends_in_a_blank_has_one_blank_before_the_answer():
    chat = chat_format(build_tokenizer(SIMPLE_TEMPLATE, space_first=True, merged=("▁yes", "▁no")))
    for answer in ("yes", "no", "[1]"):
        tokens = tokenize(
            rows_from_records([{"prompt": "q", "completion": answer}]).preferences, chat, pairs=False
        )
        row = tokens.rows[0]
        together = chat.tokenizer.convert_ids_to_tokens([*row.prompt_ids, *row.responses[0]])
        assert "".join(together).replace("▁", " ").endswith(f"assistant: {answer}<end>")
