"""The examples in the docstrings of objectives and kernels run, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from slimepo import kernels, losses

MODULES = [
    name
    for package in (losses, kernels)
    for name in (
        package.__name__,
        *(f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)),
    )
    # Triton's modules need its package, and hold nothing public.
    if "triton" not in name
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("package", [losses, kernels])
def test_every_public_function_has_an_example(package: object) -> None:
    public = [getattr(package, name) for name in package.__all__]  # type: ignore[attr-defined]
    without = [f.__name__ for f in public if inspect.isfunction(f) and ">>> " not in (f.__doc__ or "")]
    assert not without
