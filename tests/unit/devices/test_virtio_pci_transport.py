"""virtio-pci as a driver meets it: discovery, negotiation, interrupts, resets, hostile accesses."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from threading import Event, RLock, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.disk_machine import BAR, DATA, MINIMUM, RINGS, DiskMachine
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import (
    ACCESS_PLATFORM,
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    VERSION_1,
    Piece,
    VirtioPciDriver,
)
from vmm.core.errors import PyvmmError
from vmm.core.ranges import Range
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus
from vmm.devices.virtio import pci_transport
from vmm.devices.virtio.block import S_OK, T_IN, VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.pci_transport import VirtioPciTransport

READY = ACKNOWLEDGE | DRIVER | FEATURES_OK


def test_transport_is_found_as_a_modern_block_device(machine: DiskMachine) -> None:
    driver = machine.driver

    assert driver.config(0x00, 4) == 0x1042_1AF4
    assert driver.config(0x08, 1) == 1
    assert driver.config(0x2C, 4) == 0x0042_1AF4
    assert driver.config(0x3C, 2) == 0x0105
    places = {kind: (c.bar, c.offset, c.length) for kind, c in driver.capabilities.items()}
    assert places == {
        1: (0, 0x00, 0x38),
        2: (0, 0x80, 4),
        3: (0, 0x40, 1),
        4: (0, 0x48, 60),
        5: (0, 0, 0),
    }
    notify = driver.capabilities[2].register
    assert driver.config(notify + 2, 1) == 20
    assert driver.config(notify + 16, 4) == 0  # notify_off_multiplier


def test_transport_registers_before_negotiation(machine: DiskMachine) -> None:
    driver = machine.driver
    driver.enable()

    assert driver.status == 0
    assert driver.get(0x10, 2) == 0xFFFF  # no MSI-X
    assert driver.get(0x12, 2) == 1
    assert (driver.get(0x18, 2), driver.get(0x1A, 2), driver.get(0x1C, 2)) == (256, 0xFFFF, 0)
    driver.put(0x16, 2, 1)
    assert (driver.get(0x18, 2), driver.get(0x20, 4)) == (0, 0)
    driver.put(0x00, 4, 2)
    assert driver.get(0x04, 4) == 0
    assert driver.offered_features() & MINIMUM == MINIMUM


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (VERSION_1 | ACCESS_PLATFORM, True),
        (VERSION_1, False),
        (ACCESS_PLATFORM, False),
        (VERSION_1 | ACCESS_PLATFORM | 1 << 34, False),  # packed rings: not offered
        (VERSION_1 | ACCESS_PLATFORM | 1 << 63, False),
        (0, False),
    ],
)
def test_transport_features_ok_needs_a_subset_with_the_required(
    machine: DiskMachine, features: int, accepted: bool
) -> None:
    machine.driver.enable()

    assert machine.driver.negotiate(features) is accepted


def test_transport_features_are_fixed_after_features_ok(machine: DiskMachine) -> None:
    driver = machine.driver
    driver.enable()
    driver.negotiate(MINIMUM)

    driver.put(0x08, 4, 0)
    driver.put(0x0C, 4, 0x40)

    assert driver.get(0x0C, 4) == 0


def test_transport_driver_ok_without_features_ok_is_ignored(machine: DiskMachine) -> None:
    machine.driver.enable()

    machine.driver.status = ACKNOWLEDGE | DRIVER | DRIVER_OK

    assert machine.driver.status == ACKNOWLEDGE | DRIVER


def test_transport_status_bits_cannot_be_taken_back_or_forged(machine: DiskMachine) -> None:
    driver = machine.driver
    driver.enable()
    driver.negotiate(MINIMUM)

    driver.status = ACKNOWLEDGE
    assert driver.status == READY
    driver.status = READY | NEEDS_RESET | 0x30
    assert driver.status == READY


def test_transport_queue_settings_read_back_and_are_fixed_when_enabled(
    machine: DiskMachine,
) -> None:
    driver = machine.driver
    driver.enable()
    driver.negotiate(MINIMUM)

    driver.set_queue(0, 0x1_0000_1000, 0x2_0000_2000, 0x3_0000_3000, 64)
    driver.set_queue(0, 0, 0, 0, 16)

    assert driver.get(0x18, 2) == 64
    assert driver.get(0x1C, 2) == 1
    addresses = [driver.get(offset, 4) for offset in range(0x20, 0x38, 4)]
    assert addresses == [0x1000, 1, 0x2000, 2, 0x3000, 3]


@pytest.mark.parametrize("size", [0, 3, 512, 0xFFFF])
def test_transport_queue_size_that_cannot_be_is_ignored(machine: DiskMachine, size: int) -> None:
    machine.driver.enable()

    machine.driver.put(0x18, 2, size)

    assert machine.driver.get(0x18, 2) == 256


@pytest.mark.parametrize(
    ("offset", "size"), [(0x14, 2), (0x14, 4), (0x12, 4), (0x18, 1), (0x16, 4), (0x20, 2), (0, 2)]
)
def test_transport_write_of_the_wrong_width_is_dropped(
    machine: DiskMachine, offset: int, size: int
) -> None:
    driver = machine.driver
    driver.enable()
    before = [driver.get(i, 1) for i in range(0x38)]

    driver.put(offset, size, 0x0101_0101 & ((1 << 8 * size) - 1))

    assert [driver.get(i, 1) for i in range(0x38)] == before


def test_transport_notify_before_driver_ok_touches_nothing(machine: DiskMachine) -> None:
    machine.driver.enable()
    machine.driver.negotiate(MINIMUM)
    machine.driver.set_queue(0, RINGS, RINGS + 0x1000, RINGS + 0x2000, 64)

    machine.driver.notify()

    assert not machine.memory.calls


@pytest.mark.parametrize("queue_index", [1, 7, 0xFFFF])
def test_transport_notify_of_no_queue_is_ignored(machine: DiskMachine, queue_index: int) -> None:
    machine.up()

    machine.driver.notify(queue_index)

    assert not machine.memory.calls
    assert machine.driver.status == READY | DRIVER_OK


def test_transport_queue_that_was_not_enabled_is_ignored(machine: DiskMachine) -> None:
    machine.driver.enable()
    machine.driver.negotiate(MINIMUM)
    machine.driver.start()

    machine.driver.notify()

    assert machine.driver.status == READY | DRIVER_OK
    assert not machine.memory.calls


def test_transport_isr_reads_once_and_decides_interrupt_pending(machine: DiskMachine) -> None:
    queue = machine.up()
    machine.do(queue, T_IN, 0, Piece(DATA, 512, True))

    assert len(machine.interrupts) == 1
    assert machine.transport.interrupt_pending()
    assert machine.driver.config(0x06, 2) & 0x08
    assert machine.driver.isr() == 1
    assert not machine.transport.interrupt_pending()
    assert machine.driver.config(0x06, 2) & 0x08 == 0
    assert machine.driver.isr() == 0


def test_transport_no_interrupt_flag_leaves_isr_alone(machine: DiskMachine) -> None:
    queue = machine.up(features=0)
    pieces, _ = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))
    queue.set_available_index(queue.available, flags=1)

    machine.driver.notify()

    assert len(queue.collect()) == 1
    assert machine.interrupts == []
    assert machine.driver.isr() == 0


def test_transport_intx_disable_holds_the_interrupt_back(machine: DiskMachine) -> None:
    queue = machine.up()
    machine.driver.set_config(0x04, 2, 0x405)
    machine.do(queue, T_IN, 0, Piece(DATA, 512, True))

    assert machine.interrupts == []
    assert not machine.transport.interrupt_pending()
    machine.driver.set_config(0x04, 2, 0x005)

    assert len(machine.interrupts) == 1
    assert machine.transport.interrupt_pending()


def test_transport_notify_port_follows_the_bar(machine: DiskMachine) -> None:
    assert machine.transport.notify_address is None
    machine.driver.enable()
    assert machine.transport.notify_address == BAR + 0x80

    machine.driver.set_config(0x10, 4, 0xD000)
    machine.driver.set_config(0x04, 2, 0)

    assert machine.notify_ports == [BAR + 0x80, None, 0xD080, None]
    assert machine.transport.notify_address is None


def test_transport_reset_forgets_everything_and_can_start_again(machine: DiskMachine) -> None:
    queue = machine.up()
    machine.do(queue, T_IN, 0, Piece(DATA, 512, True))
    machine.memory.calls.clear()

    machine.driver.status = 0
    queue.offer(0)
    machine.driver.notify()

    assert machine.driver.status == 0
    assert (machine.driver.get(0x18, 2), machine.driver.get(0x1C, 2)) == (256, 0)
    assert machine.driver.isr() == 0
    assert not machine.memory.calls
    assert machine.do(machine.up(), T_IN, 0, Piece(DATA, 512, True)) == (S_OK, 513)


@pytest.mark.parametrize(
    ("desc", "driver", "device"), [(8, 0, 0), (0, 1, 0), (0, 0, 2), (0, 0, (1 << 64) - 4)]
)
def test_transport_rings_that_cannot_be_need_a_reset(
    machine: DiskMachine, desc: int, driver: int, device: int
) -> None:
    machine.driver.enable()
    machine.driver.negotiate(MINIMUM)
    machine.driver.set_queue(0, desc, driver, device, 64)

    machine.driver.start()
    machine.driver.notify()

    assert machine.driver.status == READY | DRIVER_OK | NEEDS_RESET
    assert machine.driver.isr() == 2
    assert len(machine.interrupts) == 1
    assert not machine.memory.calls


@pytest.mark.parametrize("where", ["desc", "avail", "used"])
def test_transport_private_ring_needs_a_reset_and_is_counted(
    machine: DiskMachine, where: str
) -> None:
    queue = machine.up()
    pieces, _ = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))
    machine.memory.private.append(Range(getattr(queue, where), 4096))
    told: list[bool] = []
    machine.block.refused = lambda: told.append(True)

    machine.driver.notify()

    assert machine.driver.status & NEEDS_RESET
    assert machine.driver.isr() == 2
    assert machine.block.statistics.refused == len(told) == 1
    assert "private" in (machine.transport.failure or "")


def test_transport_rings_outside_memory_need_a_reset(machine: DiskMachine) -> None:
    machine.driver.enable()
    machine.driver.negotiate(MINIMUM)
    machine.driver.set_queue(0, 1 << 40, 1 << 41, 1 << 42, 64)
    machine.driver.start()

    machine.driver.notify()

    assert machine.driver.status & NEEDS_RESET
    assert machine.block.statistics.refused == 1


def test_transport_broken_ring_stops_until_reset(machine: DiskMachine) -> None:
    queue = machine.up()
    queue.set_available_index(500)
    machine.driver.notify()
    machine.memory.calls.clear()
    queue.set_available_index(0)

    machine.driver.notify()
    machine.driver.start()
    machine.driver.notify()

    assert machine.driver.status & NEEDS_RESET
    assert not machine.memory.calls
    assert machine.block.statistics.errors == 1
    assert machine.do(machine.up(), T_IN, 0, Piece(DATA, 512, True)) == (S_OK, 513)


def test_transport_host_error_on_memory_needs_a_reset(
    machine: DiskMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = machine.up()
    queue.offer(0)

    def broken(_size: int, _gpa: int) -> bytes:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(machine.memory, "pread", broken)
    machine.driver.notify()

    assert machine.driver.status & NEEDS_RESET


def test_transport_reset_in_the_middle_of_a_batch_waits_for_its_end(machine: DiskMachine) -> None:
    """A vCPU resets while the event loop moves data: after it no byte of memory changes."""
    queue = machine.up()
    pieces, status = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))
    moving, reset_sent = Event(), Event()
    touched_after_reset: list[str] = []
    reset_done = Event()

    def pause(verb: str, _gpa: int) -> None:
        if reset_done.is_set():
            touched_after_reset.append(verb)
        if verb == "transfer_in":
            moving.set()
            assert reset_sent.wait(10)

    machine.memory.before = pause
    loop = Thread(target=machine.transport.notify, args=(0,))
    loop.start()
    assert moving.wait(10)

    def reset() -> None:
        reset_sent.set()
        machine.driver.status = 0
        reset_done.set()

    vcpu = Thread(target=reset)
    vcpu.start()
    vcpu.join(10)
    loop.join(10)

    assert touched_after_reset == []
    assert machine.memory.peek(1, status)[0] == S_OK
    assert machine.driver.status == 0
    assert machine.driver.isr() == 0


def test_transport_isr_is_readable_while_a_batch_is_served(machine: DiskMachine) -> None:
    queue = machine.up()
    pieces, _ = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))
    seen: list[int] = []

    def read_isr_from_a_vcpu(verb: str, _gpa: int) -> None:
        if verb == "transfer_in":
            vcpu = Thread(target=lambda: seen.append(machine.driver.isr()))
            vcpu.start()
            vcpu.join(10)

    machine.memory.before = read_isr_from_a_vcpu
    machine.driver.notify()

    assert seen == [0]


def test_transport_that_is_held_serves_nothing_until_it_is_released(machine: DiskMachine) -> None:
    queue = machine.up()
    pieces, status = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))
    started = Event()

    def serve() -> None:
        started.set()
        machine.transport.notify(0)

    loop = Thread(target=serve)
    with machine.transport.held(10):
        calls = machine.memory.calls.copy()
        loop.start()
        assert started.wait(10)
        loop.join(0.01)

        assert loop.is_alive()
        assert machine.memory.calls == calls
    loop.join(10)

    assert machine.memory.peek(1, status)[0] == S_OK


def test_transport_that_takes_too_long_is_not_held(machine: DiskMachine) -> None:
    queue = machine.up()
    pieces, status = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))
    moving, go_on = Event(), Event()

    def pause(verb: str, _gpa: int) -> None:
        if verb == "transfer_in":
            moving.set()
            assert go_on.wait(10)

    machine.memory.before = pause
    loop = Thread(target=machine.transport.notify, args=(0,))
    loop.start()
    assert moving.wait(10)

    with pytest.raises(TimeoutError), machine.transport.held(0.001):
        raise AssertionError("held though it is at work")

    machine.driver.isr()
    assert machine.driver.status  # the lock of the registers is free again
    go_on.set()
    loop.join(10)
    assert machine.memory.peek(1, status)[0] == S_OK


def test_transport_is_held_only_when_what_it_serves_is_done(machine: DiskMachine) -> None:
    queue = machine.up()
    pieces, _ = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))
    moving, go_on = Event(), Event()
    order: list[str] = []

    def pause(verb: str, _gpa: int) -> None:
        if verb == "transfer_in":
            moving.set()
            assert go_on.wait(10)
            order.append("moved")

    def hold() -> None:
        go_on.set()
        with machine.transport.held(10):
            order.append("held")

    machine.memory.before = pause
    loop = Thread(target=machine.transport.notify, args=(0,))
    loop.start()
    assert moving.wait(10)
    holder = Thread(target=hold)
    holder.start()
    holder.join(10)
    loop.join(10)

    assert order == ["moved", "held"]


class RestartingLock:
    """A transport's lock that another vCPU had until now, and under which it restarted the
    device."""

    def __init__(self, lock: RLock, restart: Callable[[], object]) -> None:
        self._lock = lock
        self._restart = restart

    def acquire(self, timeout: float) -> bool:
        self._restart()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


def test_transport_that_restarts_while_it_is_to_be_held_is_held(machine: DiskMachine) -> None:
    queue = machine.up()
    lock = machine.transport._lock

    def restart() -> None:
        nonlocal queue
        machine.transport._lock = lock
        queue = machine.up()
        queue.offer(queue.chain(machine.request(T_IN, 0, Piece(DATA, 512, True))[0]))

    machine.transport._lock = RestartingLock(lock, restart)  # type: ignore[assignment]
    with machine.transport.held(10):
        loop = Thread(target=machine.transport.notify, args=(0,))
        loop.start()
        loop.join(0.05)

        assert loop.is_alive()
        assert queue.used_index() == 0
    loop.join(10)

    assert queue.used_index() == 1


def test_transport_waits_once_for_all_queues_to_be_held() -> None:
    """`timeout` is for all locks together, however many queues there are."""
    waits: list[float] = []

    class Lock:
        def acquire(self, timeout: float) -> bool:
            waits.append(timeout)
            now[0] += 1.0
            return timeout > 0

        def release(self) -> None:
            """Not asked for here."""

    now = [0.0]
    owner = ExitStack()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(TimeoutError),
    ):
        patch.setattr("vmm.devices.virtio.pci_transport.time.monotonic", lambda: now[0])
        for _ in range(10):
            pci_transport._acquire(Lock(), 2.5, owner)  # type: ignore[arg-type]
    owner.pop_all()

    assert waits == [2.5, 1.5, 0.5, 0]


@pytest.mark.parametrize("error", [struct.error("bad"), ZeroDivisionError(), RecursionError()])
def test_transport_whose_device_fails_unexpectedly_stops_the_device_with_one_line(
    machine: DiskMachine, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def process(queue_index: int) -> bool:
        raise error

    for _ in range(3):  # the guest tries again: one line is enough
        machine.up()
        machine.block.process = process  # type: ignore[method-assign]
        machine.transport.notify(0)
        assert machine.driver.status & NEEDS_RESET

    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert type(error).__name__ in said and "VirtioBlock" in said
    assert "test_virtio_pci_transport.py" in said


def test_transport_whose_device_cannot_start_stops_the_device(
    machine: DiskMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    def activate(memory: object, queues: object, features: int) -> None:
        raise KeyError("no such queue")

    machine.block.activate = activate  # type: ignore[method-assign]

    machine.up()

    assert machine.driver.status & NEEDS_RESET
    assert "KeyError" in capsys.readouterr().err


def test_transport_lets_a_policys_end_of_the_run_through(machine: DiskMachine) -> None:
    machine.up()

    def process(queue_index: int) -> bool:
        raise PyvmmError("the policy ends the run")

    machine.block.process = process  # type: ignore[method-assign]

    with pytest.raises(PyvmmError, match="ends the run"):
        machine.transport.notify(0)


def window(machine: DiskMachine, offset: int, size: int) -> int:
    """Point the configuration window at the BAR; the register of its data."""
    register = machine.driver.capabilities[5].register
    machine.driver.set_config(register + 4, 1, 0)
    machine.driver.set_config(register + 8, 4, offset)
    machine.driver.set_config(register + 12, 4, size)
    return register + 16


def test_transport_configuration_window_reaches_the_registers(machine: DiskMachine) -> None:
    """4.1.4.9, with the BAR not even enabled."""
    machine.driver.set_config(window(machine, 0x14, 1), 1, ACKNOWLEDGE)

    assert machine.driver.config(window(machine, 0x14, 1), 1) == ACKNOWLEDGE
    assert machine.driver.config(window(machine, 0x12, 2), 2) == 1
    assert machine.driver.config(window(machine, 0x48, 4), 4) == 64


def test_transport_configuration_window_notifies(machine: DiskMachine) -> None:
    queue = machine.up()
    pieces, status = machine.request(T_IN, 0, Piece(DATA, 512, True))
    queue.offer(queue.chain(pieces))

    machine.driver.set_config(window(machine, 0x80, 2), 2, 0)

    assert machine.memory.peek(1, status)[0] == S_OK


@pytest.mark.parametrize(
    ("offset", "size"), [(0x14, 0), (0x14, 3), (0x14, 8), (0x13, 2), (0x100, 1), (0xFFFF_FFFF, 1)]
)
def test_transport_configuration_window_set_to_no_access_does_nothing(
    machine: DiskMachine, offset: int, size: int
) -> None:
    data = window(machine, offset, size)

    machine.driver.set_config(data, 4, 0x0F0F_0F0F)

    assert machine.driver.config(data, 4) == 0x0F0F_0F0F
    machine.driver.enable()
    assert machine.driver.status == 0


BAR_ACCESS = st.tuples(
    st.just("bar"),
    st.booleans(),
    st.one_of(st.integers(0, 0xFF), st.sampled_from([0x0C, 0x14, 0x16, 0x18, 0x1C, 0x20, 0x80])),
    st.sampled_from([1, 2, 4]),
    st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from([0, 1, 3, 11, 15, 0x1000])),
)
CONFIG_ACCESS = st.tuples(
    st.just("config"),
    st.booleans(),
    st.integers(0, 0x104),
    st.sampled_from([1, 2, 4]),
    st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from([0, 1, 2, 4, 0x80, 0x14])),
)


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.lists(st.one_of(BAR_ACCESS, CONFIG_ACCESS), max_size=40),
    st.binary(max_size=0x2400),
)
def test_transport_any_accesses_on_any_memory_are_survived(
    started: bool, accesses: list[tuple[str, bool, int, int, int]], content: bytes
) -> None:
    memory = FakeMemory(0x8000)
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 8192)
    ports = PortBus()
    pci = PciBus(ports)
    block = VirtioBlock(DiskFile(fd, "disk", 16, False, b"disk"))
    transport = VirtioPciTransport(block, memory, lambda: None, bar_base=BAR, interrupt_line=5)
    pci.add(1, transport.function)
    memory.poke(content, 0)
    pci.write_config(0, 1, 0, 4, 2, 1)
    if started:
        script = [(0x08, 4, 1), (0x0C, 4, 3), (0x14, 1, 11), (0x28, 4, 0x1000), (0x30, 4, 0x1800)]
        for offset, size, value in [*script, (0x1C, 2, 1), (0x14, 1, 15)]:
            ports.write(BAR + offset, size, value)

    for where, writes, offset, size, value in accesses:
        fitting = value & ((1 << 8 * size) - 1)
        if where == "bar" and writes:
            transport.write(offset, size, fitting)
        elif where == "bar":
            assert 0 <= transport.read(offset, size) < 1 << 8 * size
        elif writes:
            pci.write_config(0, 1, 0, offset, size, fitting)
        else:
            assert 0 <= pci.read_config(0, 1, 0, offset, size) < 1 << 8 * size
        transport.notify(0)

    transport.write(0x14, 1, 0)
    assert transport.read(0x14, 1) == 0
    memory.close()
    os.close(fd)


KINDS = st.sampled_from([0, 1, 4, 8, 11, 13, 2])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            KINDS,
            st.one_of(st.integers(0, 20), st.integers(0, (1 << 64) - 1)),
            st.lists(
                st.tuples(
                    st.one_of(st.integers(0x4000, 0x8000), st.integers(0, (1 << 64) - 1)),
                    st.one_of(st.sampled_from([0, 1, 16, 512, 1024]), st.integers(0, 1 << 32)),
                    st.booleans(),
                ),
                max_size=4,
            ),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_transport_any_requests_keep_disk_size_and_accounts(
    requests: list[tuple[int, int, list[tuple[int, int, bool]]]],
) -> None:
    """Well-formed rings with arbitrary requests: each is answered once, or the device stops."""
    memory = FakeMemory(0x8000)
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 8192)
    pci = PciBus(ports := PortBus())
    block = VirtioBlock(DiskFile(fd, "disk", 16, False, b"disk"), lambda *_: None)
    transport = VirtioPciTransport(block, memory, lambda: None, bar_base=BAR, interrupt_line=5)
    pci.add(1, transport.function)
    driver = VirtioPciDriver(pci, ports, memory, 1)
    driver.enable()
    queue = driver.bring_up(driver.offered_features(), 0x0, 64)
    heads = []
    for number, (kind, sector, data) in enumerate(requests):
        header = 0x3000 + 16 * number
        memory.poke(struct.pack("<IIQ", kind, 0, sector), header)
        pieces = [Piece(gpa, size & 0xFFFF_FFFF, writable) for gpa, size, writable in data]
        pieces.sort(key=lambda piece: piece.writable)
        heads.append(queue.chain([Piece(header, 16), *pieces, Piece(0x3800 + number, 1, True)]))
    queue.offer(*heads)

    driver.notify()

    answered = [head for head, _ in queue.collect()]
    stopped = bool(driver.status & NEEDS_RESET)
    assert answered == heads[: len(answered)]
    assert stopped or answered == heads
    assert os.fstat(fd).st_size == 8192
    counted = block.statistics
    assert counted.requests >= len(answered)
    assert counted.refused + counted.errors >= stopped
    memory.close()
    os.close(fd)
