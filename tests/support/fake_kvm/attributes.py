"""Attributes of pages, which several vCPUs' threads may change at once: KVM takes a lock, too."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from vmm.core.ranges import Range, RangeMap


class Attributes(RangeMap[int]):
    """A RangeMap with a lock around each call."""

    __slots__ = ("_lock",)

    def __init__(self, span: Range, value: int) -> None:
        super().__init__(span, value)
        self._lock = threading.Lock()

    def get(self, address: int) -> int:
        with self._lock:
            return super().get(address)

    def set(self, target: Range, value: int) -> None:
        with self._lock:
            super().set(target, value)

    def runs(self, within: Range | None = None) -> Iterator[tuple[Range, int]]:
        with self._lock:
            return iter(list(super().runs(within)))
