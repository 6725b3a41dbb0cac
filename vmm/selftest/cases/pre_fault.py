"""KVM_PRE_FAULT_MEMORY, as Linux' pre_fault_memory_test checks it, on either side."""

from __future__ import annotations

import errno

from kvm_bindings import KvmError, ioctls
from vmm.core.ranges import PAGE_SIZE
from vmm.selftest.case import Cell, Skipped, case, expect, expect_error
from vmm.selftest.cases.residency import require_page_granule, resident
from vmm.selftest.rig import Rig

PAGES = (2 << 20) // PAGE_SIZE + 1


def pre_faulting(cell: Cell, **options: object) -> Rig:
    """A rig whose KVM maps ahead; Skipped where it can't."""
    rig = cell.rig(pages=PAGES, **options)
    if not rig.vm.check_extension(ioctls.KVM_CAP_PRE_FAULT_MEMORY):
        raise Skipped("KVM_CAP_PRE_FAULT_MEMORY = 0")
    try:
        rig.guests[0].vcpu.pre_fault_memory(rig.address(0), PAGE_SIZE)
    except KvmError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise Skipped("KVM_PRE_FAULT_MEMORY needs nested paging (EOPNOTSUPP)") from None
        raise
    return rig


@case("mapping 2 MiB ahead makes every page resident, and all of them zeros")
def whole_range(cell: Cell) -> None:
    for private in (None, ()):
        rig = pre_faulting(cell, private=private)
        require_page_granule(rig)
        rig.guests[0].vcpu.pre_fault_memory(rig.address(0), PAGES * PAGE_SIZE)
        expect("pages resident", sum(resident(rig)), PAGES)
        expect("all zeros", rig.holds(0, PAGES, 0), True)


@case("mapping ahead past the end of a memslot maps what is there, then is ENOENT")
def past_the_end(cell: Cell) -> None:
    rig = pre_faulting(cell)
    vcpu, last = rig.guests[0].vcpu, rig.address(PAGES - 1)
    expect_error(
        "the last page and one more",
        lambda: vcpu.pre_fault_memory(last, 2 * PAGE_SIZE),
        errno.ENOENT,
    )
    expect_error(
        "behind the last page",
        lambda: vcpu.pre_fault_memory(last + PAGE_SIZE, PAGE_SIZE),
        errno.ENOENT,
    )
    expect("last page", rig.read(PAGES - 1), 0)


@case("misaligned ranges are EINVAL")
def misaligned(cell: Cell) -> None:
    rig = pre_faulting(cell)
    vcpu, first = rig.guests[0].vcpu, rig.address(0)
    expect_error("half a page on", lambda: vcpu.pre_fault_memory(first + 2048, PAGE_SIZE),
                 errno.EINVAL)  # fmt: skip
    expect_error("half a page", lambda: vcpu.pre_fault_memory(first, 2048), errno.EINVAL)
