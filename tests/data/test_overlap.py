"""What two sets of prompts share, by hand."""

from slimepo.data.overlap import overlap


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
