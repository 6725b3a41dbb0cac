"""MSI-X: the table as a guest writes it, messages held back and sent, and virtio's vectors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.disk_machine import BAR, MINIMUM, RINGS
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import VirtioPciDriver, VirtioQueueDriver
from vmm.devices.bus import MemoryBus, PortBus
from vmm.devices.msix import BAR_SIZE, CONTROL_ENABLE, CONTROL_MASK_ALL, PENDING, MsixTable
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.pci_transport import VirtioPciTransport

ADDRESS, DATA = 0xFEE0_1000, 0x41
VECTOR_CONTROL = 12
TABLE_GPA = 0xE000_0000
NO_VECTOR = 0xFFFF


@dataclass
class Lines:
    """Notes routes and messages."""

    routes: list[tuple[int, int, int]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    calls: int = 0

    def route(self, messages: Mapping[int, tuple[int, int]]) -> None:
        self.calls += 1
        self.routes += [(vector, *message) for vector, message in messages.items()]

    def signal(self, vector: int) -> None:
        self.sent.append(vector)


def fill(table: MsixTable, vector: int, control: int = 0) -> None:
    """Write an entry as Linux does: address, upper address, data, control."""
    for offset, value in ((0, ADDRESS), (4, 0), (8, DATA + vector), (VECTOR_CONTROL, control)):
        table.write(16 * vector + offset, 4, value)


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def table(lines: Lines) -> MsixTable:
    """Three vectors, enabled, all still masked."""
    made = MsixTable(3, lines)
    made.control(CONTROL_ENABLE)
    return made


def test_vector_is_routed_when_it_is_unmasked_and_sent_when_it_has_a_cause(
    table: MsixTable, lines: Lines
) -> None:
    fill(table, 1)
    assert lines.routes == [(1, ADDRESS, DATA + 1)]

    table.interrupt(1)
    table.interrupt(1)

    assert lines.sent == [1, 1]
    assert table.read(PENDING, 8) == 0


def test_masked_vector_is_pending_and_sent_once_when_unmasked(
    table: MsixTable, lines: Lines
) -> None:
    table.interrupt(2)
    table.interrupt(2)
    fill(table, 2, control=1)
    assert (lines.routes, lines.sent) == ([], [])
    assert table.read(PENDING, 8) == 1 << 2

    table.write(16 * 2 + VECTOR_CONTROL, 4, 0)

    assert (lines.routes, lines.sent) == ([(2, ADDRESS, DATA + 2)], [2])
    assert table.read(PENDING, 8) == 0


@pytest.mark.parametrize("control", [0, CONTROL_MASK_ALL, CONTROL_ENABLE | CONTROL_MASK_ALL])
def test_function_that_may_not_send_keeps_it_pending(
    table: MsixTable, lines: Lines, control: int
) -> None:
    fill(table, 0)
    table.control(control)
    table.interrupt(0)
    assert lines.sent == []

    table.control(CONTROL_ENABLE)

    assert lines.sent == [0]


def test_message_that_moves_is_routed_anew_and_one_that_stays_is_not(
    table: MsixTable, lines: Lines
) -> None:
    fill(table, 0)
    table.write(VECTOR_CONTROL, 4, 1)
    table.write(VECTOR_CONTROL, 4, 0)
    assert len(lines.routes) == 1

    table.write(VECTOR_CONTROL, 4, 1)
    table.write(0, 8, ADDRESS + 0x1000)
    table.write(VECTOR_CONTROL, 4, 0)

    assert lines.routes[1:] == [(0, ADDRESS + 0x1000, DATA)]


def test_function_unmasked_as_a_whole_is_routed_by_one_call(table: MsixTable, lines: Lines) -> None:
    table.control(CONTROL_ENABLE | CONTROL_MASK_ALL)
    for vector in range(3):
        fill(table, vector)
    assert lines.calls == 0

    table.control(CONTROL_ENABLE)
    table.control(CONTROL_ENABLE)

    assert lines.calls == 1
    assert len(lines.routes) == 3


def test_table_rewritten_all_the_time_costs_one_call_for_each_message_at_most(
    table: MsixTable, lines: Lines
) -> None:
    writes = 0
    for number in range(300):
        fill(table, number % 3, control=number & 1)
        table.write(16 * (number % 3) + 8, 4, number)
        writes += 5

    assert 0 < lines.calls <= writes
    before = lines.calls
    for _ in range(300):
        table.write(VECTOR_CONTROL, 4, 1)
        table.write(VECTOR_CONTROL, 4, 0)
    assert lines.calls <= before + 1  # masks alone change no route


class SlowLines(Lines):
    """KVM takes its time with a route: until `done` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.done = threading.Event(), threading.Event()

    def route(self, messages: Mapping[int, tuple[int, int]]) -> None:
        self.waiting.set()
        assert self.done.wait(30)
        super().route(messages)


def test_interrupt_of_another_vector_does_not_wait_for_a_route_that_is_under_way() -> None:
    lines = SlowLines()
    lines.done.set()
    table = MsixTable(2, lines)
    table.control(CONTROL_ENABLE)
    fill(table, 0)
    lines.waiting.clear()
    lines.done.clear()
    vcpu = threading.Thread(target=fill, args=(table, 1))
    vcpu.start()
    assert lines.waiting.wait(30)

    sender = threading.Thread(target=table.interrupt, args=(0,))
    sender.start()
    sender.join(5)  # it waits for nobody

    assert lines.sent == [0]
    assert table.read(VECTOR_CONTROL, 4) == 0  # nor does another vCPU that reads
    lines.done.set()
    vcpu.join(30)
    sender.join(30)


def test_interrupt_whose_route_is_under_way_is_sent_once_it_is_there() -> None:
    lines = SlowLines()
    table = MsixTable(1, lines)
    table.control(CONTROL_ENABLE)
    vcpu = threading.Thread(target=fill, args=(table, 0))
    vcpu.start()
    assert lines.waiting.wait(30)

    sender = threading.Thread(target=table.interrupt, args=(0,))
    sender.start()
    sender.join(5)
    assert not sender.is_alive()
    assert (lines.sent, table.read(PENDING, 8)) == ([], 1)
    lines.done.set()
    vcpu.join(30)

    assert lines.routes == [(0, ADDRESS, DATA)]
    assert (lines.sent, table.read(PENDING, 8)) == ([0], 0)


def test_message_changed_by_a_second_vcpu_during_a_route_is_the_one_that_stays() -> None:
    lines = SlowLines()
    table = MsixTable(1, lines)
    table.control(CONTROL_ENABLE)
    first = threading.Thread(target=fill, args=(table, 0))
    first.start()
    assert lines.waiting.wait(30)
    table.interrupt(0)

    second = threading.Thread(target=table.write, args=(8, 4, DATA + 7))
    second.start()
    lines.done.set()
    first.join(30)
    second.join(30)

    assert lines.routes[-1] == (0, ADDRESS, DATA + 7)
    assert lines.sent == [0]


def test_reset_of_the_function_forgets_what_was_pending(table: MsixTable, lines: Lines) -> None:
    table.interrupt(0)
    table.forget_pending()

    fill(table, 0)

    assert lines.sent == []


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (0, 2), (2, 4), (4, 8), (44, 8), (48, 4), (PENDING, 4), (0xFF8, 8)]
)
def test_write_that_is_no_whole_dword_of_the_table_is_dropped(
    table: MsixTable, lines: Lines, offset: int, size: int
) -> None:
    before = [table.read(at, 8) for at in range(0, BAR_SIZE, 8)]

    table.write(offset, size, (1 << 8 * size) - 1)

    assert [table.read(at, 8) for at in range(0, BAR_SIZE, 8)] == before


def test_vectors_start_masked_and_past_the_table_all_reads_as_zero(table: MsixTable) -> None:
    assert [table.read(16 * vector + VECTOR_CONTROL, 4) for vector in range(4)] == [1, 1, 1, 0]
    assert table.read(0x7FC, 8) == table.read(BAR_SIZE - 1, 8) == 0


@pytest.mark.parametrize("vectors", [0, 129])
def test_table_that_does_not_fit_is_refused(vectors: int) -> None:
    with pytest.raises(ValueError, match="MSI-X"):
        MsixTable(vectors, Lines())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "control", "interrupt", "reset"]),
            st.one_of(st.integers(0, 60), st.integers(0, BAR_SIZE - 1)),
            st.integers(1, 8),
            st.one_of(st.sampled_from([0, 1, 0x8000, 0xC000]), st.integers(0, (1 << 64) - 1)),
        ),
        max_size=60,
    )
)
def test_any_accesses_send_only_what_is_live_and_fit_their_size(
    steps: list[tuple[str, int, int, int]],
) -> None:
    live: list[bool] = []
    lines = Lines()
    table = MsixTable(3, lines)
    control = 0

    def check(vector: int) -> None:
        masked = table._table[16 * vector + VECTOR_CONTROL] & 1
        live.append(
            bool(control & CONTROL_ENABLE) and not control & CONTROL_MASK_ALL and not masked
        )

    lines.signal = check  # type: ignore[method-assign]

    for what, offset, size, value in steps:
        if what == "read":
            assert 0 <= table.read(offset, size) < 1 << 8 * size
        elif what == "write":
            table.write(offset, size, value & ((1 << 8 * size) - 1))
        elif what == "control":
            control = value & 0xFFFF
            table.control(control)
        elif what == "interrupt":
            table.interrupt(value & 0xFFFF)
        else:
            table.forget_pending()

    assert all(live)


# -- a virtio function that has one ---------------------------------------------------------------


@dataclass
class Machine:
    """A disk with MSI-X, its driver, and what went out by either kind of interrupt."""

    memory: FakeMemory
    registers: MemoryBus
    transport: VirtioPciTransport
    driver: VirtioPciDriver
    lines: Lines
    intx: list[None]
    capability: int

    def write_table(self, offset: int, value: int) -> None:
        found = self.registers.find(TABLE_GPA + offset)
        assert found is not None
        device, inside = found
        device.write(inside, 4, value)

    def enable_messages(self) -> None:
        """As Linux does: memory decoding, MSI-X on but masked, entries, then unmasked."""
        self.driver.set_config(0x04, 2, 0x7)
        self.driver.set_config(self.capability + 2, 2, CONTROL_ENABLE | CONTROL_MASK_ALL)
        for vector in range(2):
            for offset, value in ((0, ADDRESS), (4, 0), (8, DATA + vector), (VECTOR_CONTROL, 0)):
                self.write_table(16 * vector + offset, value)
        self.driver.set_config(self.capability + 2, 2, CONTROL_ENABLE)

    def bring_up(self) -> VirtioQueueDriver:
        """Vector 0 for configuration changes, 1 for the queue."""
        queue = self.driver.bring_up(MINIMUM, RINGS, 64)
        self.driver.put(0x10, 2, 0)
        self.driver.put(0x16, 2, 0)
        self.driver.put(0x1A, 2, 1)
        return queue


@pytest.fixture
def machine(lines: Lines) -> Iterator[Machine]:
    memory = FakeMemory(1 << 16)
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 8192)
    ports, registers, intx = PortBus(), MemoryBus(), list[None]()
    pci = PciBus(ports, registers)
    transport = VirtioPciTransport(
        VirtioBlock(DiskFile(fd, "disk", 16, False, b"disk")),
        memory,
        lambda: intx.append(None),
        bar_base=BAR,
        interrupt_line=5,
        msix=MsixTable(2, lines),
        msix_base=TABLE_GPA,
    )
    pci.add(0, host_bridge())
    pci.add(1, transport.function)
    driver = VirtioPciDriver(pci, ports, memory, 1)
    register = driver.config(0x34, 1)
    while driver.config(register, 1) != 0x11:
        register = driver.config(register + 1, 1)
    yield Machine(memory, registers, transport, driver, lines, intx, register)
    memory.close()
    os.close(fd)


def bad_request(machine: Machine, queue: VirtioQueueDriver) -> None:
    """A chain that stops the device: a configuration interrupt."""
    queue.offer(9999)
    machine.driver.notify()


def good_request(machine: Machine, queue: VirtioQueueDriver) -> None:
    """An unknown request, answered: a queue interrupt."""
    queue.descriptor(0, 0x8000, 16, 1, 1)
    queue.descriptor(1, 0x9000, 1, 2, 0)
    machine.memory.poke(bytes([99] + [0] * 15), 0x8000)
    queue.offer(0)
    machine.driver.notify()


def test_capability_describes_table_and_pending_bits_in_bar_1(machine: Machine) -> None:
    driver, at = machine.driver, machine.capability

    assert driver.config(at + 2, 2) == 1  # two vectors, off
    assert driver.config(at + 4, 4) == 0x001
    assert driver.config(at + 8, 4) == 0x801
    assert driver.config(0x14, 4) == TABLE_GPA
    driver.set_config(0x14, 4, 0xFFFF_FFFF)
    assert driver.config(0x14, 4) == 0xFFFF_F000
    driver.set_config(at + 2, 2, 0xFFFF)
    assert driver.config(at + 2, 2) == 0xC001


def test_queue_and_configuration_have_their_own_messages_and_no_intx(machine: Machine) -> None:
    machine.enable_messages()
    queue = machine.bring_up()

    good_request(machine, queue)
    assert (machine.lines.sent, queue.collect()) == ([1], [(0, 1)])
    bad_request(machine, queue)

    assert machine.lines.sent == [1, 0]
    assert machine.intx == []
    assert not machine.transport.interrupt_pending()
    assert machine.driver.isr() == 0


def test_device_ends_its_turn_while_a_vcpu_waits_for_kvm_with_a_route(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.enable_messages()
    queue = machine.bring_up()
    machine.driver.set_config(0x04, 2, 0x7)
    slow = SlowLines()
    monkeypatch.setattr(machine.lines, "route", slow.route)
    vcpu = threading.Thread(target=machine.write_table, args=(8, DATA + 7))
    vcpu.start()
    assert slow.waiting.wait(30)

    turn = threading.Thread(target=good_request, args=(machine, queue))
    turn.start()
    turn.join(5)

    assert not turn.is_alive()
    assert queue.collect() == [(0, 1)]
    assert machine.lines.sent == [1]
    slow.done.set()
    vcpu.join(30)
    turn.join(30)


def test_guest_that_leaves_messages_off_gets_intx(machine: Machine) -> None:
    queue = machine.bring_up()

    good_request(machine, queue)

    assert (machine.lines.sent, len(machine.intx)) == ([], 1)
    assert machine.driver.isr() == 1


@pytest.mark.parametrize(
    ("wanted", "got"), [(0, 0), (1, 1), (2, NO_VECTOR), (NO_VECTOR, NO_VECTOR)]
)
@pytest.mark.parametrize("register", [0x10, 0x1A])
def test_vector_reads_back_only_if_it_exists(
    machine: Machine, register: int, wanted: int, got: int
) -> None:
    machine.driver.enable()

    machine.driver.put(register, 2, wanted)

    assert machine.driver.get(register, 2) == got


def test_reset_takes_vectors_away(machine: Machine) -> None:
    machine.enable_messages()
    queue = machine.bring_up()
    machine.driver.status = 0

    assert (machine.driver.get(0x10, 2), machine.driver.get(0x1A, 2)) == (NO_VECTOR, NO_VECTOR)
    queue = machine.driver.bring_up(MINIMUM, RINGS, 64)
    good_request(machine, queue)

    assert machine.lines.sent == []


def test_table_is_reachable_exactly_while_memory_decoding_is_on(machine: Machine) -> None:
    assert machine.registers.find(TABLE_GPA) is None

    machine.driver.set_config(0x04, 2, 0x2)
    assert machine.registers.find(TABLE_GPA + 0x10) is not None
    machine.driver.set_config(0x14, 4, 0xE123_4000)

    assert machine.registers.find(TABLE_GPA) is None
    assert machine.registers.find(0xE123_4FFF) is not None
    assert machine.registers.find(0xE123_5000) is None


def test_message_control_written_byte_by_byte_is_obeyed(machine: Machine) -> None:
    queue = machine.bring_up()
    machine.enable_messages()
    machine.driver.set_config(machine.capability + 3, 1, 0x40)  # off, masked
    good_request(machine, queue)
    assert len(machine.intx) == 1

    machine.driver.set_config(machine.capability, 4, 0x8000_0000)
    good_request(machine, queue)

    assert machine.lines.sent == [1]
