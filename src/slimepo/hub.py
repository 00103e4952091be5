"""The Hugging Face Hub where there is no network: what is in the cache, and else an error at once."""

from __future__ import annotations

import functools
import os
import socket
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

_SECONDS = 3.0


def look_for_hub(name: str) -> None:
    """Before the Hub is asked for a name that is no local path: work offline, at once, where it cannot be reached."""
    if not Path(name).exists():
        _look()


@functools.cache
def _look() -> None:
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    # Behind a proxy nothing can be told without asking it.
    if constants.HF_HUB_OFFLINE or address.scheme in urllib.request.getproxies():
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError:
        # Otherwise every file is tried for minutes.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def offline() -> bool:
    """Whether the Hub is not asked: it cannot be reached, or HF_HUB_OFFLINE says so."""
    from huggingface_hub import constants

    _look()
    return bool(constants.HF_HUB_OFFLINE)
