"""Interrupt lines: what KVM is told, pulses, and raising a level line again after the EOI."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from kvm_bindings import KvmError, MessageRoute, Vm, ioctls
from vmm.arch.x86_64 import layout
from vmm.core.event_loop import EventLoop
from vmm.memory.backing import Backing, Traits
from vmm.wiring.interrupts import (
    EdgeLine,
    LevelLine,
    MessageRoutes,
    MsixMessages,
    can_use_messages,
)


class FakeVm:
    """Notes irqfds: (eventfd, gsi, resample eventfd)."""

    def __init__(self) -> None:
        self.irqfds: list[tuple[int, int, int | None]] = []
        self.pins: list[tuple[int, int, int]] = []
        self.messages: list[MessageRoute] = []
        self.changes = 0
        self.refuses = False
        self.refuses_irqfds = False
        self.capabilities: dict[int, int] = {}

    def check_extension(self, capability: int) -> int:
        return self.capabilities[capability]

    def set_gsi_routing(
        self, pins: list[tuple[int, int, int]], messages: list[MessageRoute]
    ) -> None:
        if self.refuses:
            raise KvmError("KVM_SET_GSI_ROUTING", errno.ENOMEM)
        self.pins, self.messages = pins, messages
        self.changes += 1

    def irqfd(self, eventfd: int, gsi: int, resamplefd: int | None = None) -> None:
        if self.refuses_irqfds:
            raise KvmError("KVM_IRQFD", errno.ENOMEM)
        self.irqfds.append((eventfd, gsi, resamplefd))


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


def pulses(eventfd: int) -> int:
    """How often the line was raised since the last look."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def end_of_interrupt(loop: EventLoop, resamplefd: int) -> None:
    """KVM announces the guest's EOI; the loop serves it and comes to rest."""
    os.eventfd_write(resamplefd, 1)
    done = os.eventfd(1, os.EFD_NONBLOCK)
    loop.add(done, loop.stop)
    loop.run()
    loop.remove(done)
    os.close(done)


def test_edge_line_is_an_irqfd_without_resample(vm: FakeVm) -> None:
    line = EdgeLine(cast(Vm, vm), 4)

    eventfd, gsi, resamplefd = vm.irqfds[0]
    line.close()
    assert (gsi, resamplefd) == (4, None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(eventfd)


def test_edge_line_pulses_once_per_call(vm: FakeVm) -> None:
    line = EdgeLine(cast(Vm, vm), 4)

    line()
    line()

    assert pulses(vm.irqfds[0][0]) == 2
    line.close()


def test_level_line_is_an_irqfd_with_resample(vm: FakeVm, loop: EventLoop) -> None:
    line = LevelLine(cast(Vm, vm), 10, loop)

    assert vm.irqfds[0][1] == 10
    assert vm.irqfds[0][2] is not None
    line.close()


@pytest.mark.parametrize(
    ("pending", "raised"),
    [([], 0), ([False], 0), ([True], 1), ([False, True], 1), ([True, True], 1)],
)
def test_level_line_goes_up_again_after_the_eoi_while_a_source_is_pending(
    vm: FakeVm, loop: EventLoop, pending: list[bool], raised: int
) -> None:
    line = LevelLine(cast(Vm, vm), 10, loop)
    for state in pending:
        line.add_source(lambda state=state: state)  # type: ignore[misc]
    eventfd, _, resamplefd = vm.irqfds[0]
    assert resamplefd is not None
    line()
    pulses(eventfd)  # KVM has taken it

    end_of_interrupt(loop, resamplefd)

    assert pulses(eventfd) == raised
    assert pulses(resamplefd) == 0
    line.close()


@pytest.fixture
def messages(vm: FakeVm) -> Iterator[tuple[MsixMessages, MsixMessages]]:
    """Two functions' messages over one table."""
    routes = MessageRoutes(cast(Vm, vm), layout.interrupt_pins(), layout.FIRST_MESSAGE_GSI)
    made = MsixMessages(cast(Vm, vm), routes), MsixMessages(cast(Vm, vm), routes)
    yield made
    for each in made:
        each.close()


def test_message_gets_a_gsi_and_an_irqfd_at_its_first_route_and_keeps_them(
    vm: FakeVm, messages: tuple[MsixMessages, MsixMessages]
) -> None:
    first, second = messages
    first.route({1: (0xFEE0_0000, 0x41)})
    second.route({0: (0xFEE0_1000, 0x42)})
    first.route({1: (0xFEE0_2000, 0x43)})

    assert vm.messages == [MessageRoute(24, 0xFEE0_2000, 0x43), MessageRoute(25, 0xFEE0_1000, 0x42)]
    assert [(gsi, resample) for _, gsi, resample in vm.irqfds] == [(24, None), (25, None)]
    first.signal(1)
    assert [pulses(eventfd) for eventfd, _, _ in vm.irqfds] == [1, 0]


def test_message_without_a_route_is_dropped(
    vm: FakeVm, messages: tuple[MsixMessages, MsixMessages]
) -> None:
    messages[0].route({1: (0xFEE0_0000, 0x41)})

    messages[0].signal(0)

    ((eventfd, _, _),) = vm.irqfds
    assert pulses(eventfd) == 0


def test_routes_leave_the_lines_where_kvm_has_them(
    vm: FakeVm, messages: tuple[MsixMessages, MsixMessages]
) -> None:
    messages[0].route({0: (0xFEE0_0000, 0x41)})

    assert set(vm.pins) == {
        *((gsi, 2, gsi) for gsi in range(24)),
        *((gsi, 0, gsi) for gsi in range(8)),
        *((gsi + 8, 1, gsi) for gsi in range(8)),
    }


def test_message_that_kvm_refuses_leaves_the_old_one_and_says_so(
    vm: FakeVm,
    messages: tuple[MsixMessages, MsixMessages],
    capsys: pytest.CaptureFixture[str],
) -> None:
    messages[0].route({0: (0xFEE0_0000, 0x41)})
    vm.refuses = True

    messages[0].route({0: (0xFEE0_1000, 0x42)})
    messages[1].route({3: (0xFEE0_1000, 0x42)})
    messages[1].route({3: (0xFEE0_1000, 0x43)})
    vm.refuses = False
    messages[1].route({2: (0xFEE0_3000, 0x44)})

    assert vm.messages == [MessageRoute(24, 0xFEE0_0000, 0x41), MessageRoute(25, 0xFEE0_3000, 0x44)]
    said = capsys.readouterr().err
    assert said.count("pyvmm: interrupt message") == 2
    assert "KVM_SET_GSI_ROUTING" in said
    messages[1].signal(3)


def test_many_messages_are_one_change_of_the_table_which_grows_by_vectors_alone(
    vm: FakeVm, messages: tuple[MsixMessages, MsixMessages]
) -> None:
    for data in range(50):
        messages[0].route(dict.fromkeys(range(8), (0xFEE0_0000, data)))

    assert vm.changes == 50
    assert vm.messages == [MessageRoute(24 + n, 0xFEE0_0000, 49) for n in range(8)]
    assert len(vm.irqfds) == 8


def test_message_whose_eventfd_is_refused_gets_one_later_and_leaves_no_fd(
    vm: FakeVm, messages: tuple[MsixMessages, MsixMessages], capsys: pytest.CaptureFixture[str]
) -> None:
    vm.refuses_irqfds = True
    before = os.listdir("/proc/self/fd")
    for data in range(3):
        messages[0].route({0: (0xFEE0_0000, data)})
    assert os.listdir("/proc/self/fd") == before
    assert capsys.readouterr().err.count("KVM_IRQFD") == 1
    vm.refuses_irqfds = False

    messages[0].route({0: (0xFEE0_0000, 9)})
    messages[0].signal(0)

    assert vm.messages == [MessageRoute(24, 0xFEE0_0000, 9)]
    assert pulses(vm.irqfds[0][0]) == 1


@pytest.mark.parametrize(
    ("access", "routing", "offered"),
    [
        (None, 1, True),  # an ordinary VM
        ("allowed", 1, True),
        ("SIGBUS", 1, False),  # KVM can't read the guest's instructions there
        ("no mapping", 1, False),
        ("allowed", 0, False),
    ],
)
def test_messages_are_offered_where_kvm_can_decode_accesses_to_their_table(
    vm: FakeVm, access: str | None, routing: int, offered: bool
) -> None:
    vm.capabilities[ioctls.KVM_CAP_IRQ_ROUTING] = routing
    private = None
    if access is not None:
        traits = Traits(False, False, False, False, private_access=access)
        private = cast(Backing, SimpleNamespace(traits=traits))

    assert can_use_messages(cast(Vm, vm), private) is offered
