"""What every test may use: a tiny Llama, the real files where they are there; offline torch on one thread."""

import gc
import os
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As the command line has it; read when huggingface_hub is first imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Tiny models run faster on one thread, and the same number of threads gives the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
GPU = Path("/dev/nvidia0").exists()
if os.environ.get("SLIMEPO_TEST_GPU") != "1":
    # Tests are of the CPU, to the bit, also where a GPU is; `make gpu` runs those of the device. Before torch is
    # imported, and Triton, which any test may do before the kernels' own.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def official_data() -> Path:
    """The folder of real files beside the checkout: every test that asks for it is of the set `official`."""
    if not SHARED.is_dir():
        pytest.skip(f"no official files at {SHARED}")
    return SHARED


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "official_data" in getattr(item, "fixturenames", ()):
            item.add_marker("official")


def pytest_collection_finish() -> None:
    """Whatever is imported by now stays: accelerate collects garbage in every training, and need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI=true and no GPU is, only tests may skip that need one, a registry, the real files or vLLM, if absent."""
    report = yield
    absent = (item.get_closest_marker("official") and not SHARED.is_dir()) or (
        item.get_closest_marker("vllm") and find_spec("vllm") is None
    )
    if not item.get_closest_marker("gpu") and not item.get_closest_marker("weights") and not absent:
        fail_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_skip(report)
    return report


def fail_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") == "true" and not GPU and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"nothing may skip in CI. {reason}"


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a trained tokenizer and a chat template."""
    from tests.standins import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def made_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evaluation.made import write_files

    return write_files(tmp_path_factory.mktemp("made"))


@pytest.fixture
def data_dir(made_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up files of the benchmarks, as `--data-dir` takes them: they are pinned in place of the official ones."""
    from slimepo.evaluation.benchmarks.sources import SOURCES
    from tests.evaluation.made import pins

    for name, source in pins(made_files).items():
        monkeypatch.setitem(SOURCES, name, source)
    return made_files


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An offline judge that speaks the OpenAI protocol, and the key that must never show anywhere."""
    from tests.evaluation.mock_judge import KEY, serve

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as judge:
        yield judge


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that a test keeps between runs lands in, or comes from, the user's own cache."""
    os.environ["SLIMEPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def rows() -> Callable[..., list[Any]]:
    """Makes tokenised pairs of unequal lengths."""
    from tests.tiny import random_rows

    return random_rows
