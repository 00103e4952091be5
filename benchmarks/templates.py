"""Which rows each chat template can be trained with: `python -m benchmarks.templates` writes docs/templates.md.

Templates are those that come with TRL, and every .jinja file of the folders given. Each is put on a stand-in tokenizer,
one token a byte, with the special tokens that the template's text names, and rendered with rows of several kinds. What
is kept is held to what generation is given, by transformers alone: the ids of the prompt, one begin token, the end
token trained once and last, and between them nothing but what the template writes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slimepo.data.chat import chat_format
from slimepo.data.read import rows_from_records
from slimepo.data.render import LEFT_OUT, NOT_PREFIX_SAFE, REWRITTEN, TEMPLATE_REFUSES, ChatFormat
from slimepo.data.rows import Row
from slimepo.data.tokenize import tokenize
from slimepo.errors import InputError
from slimepo.types import Message, Preference

PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
_TOKEN = re.compile(r"<[|｜/]?[A-Za-z][^<>\s{}'\"\\=]{0,40}[|｜]?>|\[/?[A-Z_]{3,30}\]|\]<\]")
_USUAL_END = (
    "<|END_OF_TURN_TOKEN|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|return|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)

_USER, _ANSWER = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "sum_of_two",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "integer", "description": name} for name in "ab"},
            "required": ["a", "b"],
        },
    },
}  # fmt: skip
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "sum_of_two", "arguments": {"a": 2, "b": 2}},
        }
    ],
}
_RESULT = {"role": "tool", "name": "sum_of_two", "tool_call_id": "abcdefghi", "content": "4"}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": [_USER], "completion": [_ANSWER]},
    "system": {"prompt": [{"role": "system", "content": "Be terse."}, _USER], "completion": [_ANSWER]},
    "turns": {"prompt": [_USER, _ANSWER, {"role": "user", "content": "And 3+3?"}], "completion": "6"},
    "think": {"prompt": [_USER], "completion": "<think>\nAdd two and two.\n</think>\n\n4"},
    "reasoning": {
        "prompt": [_USER], "completion": [{**_ANSWER, "reasoning_content": "Add two and two."}]
    },
    "call": {"prompt": [_USER], "completion": [_CALL], "tools": [_TOOL]},
    "called": {"prompt": [_USER, _CALL, _RESULT], "completion": [_ANSWER], "tools": [_TOOL]},
}  # fmt: skip


WORDS = {LEFT_OUT: "left out", NOT_PREFIX_SAFE: "rewritten", TEMPLATE_REFUSES: "refused"}
INTRODUCTION = """# Chat templates

Which rows can be trained with which template. The tables are made by `python -m benchmarks.templates`. Every row that
is kept was compared with what transformers makes of its messages: the prompt has the ids that generation is given,
there is one begin token (none if the template writes none), and what is trained is the answer as the template writes
it and one end token.

The rows: `plain`, one question and its answer; `system`, with a system message; `turns`, with an earlier exchange;
`think`, an answer that begins with a `<think>` block in its text; `reasoning`, with its thoughts in
`reasoning_content`; `call`, an answer that calls a tool from `tools`; `called`, an answer after a call and its
result.

What happens to them: **yes**, the row is trained. **moved**, the row is trained after the prompt that generation is
given, although the template writes that prompt differently once it is answered. All others are dropped and counted:
**left out**, the template does not write something in the row (the thoughts, the tools, the call); **rewritten**, the
rendered prompt is not the beginning of the rendered whole, and nothing else identifies the answer; **refused**, the
template itself says no; **no**, no answer at all can be trained with it. The last column names options of the
template that help (`template_options`), each of which was tried.

The tokenizers are stand-ins with one token a byte and the special tokens that a template names, so the end token may
be a different one if the template writes none. The text of these templates could not be obtained when the tables were
made: Mistral v7, OLMo, Phi-4, Granite 3.3, and Gemma 2 (which is said to be Gemma's).

"""


def stand_in(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte, with the special tokens that a template's text names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = [
        token
        for token in dict.fromkeys(_TOKEN.findall(template))
        if not token.startswith(("<tool", "</tool"))
    ]
    ends = [token for token in _USUAL_END if token in named] or ["</s>"]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in [*named, "<s>", "</s>"]]
    )
    bos = next((token for token in ("<|begin_of_text|>", "<bos>") if token in named), "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token=bos, eos_token=ends[0],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def outcome(chat: ChatFormat, record: Preference) -> str:
    """'yes', 'moved' (the template rewrites the prompt once it is answered), or why the row is dropped.

    Raises:
        AssertionError: a row that is kept is not what generation would be given.
    """
    tokens = tokenize([record], chat, pairs=False, max_length=100_000)
    if tokens.drops:
        return tokens.drops[0].reason
    moved = any(remark.reason == REWRITTEN for remark in tokens.remarks)
    check_row(chat, record, tokens.rows[0], moved)
    return "moved" if moved else "yes"


def check_row(chat: ChatFormat, record: Preference, row: Row, moved: bool) -> None:
    """Hold a row to what transformers alone makes of its messages, on the day at which the clock is stopped."""
    tokenizer, options = chat.tokenizer, {**chat.template_options, **record.template_options}
    turns, answer = (
        [_in_parts(turn) if chat.parts else turn for turn in part] for part in (record.prompt, record.chosen)
    )
    with mock.patch("transformers.utils.chat_template_utils.datetime", _Stopped):
        given = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )["input_ids"]
        whole = str(tokenizer.apply_chat_template([*turns, *answer], tokenize=False, **options))
    prompt, (response,) = row.prompt_ids.tolist(), (ids.tolist() for ids in row.responses)
    assert prompt == given, "the prompt is not what generation is given"
    assert prompt.count(tokenizer.bos_token_id) == whole.count(str(tokenizer.bos_token)), (
        "not one begin token"
    )
    assert response.count(response[-1]) == 1, "the end token is trained twice"
    end = str(tokenizer.decode(response[-1:]))
    text = str(tokenizer.decode(response[:-1]))
    if not moved:
        written = whole[len(str(tokenizer.decode(prompt))) :]
        assert written.startswith(text), "trained is what the template does not write"
        behind = written[len(text) :]
        rest = behind.removeprefix(end).strip()
        # Some write the generation prompt behind every answer.
        opens = bool(rest) and str(tokenizer.decode(prompt)).rstrip().endswith(rest)
        assert rest in ("", str(tokenizer.eos_token)) or opens, f"{behind!r} is left out"
    assert whole.count(text) >= 1, "the answer is not in the conversation"


def _in_parts(turn: Message) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


class _Stopped(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime(2024, 7, 26, 12)


def table(name: str, folder: Path) -> Iterator[str]:
    """The lines of one table in Markdown: a template a line."""
    yield from (
        f"## {name}",
        "",
        f"| template | {' | '.join(ROWS)} | ends in | options |",
        "|---" * (len(ROWS) + 3) + "|",
    )
    for path in sorted(folder.glob("*.jinja")):
        try:
            chat = chat_format(stand_in(path.read_text(encoding="utf-8")))
        except InputError as error:
            yield f"| `{path.stem}` |" + " |" * len(ROWS) + f" | {error} |"
            continue
        records = rows_from_records(ROWS.values()).preferences
        outcomes = ["no"] * len(ROWS) if chat.refusal else [outcome(chat, record) for record in records]
        end = "" if chat.refusal else f"`{chat.tokenizer.decode([chat.end_id])}`".replace("|", "\\|")
        cells = [WORDS.get(each, each) for each in outcomes]
        yield f"| `{path.stem}` | {' | '.join(cells)} | {end} | {chat.way_out.removeprefix('; ')} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER", help="more .jinja files")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in args.folders)
    folders = {f"TRL {version('trl')}": str(files("trl") / "chat_templates"), **given}
    lines = [line for name, folder in folders.items() for line in table(name, Path(folder))]
    args.out.write_text(INTRODUCTION + "\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
