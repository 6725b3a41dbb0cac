"""A routed message interrupts a real vCPU, and the PC's lines still do."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from kvm_bindings.exits import IoExit
from kvm_bindings.x86_64 import System
from tests.support.tiny_guest import CODE, TinyGuest
from vmm.arch.x86_64 import layout
from vmm.wiring.interrupts import EdgeLine, MessageRoutes, MsixMessages

pytestmark = pytest.mark.kvm

MESSAGE = 0x41  # a fixed interrupt of that vector
APIC_BASE, X2APIC_SVR = 0x1B, 0x80F
X2APIC_ON = 0xD00  # x2APIC mode, enabled, bootstrap processor
HANDLER = 0x1100
HALT_FOR_EVER = b"\xfb\xf4\xeb\xfd"  # sti; hlt; jmp back
TELL = b"\xe6\x10\xf4"  # out 0x10, al; hlt


@pytest.fixture
def guest(kvm: System) -> Iterator[TinyGuest]:
    """Halts until the message's vector makes it write to port 0x10."""
    with TinyGuest(kvm, HALT_FOR_EVER, irqchip=True) as made:
        made.pwrite(TELL, HANDLER)
        made.pwrite(struct.pack("<HH", HANDLER, 0), 4 * MESSAGE)
        yield made


def test_message_reaches_the_vcpu(kvm: System, guest: TinyGuest) -> None:
    guest.vcpu.set_cpuid2(kvm.supported_cpuid())
    guest.vcpu.set_msrs({APIC_BASE: layout.LAPIC_GPA | X2APIC_ON, X2APIC_SVR: 0x1FF})
    messages = MsixMessages(
        guest.vm, MessageRoutes(guest.vm, layout.interrupt_pins(), layout.FIRST_MESSAGE_GSI)
    )
    messages.route({0: (layout.LAPIC_GPA, MESSAGE)})

    messages.signal(0)

    exit = guest.run()
    messages.close()
    assert isinstance(exit, IoExit)
    assert exit.port == 0x10


def test_line_still_leads_to_the_8259_once_there_is_a_message(guest: TinyGuest) -> None:
    # The 8259 as a PC's firmware sets it up, line 4 alone unmasked; "ready"; sti; hlt.
    setup = bytes.fromhex("b011 e620 b008 e621 b004 e621 b001 e621 b0ef e621 e611 fb f4 ebfd")
    guest.pwrite(setup, CODE)
    guest.pwrite(struct.pack("<HH", HANDLER, 0), 4 * 12)
    messages = MsixMessages(
        guest.vm, MessageRoutes(guest.vm, layout.interrupt_pins(), layout.FIRST_MESSAGE_GSI)
    )
    messages.route({0: (layout.LAPIC_GPA, MESSAGE)})
    line = EdgeLine(guest.vm, layout.COM1_IRQ)
    ready = guest.run()
    assert isinstance(ready, IoExit) and ready.port == 0x11

    line()

    exit = guest.run()
    line.close()
    messages.close()
    assert isinstance(exit, IoExit)
    assert exit.port == 0x10


def test_closed_messages_leave_no_eventfd(guest: TinyGuest) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    messages = MsixMessages(
        guest.vm, MessageRoutes(guest.vm, layout.interrupt_pins(), layout.FIRST_MESSAGE_GSI)
    )
    messages.route({0: (layout.LAPIC_GPA, MESSAGE)})
    messages.route({1: (layout.LAPIC_GPA, MESSAGE)})
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2

    messages.close()

    assert sorted(os.listdir("/proc/self/fd")) == before
