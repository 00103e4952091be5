"""What every test may use: the shared real data where it is there, and single-threaded, offline torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models run faster on one thread, and the same number of threads gives the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidia0").exists():
    # Triton reads this when it is first imported, which any test may do before the kernels' own.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that a test keeps between runs lands in, or comes from, the user's own cache."""
    os.environ["SLIMEPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def rows() -> Callable[..., list[Any]]:
    """Makes tokenised pairs of unequal lengths."""
    from tests.tiny import random_rows

    return random_rows
