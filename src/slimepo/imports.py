"""Functions of a user's own, by their path: package.module:function or file.py:function."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from slimepo.errors import InputError


def find_function(name: str, what: str) -> Callable[..., Any]:
    """The function at `name`; a relative file is looked for here and where modules are (`look_beside`).

    `what` it is for (loss, checker) stands in the errors.

    Raises:
        InputError: nothing can be imported there, or it cannot be called.
    """
    place, _, attribute = name.rpartition(":")
    # The command line's own folder is not on the path as it is for `python`.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = _import_file(place) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, attribute)
    except Exception as error:
        # A user's module can fail in any way while it is imported.
        raise InputError(f"{what} {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise InputError(f"{what} {name!r} is not a function")
    return function  # type: ignore[no-any-return]


def look_beside(file: str | Path) -> None:
    """Let the functions that a recipe or a sweep names lie beside its file."""
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _import_file(path: str) -> ModuleType:
    found = next((p for folder in ("", *sys.path) if (p := Path(folder, path)).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no such file here or beside the recipe: {path}")
    return _run_file(found.resolve(), found.stat().st_mtime_ns)


@functools.cache
def _run_file(path: Path, modified: int) -> ModuleType:
    """The module in a file, run once; again where the file has been `modified` since."""
    name = f"slimepo_own_{path.stem}_{modified}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, for one, look their module up there.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
