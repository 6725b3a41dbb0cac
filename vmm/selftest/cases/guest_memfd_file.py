"""A guest_memfd as a file: what Linux' guest_memfd_test checks, with every combination of flags."""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable
from functools import partial

from kvm_bindings import GuestMemfd, Vm, fdops, ioctls
from vmm.arch.guest_cpu import CODE_SIZE, Gate, GuestStopped
from vmm.conversion.making import GUEST_MEMFD_FLAGS
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.host.probes.memory import FLAG_NAMES
from vmm.selftest.case import Cell, Failed, Skipped, case, expect, expect_error

SIZE = 4 * PAGE_SIZE
KEEP, PUNCH = fdops.FALLOC_FL_KEEP_SIZE, fdops.FALLOC_FL_PUNCH_HOLE
MMAP, INIT_SHARED = ioctls.GUEST_MEMFD_FLAG_MMAP, ioctls.GUEST_MEMFD_FLAG_INIT_SHARED
POISON = 0xBBBB_676D_656D_0000


def for_each_flags(run: Callable[[Cell, int], None]) -> Callable[[Cell], None]:
    """A case that is tried with every combination of creation flags that the VM type has.

    Skipped where the cell's backing is no guest_memfd.
    """

    @functools.wraps(run)
    def run_all(cell: Cell) -> None:
        if cell.combination.backing not in GUEST_MEMFD_FLAGS:
            raise Skipped(f"{cell.combination.backing} is no guest_memfd")
        if cell.is_modelled:
            raise Skipped("the model of KVM is compared with the kernel's files elsewhere")
        offered = cell.vm().check_extension(ioctls.KVM_CAP_GUEST_MEMFD_FLAGS)
        for flags, name in FLAG_NAMES.items():
            if flags & ~offered == 0:
                try:
                    run(cell, flags)
                except Failed as failure:
                    raise Failed(f"{name}: {failure}") from None

    return run_all


def create(cell: Cell, flags: int, size: int = SIZE) -> tuple[Vm, GuestMemfd]:
    vm = cell.vm()
    gmem = vm.create_guest_memfd(size, flags)
    cell.closing(gmem.close)
    return vm, gmem


def is_served(cell: Cell, flags: int) -> bool:
    """Whether a guest's access can be served by such a guest_memfd: with MMAP always, else where
    an attribute says that the page is private."""
    return bool(flags & MMAP) or cell.combination.scheme == "attributes"


@case("read, write, pread and pwrite are refused; where a kernel has them, on private pages")
@for_each_flags
def read_and_write(cell: Cell, flags: int) -> None:
    _, gmem = create(cell, flags)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: os.read(gmem.fd, 64),
        "write": lambda: os.write(gmem.fd, bytes(64)),
        "pread": lambda: os.pread(gmem.fd, 64, 0),
        "pwrite": lambda: os.pwrite(gmem.fd, bytes(64), 0),
    }
    has_file_io = gmem.has_file_io()
    for name, call in calls.items():
        if has_file_io and flags & INIT_SHARED:
            expect(f"bytes by {name}", len(_bytes_of(call())), 64)
        elif has_file_io:
            expect_error(name, call, errno.EACCES)
        else:
            expect_error(name, call)


def _bytes_of(result: object) -> bytes:
    """What a read gave, or as many bytes as a write took."""
    return result if isinstance(result, bytes) else bytes(int(str(result)))


@case("it can be mapped if and only if it was made with MMAP, and never copy-on-write")
@for_each_flags
def mapping(cell: Cell, flags: int) -> None:
    _, gmem = create(cell, flags)
    if flags & MMAP:
        fdops.unmap(fdops.map_shared(gmem.fd, SIZE), SIZE)
    else:
        expect_error("mmap", lambda: fdops.map_shared(gmem.fd, SIZE), errno.ENODEV)
    expect_error("private mmap", lambda: fdops.map_copy_on_write(gmem.fd, SIZE))


@case("through a mapping the host reaches its pages with INIT_SHARED, and is EFAULT otherwise")
@for_each_flags
def access_through_mapping(cell: Cell, flags: int) -> None:
    _, gmem = create(cell, flags)
    if not flags & MMAP:
        return
    at = fdops.map_shared(gmem.fd, 2 * SIZE)
    cell.closing(lambda: fdops.unmap(at, 2 * SIZE))
    scratch = os.memfd_create("pyvmm-selftest", os.MFD_CLOEXEC)
    cell.closing(lambda: os.close(scratch))
    word = POISON.to_bytes(8, "little")
    os.pwrite(scratch, word * (SIZE // 8), 0)
    if flags & INIT_SHARED:
        expect("bytes stored", fdops.pread_to_address(scratch, at, SIZE, 0), SIZE)
        fdops.punch_hole(gmem.fd, 0, PAGE_SIZE)
        expect("bytes loaded", fdops.pwrite_from_address(scratch, at, SIZE, 0), SIZE)
        content = os.pread(scratch, SIZE, 0)
        expect("punched page", content[:PAGE_SIZE].strip(b"\0"), b"")
        expect("pages beside it", content[PAGE_SIZE:] == word * ((SIZE - PAGE_SIZE) // 8), True)
    else:
        expect_error("load", lambda: fdops.pwrite_from_address(scratch, at, 8, 0), errno.EFAULT)
        expect_error("store", lambda: fdops.pread_to_address(scratch, at, 8, 0), errno.EFAULT)
    expect_error(
        "load past the end", lambda: fdops.pwrite_from_address(scratch, at + SIZE, 8, 0),
        errno.EFAULT,
    )  # fmt: skip


@case("its size, block size and inode are its own, and can't be changed")
@for_each_flags
def size_is_fixed(cell: Cell, flags: int) -> None:
    vm, gmem = create(cell, flags)
    with vm.create_guest_memfd(2 * SIZE, flags) as other:
        first, second = os.fstat(gmem.fd), os.fstat(other.fd)
    expect("size", first.st_size, SIZE)
    expect("size of the other", second.st_size, 2 * SIZE)
    expect("block size", first.st_blksize, PAGE_SIZE)
    expect("a regular file", stat.S_ISREG(first.st_mode), True)
    if first.st_ino == second.st_ino:
        raise Failed("two guest_memfds have one inode number")
    expect_error("truncate", lambda: os.ftruncate(gmem.fd, 0), errno.EINVAL)


@case("sizes that are no whole pages, and flags that KVM doesn't name, are EINVAL")
@for_each_flags
def bad_creations_are_refused(cell: Cell, flags: int) -> None:
    vm = cell.vm()
    for size in (0, 1, 512, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 63):
        create_it = partial(vm.create_guest_memfd, size, flags)
        expect_error(f"size {size:#x}", create_it, errno.EINVAL)
    valid = vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD_FLAGS)
    for bit in range(64):
        if valid >> bit & 1:
            vm.create_guest_memfd(PAGE_SIZE, 1 << bit).close()
        else:
            create_it = partial(vm.create_guest_memfd, PAGE_SIZE, 1 << bit)
            expect_error(f"flag bit {bit}", create_it, errno.EINVAL)


@case("fallocate takes whole pages inside, punches anywhere, and refuses everything else")
@for_each_flags
def fallocate_rules(cell: Cell, flags: int) -> None:
    _, gmem = create(cell, flags)
    fdops.fallocate(gmem.fd, KEEP, 0, SIZE)
    expect("pages after allocating all", fdops.cached_pages(gmem.fd), SIZE // PAGE_SIZE)
    refused = {
        "half a page on": (KEEP | PUNCH, PAGE_SIZE - 1, PAGE_SIZE, errno.EINVAL),
        "half a page": (KEEP | PUNCH, PAGE_SIZE, PAGE_SIZE - 1, errno.EINVAL),
        "one byte": (KEEP | PUNCH, 0, 1, errno.EINVAL),
        "a page and a byte": (KEEP | PUNCH, PAGE_SIZE, PAGE_SIZE + 1, errno.EINVAL),
        "allocation at the end": (KEEP, SIZE, PAGE_SIZE, errno.EINVAL),
        "allocation past the end": (KEEP, SIZE + PAGE_SIZE, PAGE_SIZE, errno.EINVAL),
        "without KEEP_SIZE": (0, 0, PAGE_SIZE, errno.EOPNOTSUPP),
        "zeroing": (KEEP | fdops.FALLOC_FL_ZERO_RANGE, 0, PAGE_SIZE, errno.EOPNOTSUPP),
    }
    for what, (mode, offset, size, number) in refused.items():
        expect_error(what, partial(fdops.fallocate, gmem.fd, mode, offset, size), number)
    fdops.punch_hole(gmem.fd, SIZE, PAGE_SIZE)
    fdops.punch_hole(gmem.fd, SIZE + PAGE_SIZE, PAGE_SIZE)
    expect("pages after holes past the end", fdops.cached_pages(gmem.fd), SIZE // PAGE_SIZE)
    fdops.punch_hole(gmem.fd, PAGE_SIZE, PAGE_SIZE)
    expect("pages after a hole", fdops.cached_pages(gmem.fd), SIZE // PAGE_SIZE - 1)
    fdops.fallocate(gmem.fd, KEEP, PAGE_SIZE, PAGE_SIZE)
    expect("pages after filling it", fdops.cached_pages(gmem.fd), SIZE // PAGE_SIZE)


@case("a guest's page that is punched comes back as zeros at its next access")
@for_each_flags
def punch_and_refault(cell: Cell, flags: int) -> None:
    area = Range(CODE_SIZE, SIZE)
    if not is_served(cell, flags):
        return
    vm, gmem = create(cell, flags, area.end)
    cpu = cell.platform.guests(cell.stack(), vm, 1, [area], 0, Gate())[0]
    serve(cell, vm, gmem, area)
    cpu.fill(area.start, SIZE, POISON)
    expect("pages resident", fdops.cached_pages(gmem.fd), SIZE // PAGE_SIZE)
    fdops.punch_hole(gmem.fd, area.start + PAGE_SIZE, PAGE_SIZE)
    expect("pages after a hole", fdops.cached_pages(gmem.fd), SIZE // PAGE_SIZE - 1)
    expect("punched page", cpu.holds(area.start + PAGE_SIZE, PAGE_SIZE, 0), True)
    expect("page before it", cpu.holds(area.start, PAGE_SIZE, POISON), True)
    expect("page after it", cpu.holds(area.start + 2 * PAGE_SIZE, PAGE_SIZE, POISON), True)


@case("a range can be bound to one memslot of its own VM only, and again once that is deleted")
@for_each_flags
def binding(cell: Cell, flags: int) -> None:
    vm, gmem = create(cell, flags)
    other_vm = cell.vm()
    taken = (errno.EINVAL, errno.EEXIST)  # EEXIST since Linux 7.x
    gpa = CODE_SIZE

    def bind(slot: int, offset: int, size: int, **other: object) -> Callable[[], None]:
        target = other.get("vm", vm)
        fd = other.get("fd", gmem.fd)
        flags = other.get("flags", ioctls.KVM_MEM_GUEST_MEMFD)
        at = gpa + slot * SIZE
        return lambda: target.set_user_memory_region2(slot, at, size, 0, fd, offset, flags)  # type: ignore[attr-defined]

    bind(1, 0, 2 * PAGE_SIZE)()
    expect_error("the same range again", bind(2, 0, 2 * PAGE_SIZE), *taken)
    expect_error("a part of it", bind(2, PAGE_SIZE, PAGE_SIZE), *taken)
    expect_error("past the end", bind(2, 3 * PAGE_SIZE, 2 * PAGE_SIZE), errno.EINVAL)
    expect_error("in the middle of a page", bind(2, 2 * PAGE_SIZE + 8, PAGE_SIZE), errno.EINVAL)
    expect_error("wrapping", bind(2, (1 << 64) - PAGE_SIZE, PAGE_SIZE), errno.EINVAL)
    expect_error("another VM's", bind(2, 0, PAGE_SIZE, vm=other_vm), errno.EINVAL)
    expect_error("no guest_memfd", bind(2, 0, PAGE_SIZE, fd=os_file(cell)), errno.EINVAL)
    expect_error("no fd at all", bind(2, 0, PAGE_SIZE, fd=(1 << 32) - 1), errno.EBADF)
    for name, flag in (("dirty log", 1), ("read-only", 2)):
        flags = ioctls.KVM_MEM_GUEST_MEMFD | flag
        expect_error(name, bind(2, 2 * PAGE_SIZE, PAGE_SIZE, flags=flags), errno.EINVAL)
    expect_error("changing a memslot", bind(1, 2 * PAGE_SIZE, 2 * PAGE_SIZE), errno.EINVAL)
    vm.set_user_memory_region(1, 0, 0, 0)
    bind(2, 0, 2 * PAGE_SIZE)()


@case("it outlives its VM: holes and allocations work when the VM is gone")
@for_each_flags
def outlives_its_vm(cell: Cell, flags: int) -> None:
    vm = cell.vm()
    gmem = vm.create_guest_memfd(SIZE, flags)
    cell.closing(gmem.close)
    vm.set_user_memory_region2(0, CODE_SIZE, SIZE, 0, gmem.fd, 0)
    vm.close()
    fdops.fallocate(gmem.fd, KEEP, 0, SIZE)
    fdops.punch_hole(gmem.fd, 0, SIZE)
    expect("pages", fdops.cached_pages(gmem.fd), 0)


@case("one that the host can't map still serves the guest only where attributes say private")
@for_each_flags
def plain_one_serves_private_pages_only(cell: Cell, flags: int) -> None:
    area = Range(CODE_SIZE, SIZE)
    if flags & MMAP:
        return
    vm, gmem = create(cell, flags, area.end)
    cpu = cell.platform.guests(cell.stack(), vm, 1, [area], 0, Gate())[0]
    vm.set_user_memory_region2(0, area.start, SIZE, 0, gmem.fd, area.start)
    in_place = cell.combination.scheme == "in-place"
    if in_place:  # there it is private from the start
        gmem.set_memory_attributes2(area.start, SIZE, 0)
    try:
        cpu.read(area.start)
    except (GuestStopped, OSError):
        pass
    else:
        raise Failed("a shared access was served by a guest_memfd without MMAP")
    expect("pages", fdops.cached_pages(gmem.fd), 0)
    if in_place:
        gmem.set_memory_attributes2(area.start, SIZE, ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    elif is_served(cell, flags):
        cell.make_private(vm, area)
    else:
        return
    cpu.write(area.start, POISON)
    expect("pages after a private access", fdops.cached_pages(gmem.fd), 1)


def serve(cell: Cell, vm: Vm, gmem: GuestMemfd, area: Range) -> None:
    """Let the guest's accesses to `area` be served by the guest_memfd."""
    vm.set_user_memory_region2(0, area.start, area.size, 0, gmem.fd, area.start)
    cell.make_private(vm, area)


def os_file(cell: Cell) -> int:
    """The fd of an ordinary memfd."""
    fd = os.memfd_create("pyvmm-selftest", os.MFD_CLOEXEC)
    cell.closing(lambda: os.close(fd))
    return fd
