"""KVM_EXIT_MEMORY_FAULT: the guest means the other side of a page than the one KVM has for it.

Where KVM keeps page states, that is an implicit request for a conversion, and goes the way of all
requests. The exit may be stale, though: another vCPU's conversion of the page can overtake it, and
acting on it would undo that conversion. A vCPU that is let go on faults again if it meant it.
"""

from __future__ import annotations

import errno
import os

from kvm_bindings.exits import MemoryFaultExit
from vmm.conversion.transaction import Converter
from vmm.core.events import FAULT_NAME, ConversionRequest, Kind
from vmm.core.ranges import PAGE_SHIFT
from vmm.exits.outcome import INTERNAL_ERROR, Outcome

_PATIENCE = 16
"""So many equal faults of a vCPU in a row are believed although other conversions go on."""
_LIMIT = 64
"""So many, with nothing left to convert, and the guest can't go on."""


class _Repeated:
    """The last fault of one vCPU: how often in a row, and after how many converted bytes."""

    __slots__ = ("converted", "count", "fault")

    def __init__(self) -> None:
        self.fault: MemoryFaultExit | None = None
        self.count = 0
        self.converted = 0


class MemoryFaults:
    """Turns memory faults into conversion requests; each vCPU's faults come from its thread."""

    def __init__(self, converter: Converter) -> None:
        self._converter = converter
        self._last: dict[int, _Repeated] = {}

    def handle(self, vcpu: int, fault: MemoryFaultExit) -> Outcome | None:
        """Do what the fault asks for; None: the vCPU may go on, else how the run ends."""
        converter = self._converter
        side = "private" if fault.private else "shared"
        where = f"{side} memory at GPA {fault.gpa:#x}, {fault.size} bytes"
        if fault.errno != errno.EFAULT or not converter.converts_on_fault:
            name = errno.errorcode.get(fault.errno, f"errno {fault.errno}")
            reason = f"KVM cannot serve the guest's access to {where} ({name})"
            return Outcome(INTERNAL_ERROR, reason)
        last = self._last.setdefault(vcpu, _Repeated())
        converted = converter.accounting.converted_bytes
        if fault != last.fault:
            last.fault, last.count = fault, 0
        last.count += 1
        overtaken = converted != last.converted
        last.converted = converted
        if last.count == 1 or (overtaken and last.count < _PATIENCE):
            return None
        kind = Kind.UNSHARE if fault.private else Kind.SHARE
        answer = converter.convert(
            ConversionRequest(kind, fault.gpa, fault.size >> PAGE_SHIFT, vcpu, FAULT_NAME)
        )
        if answer:
            why = os.strerror(-answer)
            return Outcome(
                INTERNAL_ERROR,
                f"vCPU {vcpu} touched {where}, which it did not ask for, and was refused: {why}",
            )
        if converter.accounting.converted_bytes != converted:
            last.fault = None
        elif last.count > _LIMIT:
            return Outcome(
                INTERNAL_ERROR, f"KVM does not serve the guest's access to {where}, although it is"
            )
        return None
