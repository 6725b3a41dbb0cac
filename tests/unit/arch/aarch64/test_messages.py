"""Interrupt messages: a write to the frame's register becomes a GSI that leads to the SPI."""

from __future__ import annotations

import errno
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_bindings import KvmError
from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.messages import V2mRoutes
from vmm.wiring.interrupts import Message

ADDRESS = layout.V2M_GPA + 0x40
FIRST = layout.FIRST_SPI_INTID + layout.FIRST_MESSAGE_SPI


class FakeVm:
    """Keeps the routing table, or refuses it."""

    def __init__(self) -> None:
        self.table: list[tuple[int, int, int]] = []
        self.changes = 0
        self.refuses = False

    def set_gsi_routing(self, pins: Iterable[tuple[int, int, int]]) -> None:
        if self.refuses:
            raise KvmError("KVM_SET_GSI_ROUTING", errno.ENOMEM)
        self.table = list(pins)
        self.changes += 1


def route(routes: V2mRoutes, gsi: int | None, address: int, data: int) -> int:
    """One message. Raises what is wrong with it."""
    (found,) = routes.set([Message(gsi, address, data)])
    if isinstance(found, OSError):
        raise found
    return found


def test_message_gets_a_gsi_of_its_own_that_leads_to_its_spi() -> None:
    vm = FakeVm()
    routes = V2mRoutes(vm)

    first, second = [route(routes, None, ADDRESS, FIRST + 5) for _ in range(2)]

    spi = layout.FIRST_MESSAGE_SPI + 5
    assert first != second
    assert {(first, 0, spi), (second, 0, spi)} <= set(vm.table)


def test_message_that_moves_keeps_its_gsi() -> None:
    vm = FakeVm()
    routes = V2mRoutes(vm)
    gsi = route(routes, None, ADDRESS, FIRST)

    assert route(routes, gsi, ADDRESS, FIRST + 1) == gsi
    assert [pin for name, _, pin in vm.table if name == gsi] == [layout.FIRST_MESSAGE_SPI + 1]


def test_lines_stay_where_they_are_beside_messages() -> None:
    vm = FakeVm()

    route(V2mRoutes(vm), None, ADDRESS, FIRST)

    for spi in (layout.UART_SPI, *layout.PCI_INTX_SPIS):
        assert (spi, 0, spi) in vm.table


@pytest.mark.parametrize(
    ("address", "data"),
    [
        (ADDRESS, FIRST - 1),  # a line's
        (ADDRESS, layout.FIRST_SPI_INTID + layout.UART_SPI),
        (ADDRESS, layout.INTERRUPTS),
        (ADDRESS, 0),
        (ADDRESS, 2**32 - 1),
        (ADDRESS + 4, FIRST),
        (ADDRESS | 1 << 39, FIRST),
        (2**64 - 1, FIRST),
    ],
)
def test_message_to_somewhere_else_is_refused_and_changes_nothing(address: int, data: int) -> None:
    vm = FakeVm()

    with pytest.raises(OSError, match="no interrupt"):
        route(V2mRoutes(vm), None, address, data)

    assert vm.table == []


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_message_of_any_kind_leads_to_a_message_spi_or_nowhere(address: int, data: int) -> None:
    vm = FakeVm()
    try:
        gsi = route(V2mRoutes(vm), None, address, data)
    except OSError:
        assert vm.table == []
        return
    (pin,) = [pin for name, _, pin in vm.table if name == gsi]
    assert pin >= layout.FIRST_MESSAGE_SPI


def test_message_for_which_kvm_has_no_room_leaves_the_old_one() -> None:
    vm = FakeVm()
    routes = V2mRoutes(vm)
    gsi = route(routes, None, ADDRESS, FIRST)
    vm.refuses = True
    with pytest.raises(KvmError):
        route(routes, gsi, ADDRESS, FIRST + 1)
    vm.refuses = False

    other = route(routes, None, ADDRESS, FIRST + 2)

    assert (gsi, 0, layout.FIRST_MESSAGE_SPI) in vm.table
    assert other == gsi + 1


def test_several_messages_are_one_change_and_a_bad_one_spoils_no_other() -> None:
    vm = FakeVm()
    messages = [Message(None, ADDRESS, FIRST + n) for n in range(3)]

    first, bad, third = V2mRoutes(vm).set([messages[0], Message(None, 0, 0), messages[2]])

    assert vm.changes == 1
    assert isinstance(bad, OSError)
    spi = layout.FIRST_MESSAGE_SPI
    assert {(first, 0, spi), (third, 0, spi + 2)} <= set(vm.table)


def test_messages_that_are_all_bad_change_nothing() -> None:
    vm = FakeVm()

    V2mRoutes(vm).set([Message(None, 0, 0)])

    assert vm.changes == 0
