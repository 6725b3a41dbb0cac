"""Edges of memslots, and many of them."""

from __future__ import annotations

import errno
from functools import partial

from kvm_bindings import KvmError, ioctls
from kvm_bindings.exits import MmioExit
from vmm.arch.guest_cpu import CODE_SIZE, WORD, Gate, GuestStopped
from vmm.conversion.matrix import UNTOLD
from vmm.conversion.scheme import set_slot
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.selftest.case import Cell, Failed, Skipped, case, expect, expect_error
from vmm.selftest.rig import RAM_GPA

MANY = 16_000
POISON = 0x9999_736C_6F74_0000


@case("the first word before and behind RAM is no memory, the last word inside is")
def ram_ends_where_it_ends(cell: Cell) -> None:
    gap = 2 * PAGE_SIZE
    ram = [Range(RAM_GPA + gap, 4 * PAGE_SIZE)]
    rig = cell.rig(ram=ram)
    cpu = rig.guests[0]
    start, end = ram[0].start | rig.scheme.alias, ram[0].end | rig.scheme.alias
    cpu.write(start, POISON)
    cpu.write(end - WORD, POISON + 1)
    expect("last word", cpu.read(end - WORD), POISON + 1)
    for address in (start - WORD, end):
        try:
            cpu.read(address)
        except GuestStopped as stop:
            if not isinstance(stop.exit, MmioExit):
                raise Failed(f"read at {address:#x}: {stop.exit} instead of MMIO") from None
            expect("GPA of the MMIO exit", stop.exit.gpa, address)
        else:
            raise Failed(f"a read at {address:#x}, where there is no RAM, went through")
    expect("first word after that", cpu.read(start), POISON)


@case("memslots that overlap, are misaligned or out of number are refused")
def bad_memslots_are_refused(cell: Cell) -> None:
    rig = cell.rig(pages=4)
    most = rig.vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS)
    free, gpa, hva = most - 2, rig.gpa(0), rig.memory.shared.hva
    bad = {
        "over another slot": (free, gpa, PAGE_SIZE, hva, errno.EEXIST),
        "over the end of another slot": (free, gpa + 3 * PAGE_SIZE, 4 * PAGE_SIZE, hva,
                                         errno.EEXIST),
        "in the middle of a page": (free, 1 << 30 | 512, PAGE_SIZE, hva, errno.EINVAL),
        "half a page": (free, 1 << 30, 512, hva, errno.EINVAL),
        "at a crooked address": (free, 1 << 30, PAGE_SIZE, hva + 8, errno.EINVAL),
        "one number too many": (most, 1 << 30, PAGE_SIZE, hva, errno.EINVAL),
        "around the end of 64 bits": (free, (1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, hva,
                                      errno.EINVAL),
        "deleting what is not there": (free, 1 << 30, 0, hva, errno.EINVAL),
    }  # fmt: skip
    for what, (slot, at, size, address, number) in bad.items():
        make = partial(rig.vm.set_user_memory_region, slot, at, size, address)
        expect_error(f"memslot {what}", make, number)


@case("16,000 memslots of one page each: every page is where it belongs")
def many_memslots(cell: Cell) -> None:
    if cell.combination.scheme in UNTOLD:
        raise Skipped("each page that such a guest touches is donated: minutes of it")
    platform = cell.platform
    vm = cell.vm()
    if vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS) <= MANY:
        raise Skipped("this KVM has fewer memslots (KVM_CAP_NR_MEMSLOTS)")
    # Pages in reverse order, so that no two neighbours could be one memslot.
    size = CODE_SIZE + MANY * PAGE_SIZE
    backing = cell.backing(vm, size)
    ram = [Range(CODE_SIZE, MANY * PAGE_SIZE)]
    opened = cell.stack()
    cpu = platform.guests(opened, vm, 1, ram, 0, Gate())[0]
    last = CODE_SIZE + (MANY - 1) * PAGE_SIZE
    for number in range(MANY):
        offset = CODE_SIZE + number * PAGE_SIZE
        set_slot(vm, number, last - number * PAGE_SIZE, Range(offset, PAGE_SIZE), backing)
    cell.make_private(vm, ram[0])
    sample = [*range(0, MANY, 997), MANY - 1]
    for number in sample:
        cpu.write(last - number * PAGE_SIZE, POISON + number)
    for number in sample:
        expect(f"word in memslot {number}", cpu.read(last - number * PAGE_SIZE), POISON + number)
        if backing.access != "none":
            data = backing.pread(WORD, CODE_SIZE + number * PAGE_SIZE)
            expect(f"host's word behind memslot {number}", int.from_bytes(data, "little"),
                   POISON + number)  # fmt: skip
    vm.set_user_memory_region(5, 0, 0, 0)
    delete = partial(vm.set_user_memory_region, 5, 0, 0, 0)
    expect_error("deleting a memslot twice", delete, errno.EINVAL)
    try:
        cpu.read(last - 5 * PAGE_SIZE)
    except (GuestStopped, KvmError):
        pass
    else:
        raise Failed("the page of a deleted memslot is still there")
