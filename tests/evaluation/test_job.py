"""A job's name and the names of its files."""

from collections.abc import Callable

import pytest

from slimepo.errors import InputError
from slimepo.evaluation.job import Job, file_label


def test_judges_names_in_file_names() -> None:
    assert file_label("gpt-4") == "gpt-4"
    assert file_label("org/m@http://127.0.0.1:8000/v1") == "org-m@127.0.0.1-8000-v1"
    assert file_label("hf:my model") == "hf-my-model"


@pytest.mark.parametrize("name", ["..", ".", "a/b", " a", "a\nb"])
def test_names_that_leave_the_folder_are_refused(name: str, job: Callable[..., Job]) -> None:
    with pytest.raises(InputError, match="cannot be a file name"):
        job("alpaca-eval", name)
