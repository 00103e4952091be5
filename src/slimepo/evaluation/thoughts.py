"""What a model thinks aloud, told apart from what it answers.

The rule: thoughts stand in front of the answer. A thought begins where a line begins with an opening mark, and ends at
the next closing mark; one that is never closed takes the rest, and where nothing else stands there is no answer. A
closing mark that no opening mark precedes ends a thought that the chat template had opened. Of gpt-oss's channels the
last `final` one is the answer, also where a server has left its marks out (`analysis...assistantfinal...`). A mark in
backticks is talked about, not used.
"""

from __future__ import annotations

import re

# Opening and closing marks: most models, Magistral, Seed, Command, Kimi.
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
_CHANNEL = "<|channel|>"
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*<\|message\|>")
_UNMARKED = re.compile(r"analysis(.+?)assistantfinal(.*)", re.DOTALL)
_MESSAGE = re.compile(r"<\|(?:channel|start|message|end|return|call)\|>")


def split_thoughts(text: str, *, opened: bool = False) -> tuple[str, str]:
    """Thoughts and answer, both without the marks and the white space around them; `opened` by the prompt already.

    An empty answer beside thoughts means that there is none: the thought was cut off.
    """
    if _CHANNEL in text:
        *before, last = _FINAL.split(text)
        answer = re.split(r"<\|(?:return|end|call)\|>", last)[0] if before else ""
        thought = " ".join(before) if before else text
        return " ".join(_MESSAGE.sub(" ", thought).split()), answer.strip()
    if unmarked := _UNMARKED.match(text):
        return unmarked[1].strip(), unmarked[2].strip()
    thoughts: list[str] = []
    answer = text
    for opening, closing in MARKS:
        a, b = (rf"(?<!`){re.escape(mark)}(?!`)" for mark in (opening, closing))
        # What the template opened comes first: no opening mark stands before its end.
        ends = re.search(b, answer, re.IGNORECASE)
        starts = re.search(a, answer, re.IGNORECASE)
        if ends and not (starts and starts.start() < ends.start()):
            thoughts.append(answer[: ends.start()])
            answer, opened = answer[ends.end() :], False

        def keep(match: re.Match[str]) -> str:
            thoughts.append(match[1])
            return ""

        answer = re.sub(rf"^[ \t]*{a}(.*?)(?:{b}|\Z)", keep, answer, flags=re.I | re.M | re.S)
    if opened:
        thoughts, answer = [*thoughts, answer], ""
    return "\n".join(
        each.strip() for each in thoughts if each.strip()
    ), answer.strip() if thoughts else answer


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends in an opening mark, as templates of some thinking models do."""
    return prompt.rstrip().lower().endswith(tuple(opening.lower() for opening, _ in MARKS))
