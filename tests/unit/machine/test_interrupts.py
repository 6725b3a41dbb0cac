"""Interrupt lines: what KVM is told, pulses, and raising a level line again after the EOI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import cast

import pytest

from kvm_bindings import Vm
from vmm.core.event_loop import EventLoop
from vmm.machine.interrupts import EdgeLine, LevelLine


class FakeVm:
    """Notes irqfds: (eventfd, gsi, resample eventfd)."""

    def __init__(self) -> None:
        self.irqfds: list[tuple[int, int, int | None]] = []

    def irqfd(self, eventfd: int, gsi: int, resamplefd: int | None = None) -> None:
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
