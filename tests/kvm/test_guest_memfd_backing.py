"""MappedGuestMemfdBacking over real guest_memfds: host verbs, and a guest that runs in one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from kvm_bindings import fdops, ioctls
from kvm_bindings.exits import HltExit
from kvm_bindings.x86_64 import System, Vm
from tests.support.memory import pattern
from tests.support.tiny_guest import CODE, RAM, TinyGuest
from vmm.conversion.making import GUEST_MEMFD_FLAGS, make_backing
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.backings.guest_memfd import MappedGuestMemfdBacking

pytestmark = pytest.mark.kvm

MMAP, INIT_SHARED = ioctls.GUEST_MEMFD_FLAG_MMAP, ioctls.GUEST_MEMFD_FLAG_INIT_SHARED
SIZE = 1 << 20


@pytest.fixture
def vm(kvm: System) -> Iterator[Vm]:
    with kvm.create_vm() as made:
        yield made


@pytest.fixture
def backing(vm: Vm, guest_memfd_flags: int) -> Iterator[MappedGuestMemfdBacking]:
    if not guest_memfd_flags & INIT_SHARED:
        pytest.skip("KVM_CAP_GUEST_MEMFD_FLAGS has no INIT_SHARED; Linux 6.18 or later has it")
    made = MappedGuestMemfdBacking(vm.create_guest_memfd(SIZE, MMAP | INIT_SHARED).fd, SIZE)
    yield made
    made.close()


def test_host_moves_bytes_without_read_or_write_on_the_fd(backing: MappedGuestMemfdBacking) -> None:
    data = pattern(5 * PAGE_SIZE)
    file = os.memfd_create("file")
    os.pwrite(file, data, 0)

    backing.pwrite(data, 100)
    moved_out = backing.transfer_out(100, len(data), file, 50)
    moved_in = backing.transfer_in(file, 50, SIZE // 2, len(data))
    into = bytearray(len(data))
    backing.preadv([into], SIZE // 2)

    assert (moved_out, moved_in) == (len(data), len(data))
    assert into == backing.pread(len(data), 100) == data
    with pytest.raises(OSError, match="Illegal seek"):
        os.pread(backing.fd, 1, 0)
    os.close(file)


def test_allocated_pages_are_there_and_keep_their_content(
    backing: MappedGuestMemfdBacking,
) -> None:
    backing.pwrite(pattern(PAGE_SIZE), PAGE_SIZE)

    backing.allocate(0, 4 * PAGE_SIZE)

    assert backing.resident_bytes() == 4 * PAGE_SIZE
    assert backing.pread(PAGE_SIZE, PAGE_SIZE) == pattern(PAGE_SIZE)


def test_transfer_from_a_short_file_is_short(backing: MappedGuestMemfdBacking) -> None:
    file = os.memfd_create("file")
    os.pwrite(file, b"abc", 0)

    assert backing.transfer_in(file, 0, 0, SIZE) == 3
    os.close(file)


def test_residency_follows_writes_and_holes(backing: MappedGuestMemfdBacking) -> None:
    empty = backing.resident_bytes()
    backing.pwrite(pattern(10 * PAGE_SIZE), 0)
    filled = backing.resident_bytes()
    backing.punch(2 * PAGE_SIZE, 3 * PAGE_SIZE)

    assert (empty, filled) == (0, 10 * PAGE_SIZE)
    assert backing.resident_bytes() == 7 * PAGE_SIZE
    assert backing.pread(3 * PAGE_SIZE, 2 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)


def test_page_that_the_host_cannot_reach_is_an_error_never_a_signal(
    vm: Vm, guest_memfd_flags: int
) -> None:
    """Rule 1: even an access that should never have been tried ends as an OSError."""
    guest_memfd = vm.create_guest_memfd(SIZE, MMAP)
    backing = MappedGuestMemfdBacking(guest_memfd.fd, SIZE)  # which it is not
    file = os.memfd_create("file")
    os.truncate(file, 100)

    for attempt in (
        lambda: backing.pread(16, 0),
        lambda: backing.pwrite(b"x", 0),
        lambda: backing.transfer_in(file, 0, 0, 100),
        lambda: backing.transfer_out(0, 100, file, 0),
    ):
        with pytest.raises(OSError, match=r"EFAULT|Input/output error|Bad address"):
            attempt()

    os.close(file)
    backing.close()


def test_guest_runs_in_a_guest_memfd_and_the_host_reads_what_it_wrote(
    kvm: System, guest_memfd_flags: int
) -> None:
    if not guest_memfd_flags & INIT_SHARED:
        pytest.skip("KVM_CAP_GUEST_MEMFD_FLAGS has no INIT_SHARED; Linux 6.18 or later has it")
    with TinyGuest(kvm, b"") as guest:
        made = guest.vm.create_guest_memfd(RAM, MMAP | INIT_SHARED)
        backing = MappedGuestMemfdBacking(made.fd, RAM)
        guest.vm.set_user_memory_region(0, 0, 0, 0)
        guest.vm.set_user_memory_region2(0, 0, RAM, backing.hva, backing.fd, 0)
        backing.pwrite(b"\xa0\x00\x20\xfe\xc0\xa2\x01\x20\xf4", CODE)  # [0x2001] = [0x2000] + 1
        backing.pwrite(b"\x41", 0x2000)

        ended = guest.run()

        assert ended == HltExit()
        assert backing.pread(3, 0x2000) == b"\x41\x42\x00"
        assert backing.resident_bytes() == fdops.cached_pages(backing.fd) * PAGE_SIZE > 0
        backing.close()


def allowed(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["guest_memfd-plain", "guest_memfd", "guest_memfd-mmap"])
def test_traits_are_what_this_kernel_does(vm: Vm, guest_memfd_flags: int, name: str) -> None:
    if GUEST_MEMFD_FLAGS[name] & ~guest_memfd_flags:
        pytest.skip(f"KVM_CAP_GUEST_MEMFD_FLAGS = {guest_memfd_flags:#x}: no {name}")
    backing = make_backing(vm, name, SIZE)
    fd, traits = backing.fd, backing.traits
    reading, writing = os.pipe()
    file = os.memfd_create("file")

    assert allowed(lambda: os.pread(fd, 16, 0)) == traits.pread
    assert allowed(lambda: os.pwrite(fd, b"x", 0)) == traits.pwrite
    assert allowed(lambda: os.splice(fd, writing, 4096, offset_src=0)) == traits.splice
    assert allowed(lambda: fdops.unmap(fdops.map_shared(fd, SIZE), SIZE)) == traits.mmap
    assert bool(backing.hva) == traits.mmap
    if traits.mmap:  # a system call: EFAULT stands for SIGBUS
        reached = allowed(lambda: fdops.pwrite_from_address(file, backing.hva, 16, 0))
        assert traits.private_access == ("allowed" if reached else "SIGBUS")
    else:
        assert traits.private_access == "no mapping"
    backing.punch(0, traits.granule)
    assert backing.resident_bytes(0, traits.granule) == 0
    for opened in (reading, writing, file):
        os.close(opened)
    backing.close()
