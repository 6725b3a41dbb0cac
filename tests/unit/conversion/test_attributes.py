"""The attributes scheme on the model of KVM: one ioctl and one hole, whatever the size."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from kvm_bindings import KvmError
from kvm_bindings.x86_64 import ioctls
from tests.support.conversion import share, tally, unshare
from tests.support.fake_kvm import FakeKernel, FakeSystem, FakeVm
from tests.support.memory import page, pages
from vmm.conversion.schemes.attributes import AttributesScheme
from vmm.conversion.transaction import Converter
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.backings.guest_memfd import PlainGuestMemfdBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState

GIB = 1 << 30
LOW = page(16)
RAM = (Range(0, 3 * GIB), Range(4 * GIB, 2 * GIB))
SET = "KVM_SET_MEMORY_ATTRIBUTES"


class CountingPlain(PlainGuestMemfdBacking):
    """Counts the holes punched into it."""

    holes: list[Range]

    def punch(self, offset: int, size: int) -> None:
        self.holes.append(Range(offset, size))
        super().punch(offset, size)


class Rig:
    """6 GiB of RAM on both sides of the hole below 4 GiB; the first 16 pages start shared."""

    def __init__(self) -> None:
        self.kernel = FakeKernel.sw_protected()
        self.system = FakeSystem(self.kernel)
        self.vm: FakeVm = self.system.create_vm(ioctls.KVM_X86_SW_PROTECTED_VM)
        size = RAM[-1].end
        self.private = CountingPlain(self.vm.create_guest_memfd(size).fd, size)
        self.private.holes = []
        private = [Range(LOW, RAM[0].end - LOW), RAM[1]]
        self.memory = GuestMemory(RAM, MemfdBacking(size), self.private, private)
        self.scheme = AttributesScheme()
        self.scheme.install(self.vm.as_vm(), self.memory)
        self.converter = Converter(self.memory, self.scheme)

    def attributes(self) -> list[tuple[Range, PageState]]:
        """What KVM has for RAM, in the words of GuestMemory."""
        words = {0: PageState.SHARED, 8: PageState.PRIVATE}
        return [(run, words[value]) for area in RAM for run, value in self.vm.attributes.runs(area)]

    def close(self) -> None:
        self.memory.close()
        self.system.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_install_binds_both_sides_to_one_memslot_per_range_of_ram(rig: Rig) -> None:
    slots = rig.vm.slots.all()

    assert [slot.area for slot in slots] == list(RAM)
    assert [slot.hva for slot in slots] == [rig.memory.shared.hva + area.start for area in RAM]
    assert [slot.offset for slot in slots] == [area.start for area in RAM]
    assert all(slot.guest_memfd is not None for slot in slots)
    assert rig.attributes() == rig.memory.states()


def test_share_of_a_gibibyte_is_one_ioctl_and_one_hole(rig: Rig) -> None:
    calls = rig.kernel.calls[SET]

    assert rig.converter.convert(share(GIB // 4096, GIB // 4096)) == 0

    assert rig.kernel.calls[SET] == calls + 1
    assert rig.private.holes == [Range(GIB, GIB)]
    assert rig.attributes() == rig.memory.states()
    assert tally(rig.converter, Kind.SHARE)["bytes"] == GIB


def test_range_in_both_states_is_one_ioctl_too(rig: Rig) -> None:
    rig.converter.convert(share(100, 1))
    rig.converter.convert(share(102, 1))
    calls = rig.kernel.calls[SET]

    assert rig.converter.convert(unshare(98, 8)) == 0

    assert rig.kernel.calls[SET] == calls + 1
    assert rig.attributes() == rig.memory.states()


def test_each_side_starts_as_zeros_and_nothing_of_the_other_is_seen(rig: Rig) -> None:
    rig.vm.guest_write(page(20), b"private!")
    rig.converter.convert(share(20, 1))
    assert rig.vm.guest_read(page(20)) == bytes(8)
    assert rig.memory.pread(8, page(20)) == bytes(8)

    rig.memory.pwrite(b"shared!!", page(20))
    assert rig.vm.guest_read(page(20)) == b"shared!!"

    rig.converter.convert(unshare(20, 1))
    assert rig.vm.guest_read(page(20)) == bytes(8)
    rig.converter.convert(share(20, 1))
    assert rig.vm.guest_read(page(20)) == bytes(8)


def test_hole_that_fails_takes_the_attribute_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.vm.guest_write(page(20), b"private!")
    before = rig.attributes()

    def refuse(offset: int, size: int) -> None:
        raise KvmError("fallocate", errno.ENOMEM)

    monkeypatch.setattr(rig.private, "punch", refuse)

    assert rig.converter.convert(share(18, 8)) == -errno.ENOMEM
    assert rig.attributes() == before == rig.memory.states()
    assert rig.vm.guest_read(page(20)) == b"private!"


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EINTR, errno.EINVAL])
def test_kvms_refusal_is_the_guests_answer_and_changes_nothing(rig: Rig, number: int) -> None:
    before = rig.attributes()
    rig.kernel.inject(SET, number)

    assert rig.converter.convert(share(18, 8)) == -number
    assert rig.attributes() == before == rig.memory.states()
    assert rig.private.holes == []


def test_access_by_the_wrong_state_is_an_implicit_conversion(rig: Rig) -> None:
    """KVM's private attribute without private memory behind it, as with TDX or SNP."""
    rig.converter.convert(share(20, 1))

    assert rig.converter.fault(Kind.UNSHARE, page(20), 4096, 0) == 0

    assert rig.memory.states(pages(20, 1)) == [(pages(20, 1), PageState.PRIVATE)]
    assert rig.attributes() == rig.memory.states()
