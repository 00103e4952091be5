"""Triton's kernels run under its interpreter where there is no GPU; empty memory is poisoned with NaN."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read when the kernels are defined, at their first use.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out unwritten holds NaN (True for bool), so that reading it shows."""

    def poison(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def empty(*args: Any, **kwargs: Any) -> Tensor:
            made: Tensor = original(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else 1)

        monkeypatch.setattr(owner, name, empty)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        poison(owner, name)
