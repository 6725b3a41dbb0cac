"""Devices of the user's own: what they may rely on, and what their mistakes come to."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_machine import VirtioMachine
from vmm.core.errors import UsageError
from vmm.core.own_code import ExtensionError
from vmm.core.ranges import Range
from vmm.devices.bus import MemoryBus, PortBus
from vmm.devices.own import GuardedRegisters, PciDevice, PortDevice
from vmm.devices.pci import PciBus
from vmm.devices.virtio.own import MOST_BYTES, VirtioDevice
from vmm.examples.ram_disk import IO_ERROR, OK, UNSUPPORTED, RamDisk
from vmm.wiring.board import Slot
from vmm.wiring.own_devices import OwnFunction, add_own

INTX_OFF = 0x400


class Echo(VirtioDevice):
    """Answers a request with itself, as far as there is room."""

    device_id = 42
    queue_sizes = (16, 16)

    def answer(self, queue: int, request: bytes, room: int) -> bytes:
        return (bytes([queue]) + request)[:room]


@pytest.fixture
def echo() -> Iterator[VirtioMachine]:
    made = VirtioMachine(Echo())
    made.up()
    yield made
    made.close()


# -- virtio ---------------------------------------------------------------------------------------


def test_request_is_answered_in_the_room_that_it_has(echo: VirtioMachine) -> None:
    first, second = echo.blank(3), echo.blank(16)
    echo.give(1, echo.place(b"ab"), echo.place(b"cd"), first, second)

    echo.kick(1)

    assert echo.text(first, 3) + echo.text(second, 3) == b"\1abcd\xcc"
    assert echo.queues[1].collect() == [(0, 5)]
    assert echo.interrupts == 1
    counts = echo.device.statistics
    assert (counts.requests, counts.bytes_read, counts.bytes_written) == (1, 5, 4)


def test_request_in_private_memory_stops_the_device_and_not_the_run(echo: VirtioMachine) -> None:
    secret = echo.place(b"private")
    echo.memory.private.append(Range(secret.gpa, 4096))
    echo.give(0, secret, echo.blank(8))

    echo.kick(0)

    assert echo.driver.status & 0x40
    assert echo.device.statistics.refused == 1
    assert echo.queues[0].collect() == []


def test_request_that_is_too_large_stops_the_device(echo: VirtioMachine) -> None:
    piece = echo.place(bytes(128 << 10))
    echo.give(0, *[piece] * (1 + MOST_BYTES // piece.size))

    echo.kick(0)

    assert echo.driver.status & 0x40
    assert "are taken" in str(echo.transport.failure)


def test_what_an_answer_raises_leaves_the_transport() -> None:
    class Fails(Echo):
        def answer(self, queue: int, request: bytes, room: int) -> bytes:
            raise OSError(5, "mine")

    machine = VirtioMachine(Fails())
    machine.up()
    machine.give(0, machine.blank(8))

    with pytest.raises(ExtensionError, match=r"Fails: answer raised OSError\(5, 'mine'\)"):
        machine.kick(0)
    machine.close()


@pytest.mark.parametrize("answer", [None, "text", bytes(9), bytearray(9)])
def test_answer_that_is_none_or_too_long_is_the_devices_fault(answer: object) -> None:
    class Fails(Echo):
        def answer(self, queue: int, request: bytes, room: int) -> bytes:
            return answer  # type: ignore[return-value]  # the mistake

    machine = VirtioMachine(Fails())
    machine.up()
    machine.give(0, machine.blank(8))

    with pytest.raises(ExtensionError, match="return bytes, 8 at most"):
        machine.kick(0)
    machine.close()


@pytest.mark.parametrize(
    ("request_", "room", "status"),
    [
        (struct.pack("<I4xQ", 0, 1), 513, b"x" * 512 + OK),
        (struct.pack("<I4xQ", 0, 2), 513, bytes(512) + IO_ERROR),
        (struct.pack("<I4xQ", 1, 0) + b"y" * 512, 1, OK),
        (struct.pack("<I4xQ", 1, 2**64 - 1) + b"y" * 512, 1, IO_ERROR),
        (struct.pack("<I4xQ", 9, 0), 1, UNSUPPORTED),
        (b"short", 1, IO_ERROR),
        (b"", 0, b""),
    ],
)
def test_ram_disk_answers_whatever_a_driver_asks(request_: bytes, room: int, status: bytes) -> None:
    disk = RamDisk(1024)
    disk.content[512:] = b"x" * 512

    assert disk.answer(0, request_, room) == status


# -- registers ------------------------------------------------------------------------------------


class Registers(PortDevice):
    ports = range(0x510, 0x514)
    does: Callable[[], int] = staticmethod(lambda: 0)

    def read(self, offset: int, size: int) -> int:
        return self.does()

    def write(self, offset: int, size: int, value: int) -> None:
        self.does()


def refused() -> int:
    FakeMemory(4096).pread(1, 1 << 40)
    raise AssertionError


def test_guest_that_names_memory_that_is_not_there_reads_ones() -> None:
    device = Registers()
    device.does = refused
    registers = GuardedRegisters(device)

    assert registers.read(0, 2) == 0xFFFF
    registers.write(0, 2, 7)

    assert registers.as_dict() == {
        "requests": 2, "bytes_read": 2, "bytes_written": 2, "flushes": 0, "errors": 0, "refused": 2,
    }  # fmt: skip


@pytest.mark.parametrize("value", [-1, 256, None, b"x"])
def test_register_that_does_not_fit_is_the_devices_fault(value: object) -> None:
    device = Registers()
    device.does = lambda: value  # type: ignore[assignment,return-value]  # the mistake

    with pytest.raises(ExtensionError, match=r"Registers: read returned .* 0 to 0xff"):
        GuardedRegisters(device).read(0, 1)


def test_devices_without_methods_read_ones_and_drop_writes() -> None:
    registers = GuardedRegisters(PciDevice())

    registers.write(0, 4, 1)

    assert registers.read(0, 4) == 0xFFFF_FFFF


# -- the interrupt of a PCI function --------------------------------------------------------------


class Line:
    """LevelLine without KVM."""

    def __init__(self) -> None:
        self.raised = 0
        self.sources: list[Callable[[], bool]] = []

    def add_source(self, pending: Callable[[], bool]) -> None:
        self.sources.append(pending)

    def __call__(self) -> None:
        self.raised += 1


@pytest.fixture
def function() -> tuple[PciDevice, Line, PciBus]:
    device, line = PciDevice(), Line()
    slot = Slot(
        5, interrupt_line=5, registers_in_io=True, registers_base=0xC000, msix_base=0xC000_0000
    )
    own = OwnFunction(device, GuardedRegisters(device), slot, line)  # type: ignore[arg-type]
    device.connect(own.raised)
    bus = PciBus(PortBus(), MemoryBus())
    bus.add(1, own)
    return device, line, bus


def test_interrupt_goes_up_once_and_stays_until_it_is_taken_down(
    function: tuple[PciDevice, Line, PciBus],
) -> None:
    device, line, bus = function

    device.interrupt()
    device.interrupt()

    assert line.raised == 1
    assert line.sources[0]()  # after the guest's EOI it goes up again
    assert bus.read_config(0, 1, 0, 0x06, 2) & 0x08
    device.interrupt(False)
    assert not line.sources[0]()
    assert not bus.read_config(0, 1, 0, 0x06, 2) & 0x08


def test_interrupt_that_the_guest_disabled_comes_when_it_enables_it(
    function: tuple[PciDevice, Line, PciBus],
) -> None:
    device, line, bus = function
    bus.write_config(0, 1, 0, 0x04, 2, INTX_OFF)

    device.interrupt()
    before = line.raised
    bus.write_config(0, 1, 0, 0x04, 2, 0)

    assert (before, line.raised) == (0, 1)


# -- boards ---------------------------------------------------------------------------------------


class BoardWithoutPorts:
    """As arm64's."""

    has_ports = False


def test_ports_where_there_are_none_are_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"Registers: .* no I/O ports; use vmm.PciDevice"):
        add_own(Registers(), BoardWithoutPorts(), None, None, None)  # type: ignore[arg-type]


def test_ports_that_pyvmm_has_are_refused() -> None:
    class Board:
        has_ports = True
        ports = PortBus()

    Board.ports.add(0x510, 1, Registers())

    with pytest.raises(UsageError, match=r"Registers: ports 0x510 to 0x513 cannot go to"):
        add_own(Registers(), Board(), None, None, None)  # type: ignore[arg-type]
