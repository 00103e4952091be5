"""Which libraries the figures of a run depend on."""

from __future__ import annotations

import platform
from importlib import metadata

_LIBRARIES = ("slimepo", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Python, the machine's kind and the libraries that the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "absent"
    return found
