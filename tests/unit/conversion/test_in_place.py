"""In-place conversion on the model of KVM: one guest_memfd, pages in use, what pages hold."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvm_bindings import KvmError
from kvm_bindings.x86_64 import ioctls
from tests.support.conversion import Answering, share, tally, unshare
from tests.support.fake_kvm import FakeKernel, FakeSystem, FakeVm
from tests.support.memory import page, pages
from vmm.conversion.schemes.in_place import InPlaceScheme
from vmm.conversion.transaction import Converter
from vmm.core.errors import PrivateAccess
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.guest_memfd import InPlaceGuestMemfdBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Defer, Policy

SIZE = page(64)
SET = "KVM_SET_MEMORY_ATTRIBUTES2"
MMAP_INIT_SHARED = 3


class Rig:
    """64 pages of RAM, from 32 on private."""

    def __init__(self, *policies: Policy, patience: float = 0.0) -> None:
        self.kernel = FakeKernel.with_in_place()
        self.system = FakeSystem(self.kernel)
        self.vm: FakeVm = self.system.create_vm(ioctls.KVM_X86_SW_PROTECTED_VM)
        self.guest_memfd = self.vm.create_guest_memfd(SIZE, MMAP_INIT_SHARED)
        self.backing = InPlaceGuestMemfdBacking(self.guest_memfd, SIZE)
        half = Range(page(32), page(32))
        self.memory = GuestMemory([Range(0, SIZE)], self.backing, self.backing, [half])
        self.told: list[str] = []
        self.scheme = InPlaceScheme(patience, self.told.append)
        self.scheme.install(self.vm.as_vm(), self.memory)
        self.converter = Converter(self.memory, self.scheme, *policies)

    def attributes(self) -> list[tuple[Range, PageState]]:
        words = {0: PageState.SHARED, 8: PageState.PRIVATE}
        return [(run, words[value]) for run, value in self.guest_memfd.attributes.runs()]

    def fill(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self.vm.guest_write(page(number), bytes([number + 1]) * 8)

    def holds(self, number: int) -> bool:
        return self.vm.guest_read(page(number)) == bytes([number + 1]) * 8

    def close(self) -> None:
        self.memory.close()
        self.system.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_install_sets_the_attribute_of_every_page(rig: Rig) -> None:
    assert rig.attributes() == rig.memory.states()
    assert [slot.hva for slot in rig.vm.slots.all()] == [rig.backing.hva]


def test_conversion_is_one_ioctl_and_the_page_starts_as_zeros(rig: Rig) -> None:
    rig.fill(0, 64)
    calls = rig.kernel.calls[SET]

    assert rig.converter.convert(share(40, 8)) == 0

    assert rig.kernel.calls[SET] == calls + 1
    assert rig.attributes() == rig.memory.states()
    assert rig.memory.pread(page(8), page(40)) == bytes(page(8))
    assert [number for number in range(64) if not rig.holds(number)] == list(range(40, 48))


def test_pages_that_are_in_the_wanted_state_keep_their_content(rig: Rig) -> None:
    """Both sides are the same page: discarding what stays would lose it."""
    rig.fill(0, 64)

    assert rig.converter.convert(share(28, 8)) == 0

    assert [number for number in range(64) if not rig.holds(number)] == [32, 33, 34, 35]


def test_host_reaches_shared_pages_only(rig: Rig) -> None:
    rig.memory.pwrite(b"from the host", 0)

    assert rig.vm.guest_read(0, 13) == b"from the host"
    with pytest.raises(PrivateAccess):
        rig.memory.pread(1, page(40))


def test_residency_is_counted_by_the_state_of_each_page(rig: Rig) -> None:
    rig.fill(30, 5)

    assert rig.memory.residency() == (page(3), page(2))
    rig.converter.convert(share(32, 1))
    assert rig.memory.residency() == (page(2), page(2))


def test_holder_of_a_page_is_told_once_with_the_page(rig: Rig) -> None:
    process = f"process {os.getpid()} "
    reading, writing = os.pipe()
    try:
        os.write(writing, b"pages, as it may be")
        rig.guest_memfd.pin(page(5), PAGE_SIZE)
        for _ in range(2):
            assert rig.converter.convert(unshare(3, 4)) == -errno.EAGAIN
    finally:
        os.close(reading)
        os.close(writing)

    # Whatever else this process has open at that moment.
    ours = tuple(f"the pipe of fd {end}" for end in (reading, writing))
    (told,) = [words for words in rig.told if words.endswith(ours) and process in words]
    assert told.startswith(f"the page at {page(5):#x} can't be made private: ")
    assert "19 bytes wait in the pipe" in told


def test_pages_in_use_are_the_guests_eagain_and_change_nothing(rig: Rig) -> None:
    rig.fill(0, 64)
    before = rig.attributes()
    rig.guest_memfd.pin(page(5), PAGE_SIZE)

    assert rig.converter.convert(unshare(3, 4)) == -errno.EAGAIN

    assert rig.attributes() == before == rig.memory.states()
    assert all(rig.holds(number) for number in range(64))
    assert tally(rig.converter, Kind.UNSHARE)["failed"] == 1


def test_pages_that_are_let_go_in_time_are_converted() -> None:
    rig = Rig(patience=30.0)
    rig.guest_memfd.pin(page(5), PAGE_SIZE)
    calls = rig.kernel.calls[SET]
    enter = rig.kernel.enter

    def release_on_the_third(operation: str, arguments: str = "") -> None:
        enter(operation, arguments)
        if rig.kernel.calls[SET] == calls + 3:
            rig.guest_memfd.unpin()

    rig.kernel.enter = release_on_the_third  # type: ignore[method-assign]

    assert rig.converter.convert(unshare(3, 4)) == 0
    assert rig.kernel.calls[SET] == calls + 3
    assert rig.attributes() == rig.memory.states()
    rig.close()


def test_share_waits_for_nobody(rig: Rig) -> None:
    """KVM checks references only of pages that become private."""
    rig.guest_memfd.pin(page(40), PAGE_SIZE)

    assert rig.converter.convert(share(40, 1)) == 0


def test_hole_that_fails_half_way_leaves_what_is_gone_converted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run's content is lost: taking its state back would show the guest zeros in a page
    that it was told had not changed."""
    rig.converter.convert(share(41, 1))
    rig.fill(0, 64)
    punch = rig.backing.punch

    def first_only(offset: int, size: int) -> None:
        if offset != page(40):
            raise KvmError("fallocate", errno.ENOMEM)
        punch(offset, size)

    monkeypatch.setattr(rig.backing, "punch", first_only)

    assert rig.converter.convert(share(40, 4)) == -errno.ENOMEM

    shared = [run for run, state in rig.memory.states(pages(40, 4)) if state is PageState.SHARED]
    assert shared == [pages(40, 2)]
    assert rig.attributes() == rig.memory.states()
    assert rig.holds(41), "shared before and after"
    # The model forgets content whenever an attribute changes, as KVM may.
    assert tally(rig.converter, Kind.SHARE)["bytes"] == 2 * PAGE_SIZE


def test_discard_cannot_be_put_off_where_there_is_no_other_side() -> None:
    rig = Rig(Answering(Defer(1e9)))
    rig.fill(0, 8)

    assert rig.converter.convert(unshare(3, 2)) == 0

    assert rig.memory.bytes_in(PageState.DEFERRED) == 0
    assert rig.vm.guest_read(page(3)) == bytes(8)
    rig.close()


def test_two_backings_are_refused() -> None:
    system = FakeSystem(FakeKernel.with_in_place())
    memory = GuestMemory([Range(0, SIZE)], MemfdBacking(SIZE), MemfdBacking(SIZE))

    with pytest.raises(ValueError, match="one backing for both sides"):
        InPlaceScheme().install(system.create_vm(1).as_vm(), memory)

    memory.close()
    system.close()


def test_closing_twice_closes_once() -> None:
    before = set(os.listdir("/proc/self/fd"))
    rig = Rig()
    rig.close()

    assert set(os.listdir("/proc/self/fd")) == before
