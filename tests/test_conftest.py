"""In CI nothing skips unseen."""

import os
from pathlib import Path

import pytest

from tests import conftest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_passes(): pass
def test_skips(): pytest.skip("no wings")
@pytest.mark.xfail
def test_is_known_to_fail(): assert False
@pytest.mark.gpu
def test_needs_a_gpu(): pytest.skip("no GPU")
@pytest.mark.vllm
def test_needs_vllm(): pytest.skip("no vLLM")
def test_needs_a_file(official_data): pass
"""


@pytest.fixture
def folder(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("CI", raising=False)
    # What the tests in there set is put back.
    monkeypatch.setenv("SLIMEPO_CACHE", os.environ["SLIMEPO_CACHE"])
    pytester.makeconftest(
        Path(conftest.__file__).read_text() + "\nGPU = False\nfind_spec = lambda name: None\n"
    )
    pytester.makepyfile(test_one=TESTS, test_two="import pytest; pytest.importorskip('no_such_wings')")
    return pytester


def test_a_skip_that_is_not_allowed_fails(folder: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = folder.runpytest("--continue-on-collection-errors")
    result.assert_outcomes(passed=1, failed=1, errors=1, skipped=3, xfailed=1)
    result.stdout.fnmatch_lines(["*nothing may skip in CI. Skipped: no wings*"])


def test_outside_ci_it_only_skips(folder: pytest.Pytester) -> None:
    folder.runpytest().assert_outcomes(passed=1, skipped=5, xfailed=1)


def test_the_official_set_is_what_asks_for_the_files(folder: pytest.Pytester) -> None:
    folder.runpytest("-m", "official").assert_outcomes(skipped=2, deselected=5)
