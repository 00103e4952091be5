"""Some of the fuzz's cases, the same ones each time; `make fuzz` runs a thousand."""

from pathlib import Path

import pytest

from tests.command import Done
from tests.reliability.fuzz import KINDS, broken, run_case


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[kind.__name__ for kind in KINDS])
def test_bad_input_ends_as_the_contract_says(kind: int, sound: Path) -> None:
    for number in range(kind, 6 * len(KINDS), len(KINDS)):
        case, done, how = run_case(number, sound)
        assert not how, f"case {number}, {case.arguments}: {how}\n{done.stderr[-1000:]}"


def test_what_breaks_the_contract_is_seen() -> None:
    assert broken(Done(1, "", "error: x\n")) == "exit code 1"
    assert broken(Done(2, "", "Usage: slimepo\n")) == "0 lines of error"
    assert broken(Done(2, "", "error: x\nerror: y\n")) == "2 lines of error"
    assert broken(Done(2, "", "Traceback (most recent call last):\nerror: y\n")) == "a traceback"
    assert broken(Done(2, "", "error: x\n")) == broken(Done(0, "done\n", "")) == ""
