"""The bytes that tensors hold, followed operator by operator; works on tensors without data (fake tensors) too."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every storage that an operator makes is counted while it lives, forward and backward.

    `peak` is the most bytes alive at once, by kind; the kind of a storage is the one in force when it was made
    (`kind`), or the one it was counted under by `count`. What operators use inside themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kind = "activations"
        self._total = self._most = 0
        self._storages: dict[int, tuple[str, int]] = {}

    def count(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that were made outside, or count them under another kind than they were."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                before, size = self._storages[key]
                self._storages[key] = (kind, size)
                self.alive.update({before: -size, kind: size})
            else:
                self._add(tensor, kind)

    def start_anew(self) -> Counter[str]:
        """The peak so far; the next one starts from what is alive now."""
        peak, self.peak, self._most = self.peak, Counter(self.alive), self._total
        return peak

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Inside, new storages are of that kind."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value, self._kind)
        return result

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage: Any = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = (kind, size)
        self.alive[kind] += size
        self._total += size
        weakref.finalize(storage, self._free, key)
        if self._total > self._most:
            self._most, self.peak = self._total, Counter(self.alive)

    def _free(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self.alive[kind] -= size
        self._total -= size
