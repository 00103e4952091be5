"""What two sets of prompts share, by hand."""

from slimepo.data.overlap import found_in, overlap
from slimepo.types import Message


def test_whole_prompts_and_runs_of_words() -> None:
    ours = ["Tell me, please: who is Lily?", "Name a bird.", "Say who is Lily, please, in one word."]
    theirs = ["tell me please\nwho is LILY", "Do you know who is Lily, please?"]
    found = overlap(ours, theirs, (3, 6, 9))
    assert (found.prompts, found.same) == (3, 1)
    # Of three: tell-me-please, me-please-who, please-who-is, who-is-lily; is-lily-please.
    assert found.shared == {3: (2, 5), 6: (1, 1), 9: (0, 0)}
    assert found.longest == "tell me please who is lily"


def test_nothing_in_common() -> None:
    found = overlap(["One two"], ["three"])
    assert (found.same, found.shared[5], found.longest) == (0, (0, 0), "")


def test_prompts_that_differ_in_case_blanks_and_the_last_punctuation_are_found() -> None:
    def asked(*texts: str) -> list[Message]:
        return [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, texts, strict=False)
        ]

    theirs = [asked("Name  a bird."), asked("Hi", "Hello", "3 + 4 ="), asked("3 - 4?")]
    ours = [
        asked("name a\nBIRD"),
        asked("hi!", "hello.", "3 + 4 = ?"),
        asked("3 + 4?"),
        asked("Name", "a bird"),
    ]
    assert found_in(ours, theirs) == [0, 1]
    assert found_in(ours, theirs[:1]) == [0]
