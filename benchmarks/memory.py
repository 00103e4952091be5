"""Memory of this process: what it holds now, and the most it has held since it was asked to forget."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def settle() -> int:
    """Give freed memory back to the system; returns the bytes still resident."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return _status("VmRSS")


def forget_peak() -> None:
    """Start the peak anew (on Linux; elsewhere it stays the most since the process began)."""
    if _FORGET.exists():
        _FORGET.write_text("5")


def peak() -> int:
    """The most bytes resident since `forget_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    # In bytes on macOS, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
