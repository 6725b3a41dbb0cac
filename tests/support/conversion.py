"""Builders for conversion tests: requests, and schemes and policies that record, fail or wait."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

from kvm_bindings import KvmError, Vm
from tests.support.memory import data_pages, page
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import Range, RangeMap
from vmm.memory.guest_memory import GuestMemory
from vmm.policy import Decision, Event, Policy, View


def share(first: int, count: int, **others: Any) -> ConversionRequest:
    """A request to share `count` pages from page number `first`."""
    return ConversionRequest(Kind.SHARE, page(first), count, 0, "test", **others)


def unshare(first: int, count: int, **others: Any) -> ConversionRequest:
    return ConversionRequest(Kind.UNSHARE, page(first), count, 0, "test", **others)


class RecordingScheme:
    """Keeps which ranges KVM would treat as shared, and every call in order."""

    name = "recording"
    vm_type = 0
    alias = 0
    shared_alias = 0
    converts_on_fault = True
    told = True
    side_by_side = True

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._shared = RangeMap(Range(0, memory.ram[-1].end), False)
        for area, state in memory.states():
            self._shared.set(area, state.value == "shared")
        self.before_apply: Callable[[Range, Kind], None] = lambda area, kind: None
        self.fail_revert = False

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        raise AssertionError("no VM in these tests")

    def apply(self, area: Range, kind: Kind) -> None:
        self.calls.append(f"apply {kind.value} {area}")
        self.before_apply(area, kind)
        self._set(area, kind is Kind.SHARE)

    def revert(self, area: Range, kind: Kind) -> None:
        states = {state.value for _, state in self.memory.states(area)}
        self.calls.append(f"revert {kind.value} {area} {'/'.join(states)}")
        if self.fail_revert:
            raise KvmError("KVM_SET_MEMORY_ATTRIBUTES", errno.ENOMEM)
        self._set(area, kind is Kind.UNSHARE)

    def _set(self, area: Range, shared: bool) -> None:
        with self._lock:
            self._shared.set(area, shared)

    @property
    def shared(self) -> list[Range]:
        return [area for area, shared in self._shared.runs() if shared]


class Answering(Policy):
    """Answers every question with one thing (raising it if it is an exception)."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[Event] = []

    def on_share(self, event: Event, view: View) -> Decision:
        self.asked.append(event)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[return-value]  # wrong answers are the point

    on_unshare = on_share


def snapshot(memory: GuestMemory, scheme: RecordingScheme) -> dict[str, Any]:
    """All that a refused or failed conversion has to leave as it was."""
    assert memory.private is not None
    size = memory.ram[-1].end
    return {
        "states": memory.states(),
        "scheme": scheme.shared,
        "residency": memory.residency(),
        "shared pages": data_pages(memory.shared.fd),
        "private pages": data_pages(memory.private.fd),
        "shared bytes": memory.shared.pread(size, 0),
        "private bytes": memory.private.pread(size, 0),
    }


def tally(converter: Converter, kind: Kind) -> dict[str, int]:
    return converter.accounting.of(kind).as_dict()
