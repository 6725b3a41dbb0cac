"""Interrupts and notifications: the GICv3, irqfd with resample, ioeventfd, messages."""

from __future__ import annotations

import os
from contextlib import ExitStack

from kvm_bindings import KvmError
from kvm_bindings.aarch64 import System, ioctls
from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.gic import create_gic
from vmm.arch.aarch64.machine_code import DONE_GPA, EXCHANGE, TAKE_INTERRUPT, assembled
from vmm.arch.aarch64.micro_guest import MicroGuest
from vmm.host.probes.finding import Finding, broken, no, yes
from vmm.host.probes.micro_guest import WORD_AT, open_eventfd, seen, was_signalled

_SPI = layout.PCI_INTX_SPIS[0]
_INTID = layout.FIRST_SPI_INTID + _SPI
_REGISTER = DONE_GPA + 0x100

# The distributor's registers, which the host may set for the guest (Arm IHI 0069, 12.9), and
# KVM_DEV_ARM_VGIC_GRP_DIST_REGS, whose attributes are their offsets.
_DIST_REGS = 1
_GICD_CTLR, _GICD_IGROUPR, _GICD_ISENABLER, _GICD_ICFGR = 0x0000, 0x0080, 0x0100, 0x0C00
_ENABLE_GROUP_1, _AFFINITY_ROUTING = 1 << 1, 1 << 4


def gic(system: System) -> Finding:
    """Whether KVM emulates a GICv3, on an ordinary VM."""
    with system.create_vm() as vm:
        try:
            create_gic(vm).close()
        except KvmError as error:
            return no("none", str(error))
        with_its = vm.can_create_device(ioctls.KVM_DEV_TYPE_ARM_VGIC_ITS)
    its = "an ITS, too" if with_its else "no ITS"
    return yes("there", f"KVM_CREATE_DEVICE made a GICv3; {its}, which no guest here needs")


def ioeventfd(system: System) -> Finding:
    """Whether a store to a register in memory signals an eventfd without an exit."""
    registers = {"x0": _REGISTER - WORD_AT, "x1": 0}
    # The code's load exits first: its word is the host's to give.
    with (
        ExitStack() as opened,
        MicroGuest(system, assembled(EXCHANGE), registers=registers) as guest,
    ):
        eventfd = open_eventfd(opened)
        guest.vm.ioeventfd(eventfd, _REGISTER, 8, port=False)
        guest.run()
        guest.vcpu.answer_mmio(bytes(8))
        exit = guest.run()
        done = guest.word(exit) is not None
        signalled = was_signalled(eventfd)
    if done and signalled:
        return yes("works", f"a guest's store to GPA {_REGISTER:#x} signalled, without an exit")
    return broken("doesn't signal", f"a store to GPA {_REGISTER:#x}: {seen(exit)}, {signalled=}")


def irqfd_resample(system: System) -> Finding:
    """Whether an eventfd raises a level interrupt, and another tells of the guest's EOI.

    The guest makes an exit between the two, as one that reads a device's ISR register does: KVM
    (7.3, vgic_v3_fold_lr) tells of the end of those interrupts alone that an exit saw active.
    """
    with ExitStack() as opened:
        try:
            guest = opened.enter_context(
                MicroGuest(system, assembled(TAKE_INTERRUPT), registers={"x20": _INTID}, gic=True)
            )
        except KvmError as error:
            return no("not possible", str(error))
        for register, value in (
            (_GICD_CTLR, _ENABLE_GROUP_1 | _AFFINITY_ROUTING),
            (_GICD_ICFGR + 4 * (_INTID // 16), 0),  # level-triggered, unlike KVM's default
            (_GICD_IGROUPR + 4 * (_INTID // 32), 0xFFFF_FFFF),
            (_GICD_ISENABLER + 4 * (_INTID // 32), 1 << _INTID % 32),
        ):
            guest.gic.set_attr(_DIST_REGS, register, value)
        line, resample = open_eventfd(opened), open_eventfd(opened)
        guest.vm.irqfd(line, _SPI, resample)
        exit = guest.run()
        taken = handled = False
        if guest.word(exit) == 0:
            os.eventfd_write(line, 1)
            exit = guest.run()
            taken = guest.word(exit) == _INTID
        if taken:
            exit = guest.run()
            handled = guest.word(exit) == 0
        told = was_signalled(resample)
    if handled and told:
        return yes("works", f"a guest took SPI {_SPI} from an irqfd; its EOI was told")
    return broken("doesn't work", f"SPI {_SPI} by irqfd: {seen(exit)}, {handled=}, EOI {told=}")
