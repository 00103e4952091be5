"""Thoughts in front of an answer, in the forms that models and servers write them."""

import pytest

from slimepo.evaluation.thoughts import opens_thought, split_thoughts


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("<think>Perhaps [[2]].</think> Rating: [[9]]", "Perhaps [[2]].", "Rating: [[9]]"),
        ("\n<THINK>\na\nb\n</THINK>\n\nc", "a\nb", "c"),
        ("opened by the template\n</think>\n\nc", "opened by the template", "c"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("<thinking>a</thinking>b", "a", "b"),
        ("<seed:think>a</seed:think>b", "a", "b"),
        ("◁think▷a◁/think▷b", "a", "b"),
        ("<think>a</think>b\n<think>c</think>d", "a\nc", "b\nd"),
        ("<think>[[A>>B]] or", "[[A>>B]] or", ""),
        ("<think></think>\n\nb", "", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
         "analysis a assistant", "b"),
        ("<|channel|>analysis<|message|>a", "analysis a", ""),
        ("analysisWe think.assistantfinalYes.", "We think.", "Yes."),
    ],
)  # fmt: skip
def test_thoughts_and_answer(text: str, thoughts: str, answer: str) -> None:
    assert split_thoughts(text) == (thoughts, answer)


@pytest.mark.parametrize(
    "text",
    [
        " It is 4.\n",
        "",
        "The tags `<think>` and `</think>` are its marks.",
        "Say <think> where you like.",
        "[[A>B]]",
    ],
)
def test_an_answer_that_thinks_not_aloud_stays_as_it_is(text: str) -> None:
    assert split_thoughts(text) == ("", text)


def test_a_thought_that_the_prompt_opened_needs_its_end() -> None:
    assert opens_thought("<|im_start|>assistant\n<think>\n")
    assert not opens_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert split_thoughts("still at it", opened=True) == ("still at it", "")
    assert split_thoughts("so</think>4", opened=True) == ("so", "4")
