"""Notifications that bypass user space: ioeventfd, irqfd with resample, coalesced port writes."""

from __future__ import annotations

import os
from contextlib import ExitStack

from kvm_bindings.exits import IoExit
from kvm_bindings.x86_64 import System
from vmm.arch.x86_64.micro_guest import OUT_DONE, REAL_CODE_GPA, MicroGuest
from vmm.arch.x86_64.probes.cpu import is_done
from vmm.host.probes.finding import Finding, broken, no, yes
from vmm.host.probes.micro_guest import open_eventfd, seen, was_signalled

_PORT = 0x70
_VALUE = 0x5A
_WRITE = bytes([0xB0, _VALUE, 0xE6, _PORT])  # mov al, VALUE; out PORT, al

_GSI = 5
_VECTOR = 8 + _GSI
_HANDLED_PORT = 0x11
_HANDLER = b"\xb0\x20\xe6\x20" + bytes([0xE6, _HANDLED_PORT]) + b"\xcf"  # EOI; out; iret
_TAKE_INTERRUPTS = (
    b"\xb0\x11\xe6\x20\xb0\x08\xe6\x21\xb0\x04\xe6\x21\xb0\x01\xe6\x21"  # 8259: vectors from 8
    b"\xb0\xdf\xe6\x21"  # everything masked but IRQ 5
    b"\xb0\x20\xba\xd0\x04\xee"  # ELCR: IRQ 5 is level-triggered
    + OUT_DONE
    + b"\xfb\xf4\xeb\xfd"  # sti; hlt, for ever
)


def coalesced_ports(system: System) -> Finding:
    """Whether writes to an index register wait in a ring instead of exiting."""
    with MicroGuest(system, _WRITE + OUT_DONE) as guest:
        if not guest.vm.coalesce_port_writes(_PORT, 1):
            return no("not offered", "KVM_CAP_COALESCED_PIO = 0")
        exit = guest.run()
        waiting = list(guest.vcpu.coalesced_writes())
    if is_done(exit) and waiting == [IoExit(_PORT, 1, 1, True, bytes([_VALUE]))]:
        return yes("works", f"a guest's write to port {_PORT:#x} was in the ring, without an exit")
    return broken("don't wait", f"a write to port {_PORT:#x}: {seen(exit)}, ring {waiting}")


def ioeventfd(system: System) -> Finding:
    """Whether a port write signals an eventfd without an exit."""
    with ExitStack() as opened, MicroGuest(system, _WRITE + OUT_DONE) as guest:
        eventfd = open_eventfd(opened)
        guest.vm.ioeventfd(eventfd, _PORT, 1, _VALUE, port=True)
        exit = guest.run()
        signalled = was_signalled(eventfd)
    if is_done(exit) and signalled:
        return yes("works", f"a guest's write to port {_PORT:#x} signalled, without an exit")
    return broken("doesn't signal", f"a write to port {_PORT:#x}: {seen(exit)}, {signalled=}")


def irqfd_resample(system: System) -> Finding:
    """Whether an eventfd raises a level interrupt, and another tells of the guest's EOI."""
    with ExitStack() as opened, MicroGuest(system, _TAKE_INTERRUPTS, irqchip=True) as guest:
        handler = REAL_CODE_GPA + 0x100
        os.pwrite(guest.memfd, _HANDLER, handler)
        os.pwrite(guest.memfd, handler.to_bytes(4, "little"), 4 * _VECTOR)
        line, resample = open_eventfd(opened), open_eventfd(opened)
        guest.vm.irqfd(line, _GSI, resample)
        exit = guest.run()
        if is_done(exit):
            os.eventfd_write(line, 1)
            exit = guest.run()
        handled = isinstance(exit, IoExit) and exit.port == _HANDLED_PORT
        told = was_signalled(resample)
    if handled and told:
        return yes("works", f"a guest took GSI {_GSI} from an irqfd; its EOI was told")
    return broken("doesn't work", f"GSI {_GSI} by irqfd: {seen(exit)}, {handled=}, EOI {told=}")
