"""The remap scheme on the model of KVM: memslots follow page states, whatever happens."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.conversion import share, unshare
from tests.support.fake_kvm import FakeKernel, FakeSystem, FakeVm
from tests.support.memory import page, pages
from vmm.conversion.schemes.remap import Piece, RemapScheme
from vmm.conversion.transaction import Converter
from vmm.core.errors import HostError
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backing import Backing
from vmm.memory.backings.guest_memfd import GuestMemfdBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState

PAGES = 64
RAM = (Range(0, page(PAGES)), Range(page(2 * PAGES), page(PAGES)))
REGIONS = ("KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2")


class Rig:
    """A VM with two ranges of RAM, the first half of each private."""

    def __init__(self, guest_memfd: bool, memslots: int = 1000) -> None:
        self.kernel = FakeKernel(memslots=memslots)
        self.system = FakeSystem(self.kernel)
        self.vm: FakeVm = self.system.create_vm()
        size = RAM[-1].end
        private: Backing = MemfdBacking(size)
        if guest_memfd:
            private.close()
            private = GuestMemfdBacking(self.vm.create_guest_memfd(size, 1).fd, size)
        areas = [Range(area.start, area.size // 2) for area in RAM]
        self.memory = GuestMemory(RAM, MemfdBacking(size), private, areas)
        self.parked = 0
        self.in_park = False
        self.scheme = RemapScheme(self.park)
        self.scheme.install(self.vm.as_vm(), self.memory)
        self.converter = Converter(self.memory, self.scheme)

    @contextmanager
    def park(self) -> Iterator[None]:
        self.parked += 1
        self.in_park = True
        yield
        self.in_park = False

    def region_calls(self) -> int:
        return sum(self.kernel.calls[name] for name in REGIONS)

    def slots(self) -> list[tuple[Range, bool]]:
        """What KVM has, in address order: area, and whether the private backing is behind it."""
        private = self.memory.private
        assert private is not None
        found = []
        for slot in self.vm.slots.all():
            is_private = slot.hva == private.hva + slot.area.start
            assert is_private or slot.hva == self.memory.shared.hva + slot.area.start
            assert (slot.guest_memfd is not None) == (is_private and private.is_guest_memfd)
            assert slot.guest_memfd is None or slot.offset == slot.area.start
            found.append((slot.area, is_private))
        return found

    def assert_memslots_follow_states(self) -> None:
        expected = [(run, state is PageState.PRIVATE) for run, state in self.memory.states()]
        assert self.slots() == expected
        assert self.scheme.memslots == [Piece(*each) for each in expected]

    def close(self) -> None:
        self.memory.close()
        self.system.close()


@pytest.fixture(params=[False, True], ids=["memfd", "guest_memfd"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param)
    yield made
    made.close()


def random_request(choose: random.Random) -> ConversionRequest:
    base = choose.choice((0, 2 * PAGES))
    first = choose.randrange(PAGES)
    count = choose.randint(1, min(PAGES - first, choose.choice((1, 4, PAGES))))
    return choose.choice((share, unshare))(base + first, count)


def test_install_makes_a_memslot_for_each_run(rig: Rig) -> None:
    rig.assert_memslots_follow_states()

    assert len(rig.slots()) == 4
    assert rig.parked == 0


@pytest.mark.parametrize("seed", range(20))
def test_memslots_are_the_runs_of_pages_after_any_conversions(rig: Rig, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(60):
        before = rig.memory.states()
        parked, calls = rig.parked, rig.region_calls()

        assert rig.converter.convert(random_request(choose)) == 0

        rig.assert_memslots_follow_states()
        changed = rig.memory.states() != before
        assert rig.parked == parked + changed
        assert (rig.region_calls() > calls) == changed


def test_guest_keeps_what_lies_around_a_conversion(rig: Rig) -> None:
    for number in range(PAGES):
        rig.vm.guest_write(page(number), bytes([number + 1]) * 8)

    rig.converter.convert(share(10, 3))

    for number in range(PAGES):
        expected = bytes(8) if 10 <= number < 13 else bytes([number + 1]) * 8
        assert rig.vm.guest_read(page(number)) == expected


def test_vcpus_are_parked_whenever_memslots_are_missing(rig: Rig) -> None:
    enter = rig.kernel.enter

    def checked(operation: str, arguments: str = "") -> None:
        enter(operation, arguments)
        assert rig.in_park or operation not in REGIONS

    rig.kernel.enter = checked  # type: ignore[method-assign]

    for request in (share(3, 2), unshare(3, 1), share(0, PAGES), unshare(0, PAGES)):
        assert rig.converter.convert(request) == 0
    assert rig.parked == 4


@pytest.mark.parametrize("request_", [share(3, 2), unshare(40, 5), share(30, 4), unshare(30, 4)])
def test_refusal_at_any_memslot_leaves_everything_as_it_was(
    rig: Rig, request_: ConversionRequest
) -> None:
    rig.vm.guest_write(page(4), b"original")
    before = (rig.slots(), rig.memory.states(), rig.scheme.memslots)
    for step in range(10):
        rig.kernel.inject(None, errno.ENOMEM, skip=step)
        answer = rig.converter.convert(request_)
        rig.kernel.clear_injections()
        if answer == 0:
            break
        assert answer == -errno.ENOMEM
        assert (rig.slots(), rig.memory.states(), rig.scheme.memslots) == before
        assert rig.vm.guest_read(page(4)) == b"original"
    assert step >= 3, "so many calls it takes at least, and each of them was refused once"
    rig.assert_memslots_follow_states()


def test_memslots_that_cannot_be_put_back_end_the_run(rig: Rig) -> None:
    rig.kernel.inject(None, errno.ENOMEM, skip=1, times=100)

    with pytest.raises(HostError, match=r"cannot be made again: .*; the guest cannot go on"):
        rig.converter.convert(share(3, 2))


def test_more_memslots_than_kvm_has_are_refused_before_anything_is_touched() -> None:
    rig = Rig(guest_memfd=False, memslots=6)
    assert rig.converter.convert(share(3, 1)) == 0
    before, calls = rig.slots(), rig.region_calls()

    answer = rig.converter.convert(share(9, 1))

    assert answer == -errno.ENOSPC
    assert (rig.slots(), rig.region_calls()) == (before, calls)
    assert rig.converter.convert(share(4, 1)) == 0, "growing a run takes no more memslots"
    rig.assert_memslots_follow_states()
    rig.close()


def test_slot_numbers_are_used_again(rig: Rig) -> None:
    """A guest that converts for ever never gets past KVM's limit."""
    for number in range(1200):
        assert rig.converter.convert(share(number % 7, 1)) == 0
        assert rig.converter.convert(unshare(number % 7, 1)) == 0

    assert max(slot.number for slot in rig.vm.slots.all()) < 10


def test_single_page_costs_one_memslot_taken_and_three_made(rig: Rig) -> None:
    calls = rig.region_calls()

    rig.scheme.apply(pages(8, 1), Kind.SHARE)

    assert rig.region_calls() - calls == 4


def test_revert_is_the_way_back(rig: Rig) -> None:
    before = rig.slots()
    for area in (pages(0, 1), pages(3, 4), pages(30, 2)):
        rig.scheme.apply(area, Kind.SHARE)
        rig.scheme.revert(area, Kind.SHARE)

        assert rig.slots() == before


def test_scheme_needs_a_private_backing() -> None:
    memory = GuestMemory([pages(0, 4)], MemfdBacking(4 * PAGE_SIZE))

    with pytest.raises(ValueError, match="private backing"):
        RemapScheme().install(FakeSystem().create_vm().as_vm(), memory)

    memory.close()
