"""Writes exits into a trace, by wrapping the table of handlers: untraced runs pay nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from kvm_bindings import exits
from vmm.exits.handlers import AnsweringVcpu, Handler, Table
from vmm.trace.layout import HOST, Kind
from vmm.trace.recorder import Recorder

_ADDRESSES: dict[type[Any], Callable[[Any], int]] = {
    exits.IoExit: attrgetter("port"),
    exits.MmioExit: attrgetter("gpa"),
    exits.HypercallExit: attrgetter("number"),
    exits.RdmsrExit: attrgetter("msr"),
    exits.WrmsrExit: attrgetter("msr"),
}
"""What of an exit says where: port, GPA, hypercall's number, MSR."""


def traced(table: Table, recorder: Recorder) -> Table:
    """`table` with handlers that write a row when they are done."""
    return {
        exit_class: (name, _traced_handler(exit_class, name, handler, recorder))
        for exit_class, (name, handler) in table.items()
    }


def _traced_handler(
    exit_class: type[Any], name: str, handler: Handler, recorder: Recorder
) -> Handler:
    number = recorder.name(name)
    address = _ADDRESSES.get(exit_class, lambda exit: 0)
    now, record, kind = time.monotonic_ns, recorder.record, Kind.EXIT

    def handle(vcpu: AnsweringVcpu, exit: Any) -> None:
        started = now()
        try:
            handler(vcpu, exit)
        finally:
            record(kind, vcpu.index, started, address(exit), 0, number)

    def handle_fault(vcpu: AnsweringVcpu, exit: exits.MemoryFaultExit) -> None:
        started = now()
        side = recorder.name("private" if exit.private else "shared")
        try:
            handler(vcpu, exit)
        finally:
            record(Kind.FAULT, min(vcpu.index, HOST), started, exit.gpa, exit.size, side)
            record(kind, vcpu.index, started, exit.gpa, exit.size, number)

    return handle_fault if exit_class is exits.MemoryFaultExit else handle
