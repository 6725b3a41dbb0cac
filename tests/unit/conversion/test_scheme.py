"""Schemes over a VM that records its memslots."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvm_bindings import Vm
from tests.support.memory import SPLIT_RAM, guest_memory, pages
from vmm.conversion.scheme import make_memory
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.schemes.pkvm import PkvmScheme
from vmm.conversion.schemes.plain import PlainScheme
from vmm.conversion.schemes.realm import RealmScheme
from vmm.core.events import Kind
from vmm.memory.aliased_memory import AliasedMemory
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.memory.observed_memory import ObservedMemory

C_BIT = 38


class RecordingVm:
    """Takes memslots as KVM does; slot numbers must not repeat."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[Any, ...]] = {}

    def set_user_memory_region(self, slot: int, *rest: int) -> None:
        assert slot not in self.slots
        self.slots[slot] = rest

    set_user_memory_region2 = set_user_memory_region


def test_cbit_scheme_maps_every_ram_range_at_both_aliases() -> None:
    vm = RecordingVm()
    with guest_memory(ram=SPLIT_RAM) as memory:
        CbitScheme(C_BIT).install(cast(Vm, vm), memory)

        assert memory.private is not None
        expected = []
        for area in SPLIT_RAM:
            expected.append((area.start, area.size, memory.shared.hva + area.start))
            alias = area.start | 1 << C_BIT
            expected.append((alias, area.size, memory.private.hva + area.start))
        assert list(vm.slots.values()) == expected


def test_guest_memfd_is_bound_at_the_offset_that_is_its_gpa() -> None:
    vm = RecordingVm()
    with guest_memory(ram=SPLIT_RAM) as memory:
        private = memory.private
        assert isinstance(private, MemfdBacking)
        private.is_guest_memfd = True

        CbitScheme(C_BIT).install(cast(Vm, vm), memory)

        bound = [slot for slot in vm.slots.values() if len(slot) == 5]
        assert bound == [
            (
                area.start | 1 << C_BIT,
                area.size,
                private.hva + area.start,
                private.fd,
                area.start,
            )
            for area in SPLIT_RAM
        ]


def test_cbit_scheme_needs_a_private_backing() -> None:
    memory = GuestMemory([pages(0, 4)], MemfdBacking(4 * 4096))

    with pytest.raises(ValueError, match="private backing"):
        CbitScheme(C_BIT).install(cast(Vm, RecordingVm()), memory)

    memory.close()


def test_plain_scheme_maps_ram_once() -> None:
    vm = RecordingVm()
    with guest_memory(ram=SPLIT_RAM) as memory:
        PlainScheme().install(cast(Vm, vm), memory)

        assert list(vm.slots.values()) == [
            (area.start, area.size, memory.shared.hva + area.start) for area in SPLIT_RAM
        ]


@pytest.mark.parametrize("scheme", [PlainScheme(), CbitScheme(C_BIT)])
def test_apply_and_revert_need_no_kvm_where_the_guest_picks_the_side(scheme: Any) -> None:
    scheme.apply(pages(0, 1), Kind.SHARE)
    scheme.revert(pages(0, 1), Kind.SHARE)


def test_cbit_scheme_shows_common_memory_at_both_aliases() -> None:
    vm = RecordingVm()
    common = pages(2, 8)
    with guest_memory(ram=SPLIT_RAM, common=common) as memory:
        CbitScheme(C_BIT).install(cast(Vm, vm), memory)

        assert memory.private is not None
        low, high = SPLIT_RAM
        assert list(vm.slots.values()) == [
            (0, low.size, memory.shared.hva),
            (common.start | 1 << C_BIT, common.size, memory.shared.hva + common.start),
            (1 << C_BIT, common.start, memory.private.hva),
            (common.end | 1 << C_BIT, low.size - common.end, memory.private.hva + common.end),
            (high.start, high.size, memory.shared.hva + high.start),
            (high.start | 1 << C_BIT, high.size, memory.private.hva + high.start),
        ]


def test_realm_scheme_puts_the_shared_side_at_the_bit() -> None:
    vm = RecordingVm()
    with guest_memory(ram=SPLIT_RAM) as memory:
        scheme = RealmScheme(39)
        scheme.install(cast(Vm, vm), memory)

        assert memory.private is not None
        expected = []
        for area in SPLIT_RAM:
            expected.append((area.start, area.size, memory.private.hva + area.start))
            alias = area.start | 1 << 39
            expected.append((alias, area.size, memory.shared.hva + area.start))
        assert list(vm.slots.values()) == expected
        assert (scheme.alias, scheme.shared_alias) == (0, 1 << 39)
        made = make_memory(scheme, SPLIT_RAM, memory.shared, memory.private, [pages(0, 4)])
        assert isinstance(made, AliasedMemory)
        assert made.shared_bit == 1 << 39
        assert made.states(pages(0, 8)) == [
            (pages(0, 4), PageState.PRIVATE),
            (pages(4, 4), PageState.SHARED),
        ]


def test_pkvm_scheme_has_one_memslot_a_range_and_converts_nothing() -> None:
    vm = RecordingVm()
    scheme = PkvmScheme()
    backing = ProtectedMemfdBacking(SPLIT_RAM[-1].end)
    memory = make_memory(scheme, SPLIT_RAM, backing, backing, [])

    scheme.install(cast(Vm, vm), memory)

    assert isinstance(memory, ObservedMemory)
    assert list(vm.slots.values()) == [
        (area.start, area.size, backing.hva + area.start) for area in SPLIT_RAM
    ]
    with pytest.raises(ValueError, match="only a protected guest can do that"):
        scheme.apply(pages(0, 1), Kind.SHARE)
    memory.close()


def test_pkvm_scheme_takes_no_backing_that_is_read_by_its_fd() -> None:
    with guest_memory() as memory, pytest.raises(ValueError, match="does not take memfd"):
        make_memory(PkvmScheme(), memory.ram, memory.shared, memory.private, [])
