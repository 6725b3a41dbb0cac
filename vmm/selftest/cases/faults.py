"""Accesses that KVM cannot serve: it says so, and goes on once it can.

What Linux' private_mem_kvm_exits_test checks, and the same for guest_memfds that are closed.
"""

from __future__ import annotations

import errno
import threading

from kvm_bindings.exits import MemoryFaultExit
from kvm_bindings.x86_64 import Vm
from vmm.conversion.scheme import set_slot
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.machine.schemes import make_backing
from vmm.memory.backing import Backing
from vmm.memory.backings.memfd import MemfdBacking
from vmm.selftest.case import Cell, Failed, Skipped, case, expect
from vmm.selftest.guest import CODE_SIZE, Gate, GuestCpu, GuestStopped

AREA = Range(CODE_SIZE, 4 * PAGE_SIZE)
POISON = 0xAAAA_6661_756C_7400
SLOT = 10
DEADLINE = 30.0


def bare(cell: Cell) -> tuple[Vm, GuestCpu, MemfdBacking]:
    """A VM with a guest, no memory in AREA, and a memfd that could be it."""
    if cell.combination.scheme != "attributes":
        raise Skipped("only where KVM keeps the state of each page (attributes)")
    vm = cell.vm()
    memfd = MemfdBacking(AREA.end, "pyvmm-selftest")
    cell.closing(memfd.close)
    cpu = cell.platform.guests(cell.stack(), vm, 1, [AREA], 0, Gate())[0]
    return vm, cpu, memfd


def faults_privately(cpu: GuestCpu, address: int) -> None:
    """The guest's read is KVM_EXIT_MEMORY_FAULT, with flag PRIVATE, on just that page."""
    try:
        word = cpu.read(address)
    except GuestStopped as stop:
        wanted = MemoryFaultExit(1 << 3, address & -PAGE_SIZE, PAGE_SIZE, errno.EFAULT)
        expect("exit", stop.exit, wanted)
        return
    raise Failed(f"the read gave {word:#x} instead of a memory fault")


@case("a private page whose memslot has no guest_memfd is a memory fault; shared, it is served")
def private_page_without_guest_memfd(cell: Cell) -> None:
    vm, cpu, memfd = bare(cell)
    set_slot(vm, SLOT, AREA.start, AREA, memfd)
    cell.make_private(vm, Range(AREA.start + PAGE_SIZE, PAGE_SIZE))
    faults_privately(cpu, AREA.start + PAGE_SIZE + 8)
    cpu.write(AREA.start, POISON)
    expect("shared page beside it", cpu.read(AREA.start), POISON)
    vm.set_memory_attributes(AREA.start, AREA.size, 0)
    cpu.write(AREA.start + PAGE_SIZE, POISON + 1)
    expect("the page after it was made shared", cpu.read(AREA.start + PAGE_SIZE), POISON + 1)


@case("a private page whose memslot is deleted is a memory fault, and comes back with the memslot")
def private_page_without_memslot(cell: Cell) -> None:
    vm, cpu, memfd = bare(cell)
    private = guest_memfd(cell, vm)
    set_slot(vm, SLOT, AREA.start, AREA, memfd, private)
    cell.make_private(vm, AREA)
    cpu.write(AREA.start, POISON)
    vm.set_user_memory_region(SLOT, 0, 0, 0)
    faults_privately(cpu, AREA.start)
    set_slot(vm, SLOT, AREA.start, AREA, memfd, private)
    expect("word after the memslot came back", cpu.read(AREA.start), POISON)


@case("a memslot deleted under a guest that reads its private page is a memory fault at once")
def memslot_deleted_while_guest_reads(cell: Cell) -> None:
    vm, cpu, memfd = bare(cell)
    private = guest_memfd(cell, vm)
    set_slot(vm, SLOT, AREA.start, AREA, memfd, private)
    cell.make_private(vm, AREA)
    reading = threading.Event()
    stopped: list[GuestStopped] = []

    def read_for_ever() -> None:
        try:
            while True:
                cpu.read(AREA.start)
                reading.set()
        except GuestStopped as stop:
            stopped.append(stop)

    reader = threading.Thread(target=read_for_ever, daemon=True)
    reader.start()
    if not reading.wait(DEADLINE):
        raise Failed("the guest's first read did not come to an end")
    vm.set_user_memory_region(SLOT, 0, 0, 0)
    reader.join(DEADLINE)
    if not stopped:
        raise Failed("the guest reads on, or its thread failed")
    wanted = MemoryFaultExit(1 << 3, AREA.start, PAGE_SIZE, errno.EFAULT)
    expect("exit", stopped[0].exit, wanted)


@case("a private page whose guest_memfd has been closed is a memory fault")
def private_page_of_closed_guest_memfd(cell: Cell) -> None:
    vm, cpu, memfd = bare(cell)
    private = guest_memfd(cell, vm)
    set_slot(vm, SLOT, AREA.start, AREA, memfd, private)
    cell.make_private(vm, AREA)
    cpu.write(AREA.start, POISON)
    private.close()
    faults_privately(cpu, AREA.start)


@case("a page served by a guest_memfd that has been closed is a memory fault, and no other page")
def page_of_closed_guest_memfd(cell: Cell) -> None:
    if cell.combination.scheme == "attributes" or not cell.combination.backing.startswith("guest"):
        raise Skipped("only where a guest_memfd serves shared accesses")
    vm = cell.vm()
    halves = [Range(AREA.start, 2 * PAGE_SIZE), Range(AREA.start + 2 * PAGE_SIZE, 2 * PAGE_SIZE)]
    cpu = cell.platform.guests(cell.stack(), vm, 1, [AREA], 0, Gate())[0]
    sides = [guest_memfd(cell, vm) for _ in halves]
    for number, (half, side) in enumerate(zip(halves, sides, strict=True)):
        set_slot(vm, SLOT + number, half.start, half, side)
        cpu.write(half.start, POISON + number)
    sides[0].close()
    try:
        word = cpu.read(halves[0].start)
    except GuestStopped as stop:
        wanted = MemoryFaultExit(0, halves[0].start, PAGE_SIZE, errno.EFAULT)
        expect("exit", stop.exit, wanted)
    else:
        raise Failed(f"the read gave {word:#x} instead of a memory fault")
    expect("the other guest_memfd's page", cpu.read(halves[1].start), POISON + 1)


@case("content stays with the attribute's side: setting attributes alone moves nothing")
def attributes_move_nothing(cell: Cell) -> None:
    vm, cpu, memfd = bare(cell)
    set_slot(vm, SLOT, AREA.start, AREA, memfd, guest_memfd(cell, vm))
    cpu.write(AREA.start, POISON)
    cell.make_private(vm, AREA)
    expect("private page at first", cpu.read(AREA.start), 0)
    cpu.write(AREA.start, POISON + 1)
    vm.set_memory_attributes(AREA.start, PAGE_SIZE, 0)
    expect("shared word again", cpu.read(AREA.start), POISON)
    cell.make_private(vm, AREA)
    expect("private word again: nobody discarded it", cpu.read(AREA.start), POISON + 1)


def guest_memfd(cell: Cell, vm: Vm) -> Backing:
    private = make_backing(vm, cell.combination.backing, AREA.end)
    cell.closing(private.close)
    return private
