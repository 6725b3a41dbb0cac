"""A back end's interrupts: by KVM where the guest's message may be sent, else by the loop."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import cast

import pytest

from kvm_bindings import KvmError, Vm
from vmm.core.ranges import NOWHERE, Range
from vmm.devices.msix import CONTROL_ENABLE, CONTROL_MASK_ALL, MsixTable
from vmm.devices.vhost_user.messages import Region
from vmm.wiring.interrupts import MsixMessages
from vmm.wiring.vhost_user import Calls, regions_of

MIB = 1 << 20
USER = 1 << 40


class FakeVm:
    """KVM's irqfds: which GSI each eventfd leads to."""

    def __init__(self) -> None:
        self.bound: dict[int, int] = {}
        self.full = False

    def irqfd(
        self, eventfd: int, gsi: int, resamplefd: int | None = None, *, deassign: bool = False
    ) -> None:
        if deassign:
            assert self.bound.pop(eventfd) == gsi
            return
        if self.full:
            raise KvmError("KVM_IRQFD", errno.ENOSPC)
        assert eventfd not in self.bound
        self.bound[eventfd] = gsi


class FakeMessages:
    """Vector N has GSI 24 + N once it was routed."""

    def __init__(self) -> None:
        self.routed: set[int] = set()

    def route(self, messages: Mapping[int, tuple[int, int]]) -> None:
        self.routed |= set(messages)

    def signal(self, vector: int) -> None:
        """Nobody looks."""

    def gsi(self, vector: int) -> int | None:
        return 24 + vector if vector in self.routed else None


class Rig:
    """Two queues, with the vectors 1 and 0."""

    def __init__(self, opened: ExitStack) -> None:
        self.vm, messages = FakeVm(), FakeMessages()
        self.table = MsixTable(3, messages)
        self.vectors = [1, 0]
        self.calls = Calls(
            cast(Vm, self.vm), 2, self.table, cast(MsixMessages, messages),
            lambda queue: self.vectors[queue], opened,
        )  # fmt: skip

    def set(self, vector: int, masked: bool = False) -> None:
        """As the guest sets a message up."""
        self.table.write(16 * vector, 4, 0xFEE00000)
        self.table.write(16 * vector + 8, 4, 0x40 + vector)
        self.table.write(16 * vector + 12, 4, int(masked))

    @property
    def bound(self) -> list[int | None]:
        """The GSI of each queue's eventfd."""
        return [self.vm.bound.get(eventfd) for eventfd in self.calls.eventfds]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as opened:
        yield Rig(opened)


def test_live_messages_are_kvms_once_a_back_end_is_there(rig: Rig) -> None:
    rig.table.control(CONTROL_ENABLE)
    rig.set(0)
    rig.set(1)
    assert rig.bound == [None, None]

    rig.calls.connect()

    assert rig.bound == [25, 24]


def test_messages_that_come_to_life_later_are_kvms_then(rig: Rig) -> None:
    rig.calls.connect()
    rig.set(1)
    assert rig.bound == [None, None]

    rig.table.control(CONTROL_ENABLE)
    assert rig.bound == [25, None]
    rig.set(0)
    assert rig.bound == [25, 24]


def test_masked_messages_are_the_loops(rig: Rig) -> None:
    rig.table.control(CONTROL_ENABLE)
    rig.set(0)
    rig.set(1)
    rig.calls.connect()

    rig.set(1, masked=True)
    assert rig.bound == [None, 24]
    rig.table.control(CONTROL_ENABLE | CONTROL_MASK_ALL)
    assert rig.bound == [None, None]
    rig.table.control(CONTROL_ENABLE)
    assert rig.bound == [None, 24]


def test_a_guest_without_messages_is_interrupted_by_the_loop(rig: Rig) -> None:
    rig.calls.connect()
    assert rig.bound == [None, None]


def test_a_back_end_that_goes_interrupts_nobody(rig: Rig) -> None:
    rig.table.control(CONTROL_ENABLE)
    rig.set(0)
    rig.set(1)
    rig.calls.connect()

    rig.calls.disconnect()

    assert rig.bound == [None, None]
    rig.set(1)
    assert rig.bound == [None, None]


def test_where_kvm_has_no_room_the_loop_does_it(rig: Rig) -> None:
    rig.vm.full = True
    rig.table.control(CONTROL_ENABLE)
    rig.set(0)

    rig.calls.connect()

    assert rig.bound == [None, None]


def test_a_vector_that_is_none_is_the_loops(rig: Rig) -> None:
    rig.vectors = [0xFFFF, 0]
    rig.table.control(CONTROL_ENABLE)
    rig.set(0)

    rig.calls.connect()

    assert rig.bound == [None, 24]


def test_a_function_without_a_table_leaves_all_to_the_loop() -> None:
    vm = FakeVm()
    with ExitStack() as opened:
        calls = Calls(cast(Vm, vm), 1, None, None, lambda queue: 0, opened)
        calls.connect()

        assert vm.bound == {}


def test_regions_are_ram_by_its_place_in_the_file() -> None:
    ram = [Range(0, 64 * MIB), Range(4096 * MIB, 64 * MIB)]

    assert regions_of(ram, NOWHERE) == [
        Region(0, 64 * MIB, USER, 0),
        Region(4096 * MIB, 64 * MIB, USER + 4096 * MIB, 4096 * MIB),
    ]


def test_regions_leave_common_pages_out() -> None:
    """They are the guest's private pages, and lie in the shared file."""
    found = regions_of([Range(0, MIB)], Range(0x10000, 0x8000))

    assert [(each.offset, each.size) for each in found] == [
        (0, 0x10000),
        (0x18000, MIB - 0x18000),
    ]


def test_regions_of_guests_whose_shared_addresses_have_a_bit_have_it() -> None:
    (found,) = regions_of([Range(0x40000000, MIB)], NOWHERE, 1 << 39)

    assert found == Region(0x40000000 | 1 << 39, MIB, USER + 0x40000000, 0x40000000)
