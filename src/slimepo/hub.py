"""The Hugging Face Hub where there is no network: what is in the cache, and else an error at once."""

from __future__ import annotations

import functools
import os
import re
import ssl
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from slimepo.errors import InputError
from slimepo.words import nearest_entry

# For the Hub to answer; and for the name of its server to be found as well, which has no limit of its own.
_SECONDS, _AT_MOST = 4.0, 7.0
# How its libraries say that they have not reached it.
_OFFLINE = re.compile(
    r"couldn't (connect|reach)|can(no|')t reach|offline mode|outgoing traffic", re.IGNORECASE
)


def look_for_hub(name: str, said: str = "") -> None:
    """Before the Hub is asked for a name that is no local path: work offline, at once, where it cannot be reached.

    Raises:
        InputError: it can be no name of a repository either; `said` stands before that.
    """
    if not Path(name).exists():
        if not is_hub_id(name):
            raise InputError(f"{said}there is no file or folder {name}{nearest_entry(Path(name))}")
        _look()


def not_given(said: str) -> str:
    """Why there is no such thing: what its library says of it, and that the Hub cannot be reached, told once."""
    reason = _look() if _look.cache_info().currsize else ""
    if not reason:
        return said
    away = f"the Hub cannot be reached ({reason}), and the cache does not have it"
    return away if _OFFLINE.search(said) else f"{said}; {away}"


@functools.cache
def _look() -> str:
    """Why the Hub cannot be reached, and from then on is not asked; nothing where it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found = ["no answer"]
    # As a daemon: a name server that does not answer keeps it, and nobody else.
    asking = threading.Thread(target=lambda: found.__setitem__(0, _asked(constants.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(_AT_MOST)
    if found[0]:
        # Otherwise every file is tried for minutes.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return found[0]


def offline() -> bool:
    """Whether the Hub is not asked: it cannot be reached, or HF_HUB_OFFLINE says so."""
    from huggingface_hub import constants

    _look()
    return bool(constants.HF_HUB_OFFLINE)


def _asked(address: str) -> str:
    """Why there is no answer of any kind, through the proxies of the environment; nothing where there is one."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        reason = getattr(error, "reason", error)
        # Whom to trust is for the Hub's own library to say, which may know other certificates.
        return "" if isinstance(reason, ssl.SSLError) else str(reason)
    return ""


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository of the Hub, and neither it nor its first part is a folder here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists() and not ("/" in name and Path(name).parent.is_dir())
